"""The video depth protocol: against a reference of plain loops written here, and each of its quirks on its own."""

import dataclasses
import math

import cv2
import numpy as np
import pytest

from omnistream_jax.evals.depth_metrics import (
    DepthMetrics,
    SequenceDepthMetrics,
    fit_scale_and_shift_by_adam,
    sequence_depth_metrics,
    weighted_mean,
)

NUMBERS = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta_1", "delta_2", "delta_3", "valid_pixels")
SINTEL = {"max_depth": 70.0, "clip_prediction": 70.0}
BONN = {"max_depth": 70.0, "clip_prediction": None}
KITTI = {"max_depth": None, "clip_prediction": None}


def score(prediction, target, align="scale", max_depth=None, clip_prediction=None):
    return sequence_depth_metrics(prediction, target, align=align, max_depth=max_depth, clip_prediction=clip_prediction)


def sequence(seed=0, frames=3, small=(5, 7), large=(11, 13), spread=0.3):
    """A noisy prediction at another scale and size, and a target with holes and with depth beyond 70."""
    generator = np.random.default_rng(seed)
    target = generator.uniform(0.5, 90, (frames, *large))
    target[generator.random(target.shape) < 0.2] = generator.choice([0.0, -1.0, np.nan])
    prediction = generator.uniform(1, 30, (frames, *small)) * generator.lognormal(0, spread, (frames, *small))
    return prediction.astype(np.float32), target


def flat(frame, value=1.0):
    """[1, 1, N] so that nothing is resized."""
    return np.asarray(frame, np.float64).reshape(1, 1, -1) * value


def pixels_by_hand(prediction, target, max_depth):
    pairs = []
    for t in range(len(target)):
        resized = cv2.resize(prediction[t], (target.shape[2], target.shape[1]), interpolation=cv2.INTER_CUBIC)
        for row in range(target.shape[1]):
            for column in range(target.shape[2]):
                g = float(target[t, row, column])
                if g > 0 and (max_depth is None or g < max_depth):
                    pairs.append((float(resized[row, column]), g))
    return pairs


def scale_by_hand(pairs):
    s = (sum(g for _, g in pairs) / len(pairs)) / (sum(p for p, _ in pairs) / len(pairs))
    for _ in range(10):
        weights = [1 / (abs(s * p - g) + 1e-8) for p, g in pairs]
        above = sum(w * p * g for w, (p, g) in zip(weights, pairs, strict=True))
        s = above / sum(w * p * p for w, (p, _) in zip(weights, pairs, strict=True))
    return max(s, 1e-3), 0.0


def adam_by_hand(pairs):
    """A thousand steps of Kingma and Ba's algorithm 1."""
    middle = (len(pairs) - 1) // 2
    s, t = sorted(g for _, g in pairs)[middle] / sorted(p for p, _ in pairs)[middle], 0.0
    first, second, before = [0.0, 0.0], [0.0, 0.0], None
    for step in range(1, 1001):
        residuals = [s * p + t - g for p, g in pairs]
        signs = [(r > 0) - (r < 0) for r in residuals]
        gradients = [sum(sign * p for sign, (p, _) in zip(signs, pairs, strict=True)), sum(signs)]
        moves = []
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + (1 - 0.9) * gradient
            second[i] = 0.999 * second[i] + (1 - 0.999) * gradient**2
            moves.append(first[i] / (1 - 0.9**step) / (math.sqrt(second[i] / (1 - 0.999**step)) + 1e-8))
        s, t = s - 1e-4 * moves[0], t - 1e-4 * moves[1]
        loss = sum(abs(r) for r in residuals)
        if before is not None and abs(before - loss) < 1e-6:
            break
        before = loss
    return s, t


def metrics_by_hand(prediction, target, align, max_depth, clip_prediction):
    pairs = pixels_by_hand(prediction, target, max_depth)
    s, t = {"scale": scale_by_hand, "scale&shift": adam_by_hand, "metric": lambda pairs: (1.0, 0.0)}[align](pairs)
    sums, count = [0.0] * 7, len(pairs)
    for p, g in pairs:
        p = s * p + t
        if clip_prediction is not None:
            p = min(p, clip_prediction)
        sums[0] += abs(p - g) / g
        sums[1] += (p - g) ** 2 / g
        sums[2] += (p - g) ** 2
        p = max(p, 1e-5)
        sums[3] += (math.log(p) - math.log(g)) ** 2
        ratio = max(p / g, g / p)
        for power in (1, 2, 3):
            sums[3 + power] += ratio < 1.25**power
    means = [number / count for number in sums]
    means[2], means[3] = math.sqrt(means[2]), math.sqrt(means[3])
    return [*means, count], s, t


def numbers(metrics):
    return [getattr(metrics, name) for name in NUMBERS]


@pytest.mark.parametrize("preset", [SINTEL, BONN, KITTI], ids=["sintel", "bonn", "kitti"])
@pytest.mark.parametrize("align", ["scale", "metric"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference_of_plain_loops(preset, align, seed):
    prediction, target = sequence(seed)
    found = score(prediction, target, align, **preset)
    expected, s, t = metrics_by_hand(prediction, target, align, **preset)
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-6, atol=1e-9)
    assert (found.scale, found.shift) == (pytest.approx(s, rel=1e-7), t)


def test_scale_and_shift_equals_the_reference_of_plain_loops():
    prediction, target = sequence(1, frames=2, large=(6, 8))
    found = score(prediction, target, "scale&shift", **SINTEL)
    expected, s, t = metrics_by_hand(prediction, target, "scale&shift", **SINTEL)
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-6, atol=1e-9)
    assert (found.scale, found.shift) == (pytest.approx(s, rel=1e-9), pytest.approx(t, rel=1e-9))


def test_the_truth_scores_perfectly():
    _, target = sequence(large=(6, 8))
    target = np.nan_to_num(target, nan=-1)
    for align in ("metric", "scale", "scale&shift"):
        found = score(target.astype(np.float32), target.astype(np.float32), align)
        perfect = [0, 0, 0, 0, 1, 1, 1, np.sum(target > 0)]
        np.testing.assert_allclose(numbers(found), perfect, atol=2e-4 if align == "scale&shift" else 1e-9)


def test_a_perturbation_by_hand():
    found = score(flat([1.5, 2, 8, 2]), flat([1, 2, 4, 0]), "metric")
    assert found.abs_rel == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.sq_rel == pytest.approx((0.25 + 0 + 4) / 3)
    assert found.rmse == pytest.approx(math.sqrt((0.25 + 16) / 3))
    assert found.log_rmse == pytest.approx(math.sqrt((math.log(1.5) ** 2 + math.log(2) ** 2) / 3))
    assert (found.delta_1, found.delta_2, found.delta_3) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert found.valid_pixels == 3


def test_the_threshold_itself_is_outside():
    found = score(flat([1.25, 4, 1]), flat([1, 5, 1]), "metric")
    assert found.delta_1 == pytest.approx(1 / 3)


def test_ten_iterations_differ_from_the_l1_optimum_and_from_the_median_ratio():
    generator = np.random.default_rng(3)
    target = generator.uniform(1, 60, 2000)
    prediction = (target / 3 * generator.lognormal(0, 0.5, 2000)).astype(np.float32).astype(np.float64)
    found = score(flat(prediction), flat(target)).abs_rel
    order = np.argsort(target / prediction)
    weight = np.cumsum(prediction[order])
    optimum = (target / prediction)[order][np.searchsorted(weight, weight[-1] / 2)]
    others = [optimum, np.median(target) / np.median(prediction), np.median(target / prediction)]
    for other in others:
        assert abs(found - np.mean(np.abs(other * prediction - target) / target)) > 1e-4
    scale, _ = scale_by_hand(list(zip(prediction, target, strict=True)))
    assert found == pytest.approx(np.mean(np.abs(scale * prediction - target) / target), rel=1e-7)


def test_the_whole_sequence_shares_one_scale():
    target = np.ones((2, 4, 4)) * [[[1]], [[2]]]
    prediction = np.ones((2, 4, 4), np.float32)
    assert score(prediction, target).abs_rel > 0.2
    assert score(prediction[:1], target[:1]).abs_rel == score(prediction[1:], target[1:]).abs_rel == 0


def test_the_prediction_is_resized_with_overshoots_and_they_are_kept():
    prediction = np.full((1, 4, 4), 0.01, np.float32)
    prediction[:, :, 2:] = 10
    resized = cv2.resize(prediction[0], (16, 16), interpolation=cv2.INTER_CUBIC)
    assert resized.min() < 0
    found = score(prediction, np.ones((1, 16, 16)), "metric")
    assert found.valid_pixels == 256
    assert found.abs_rel == pytest.approx(np.abs(resized.astype(np.float64) - 1).mean(), rel=1e-9)


def test_the_prediction_is_raised_after_the_first_three_metrics_and_before_the_others():
    found = score(flat([-3.0]), flat([1.0]), "metric")
    assert (found.abs_rel, found.sq_rel, found.rmse) == pytest.approx((4, 16, 4))
    assert found.log_rmse == pytest.approx(-math.log(1e-5))
    assert found.delta_3 == 0


def test_a_negative_fit_becomes_a_thousandth():
    assert score(flat([-1.0, -2.0]), flat([1.0, 2.0])).scale == 1e-3


def test_the_prediction_is_clipped_after_alignment_and_only_where_asked():
    prediction, target = flat([30, 30, 30, 60]), flat([60, 60, 60, 60])
    assert score(prediction, target, **BONN).scale == pytest.approx(2, rel=0.02)
    assert score(prediction, target, **BONN).rmse == pytest.approx(60 / 2, rel=0.03)
    assert score(prediction, target, **SINTEL).rmse == pytest.approx(10 / 2, rel=0.03)
    # Clipped before the alignment too, 120 would not become 60.
    assert score(flat([120, 120, 30]), flat([60, 60, 15]), **SINTEL).rmse == pytest.approx(0, abs=1e-6)


def test_depth_from_the_limit_on_is_not_valid():
    prediction, target = flat([1, 1, 1, 1]), flat([1, 69.99, 70, 100])
    assert score(prediction, target, "metric", **BONN).valid_pixels == 2
    assert score(prediction, target, "metric", **KITTI).valid_pixels == 4


def test_scale_and_shift_stay_near_the_start():
    generator = np.random.default_rng(5)
    prediction = generator.uniform(1, 5, 200)
    target = 2 * prediction + 10
    s, t = fit_scale_and_shift_by_adam(prediction, target)
    start = np.sort(target)[99] / np.sort(prediction)[99]
    assert 0.01 < abs(s - start) < 0.2  # a converged fit has s = 2 and t = 10
    assert 0.01 < abs(t) < 0.2


def test_scale_and_shift_start_from_the_lower_median():
    s, _ = fit_scale_and_shift_by_adam(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 60, 80]), steps=0)
    assert s == 20 / 2


def test_scale_and_shift_stop_once_the_loss_rests():
    # One pixel over and one under, alike: the gradient is 0, so the second step ends it with nothing moved.
    prediction, target = np.array([1.0, 1, 1]), np.array([1.0, 2, 0])
    assert fit_scale_and_shift_by_adam(prediction, target) == (1.0, 0.0)
    # Without the stop, 1000 steps of 1e-4 would move by 0.1.
    far = fit_scale_and_shift_by_adam(np.array([1.0]), np.array([1.0]), tolerance=np.inf)
    moved, _ = fit_scale_and_shift_by_adam(np.array([1.0, 2, 9]), np.array([1.0, 5, 3]), tolerance=np.inf)
    assert far == (1.0, 0.0)
    assert abs(moved - 1.5) == pytest.approx(2e-4, rel=0.05)


def test_no_valid_pixel_gives_zeros_that_weigh_nothing():
    empty = score(flat([np.nan, 1.0]), flat([0.0, -1.0]), **SINTEL)
    assert numbers(empty) == [0] * 8
    assert (empty.scale, empty.shift) == (None, None)
    other = score(flat([1.5, 2]), flat([1, 2]), "metric")
    assert numbers(weighted_mean([other, empty])) == numbers(other)
    with pytest.raises(ValueError, match="expected at least one with valid pixels, got 1 without any"):
        weighted_mean([empty])
    with pytest.raises(ValueError, match="expected at least one with valid pixels, got 0"):
        weighted_mean([])


def test_sequences_weigh_by_their_valid_pixels():
    first = SequenceDepthMetrics(0.1, 1.0, 2.0, 0.2, 0.9, 0.95, 0.99, 300, 2.0, 0.0)
    second = SequenceDepthMetrics(0.3, 2.0, 6.0, 0.6, 0.5, 0.75, 0.95, 100, 3.0, 0.0)
    mean = weighted_mean([first, second])
    assert type(mean) is DepthMetrics
    assert dataclasses.astuple(mean) == pytest.approx((0.15, 1.25, 3.0, 0.3, 0.8, 0.9, 0.98, 400))


@pytest.mark.parametrize(
    ("prediction", "target", "options", "message"),
    [
        (np.ones((2, 4, 4)), np.ones((3, 4, 4)), {}, r"equally many frames, got \(2, 4, 4\) and \(3, 4, 4\)"),
        (np.ones((2, 4, 4, 1)), np.ones((2, 4, 4)), {}, r"expected prediction \[T, h, w\]"),
        (np.ones((1, 4, 4)), np.ones((1, 4, 4)), {"align": "median"}, "align: expected one of scale, .*'median'"),
        (np.full((1, 4, 4), np.nan), np.ones((1, 4, 4)), {}, "prediction: expected finite depth"),
        (np.zeros((1, 4, 4)), np.ones((1, 4, 4)), {}, "prediction: no scale alignment exists"),
        (np.zeros((1, 4, 4)), np.ones((1, 4, 4)), {"align": "scale&shift"}, "prediction: no scale&shift alignment"),
        (np.ones((1, 4, 4)), np.full((1, 4, 4), 1e-310), {"align": "metric"}, "target: corrupt depth"),
        (np.ones((1, 4, 4)), np.full((1, 4, 4), np.inf), {"align": "metric"}, "target: corrupt depth"),
    ],
)
def test_bad_input_is_named(prediction, target, options, message):
    with pytest.raises(ValueError, match=message):
        score(prediction, target, **options)
