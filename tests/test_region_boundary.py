"""J and F of DAVIS-2017, held to the package vos-benchmark."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from vos_cases import random_clip

from omnistream_jax.evals.region_boundary import (
    ObjectScores,
    boundary_accuracy,
    mean_scores,
    region_similarity,
    score_sequence,
)

GOLDEN = json.loads((Path(__file__).parent / "data" / "vos_benchmark.json").read_text())


KNOWN = 50  # clips; in the first masks of those that follow the largest number may be missing


def clip(number):
    return random_clip(number, known=number < KNOWN)


def means(prediction, truth):
    """{object: (J, F)} in percent, as the package gives them."""
    scores = score_sequence(prediction, truth, counting="vos-benchmark")
    counted = [[row[~np.isnan(row)].mean() * 100 for row in rows] for rows in (scores.region, scores.boundary)]
    return {int(number): pair for number, *pair in zip(scores.numbers, *counted, strict=True)}


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_scores_equal_vos_benchmark_exactly(number):
    prediction, truth = clip(number)
    assert hashlib.sha256(prediction.tobytes() + truth.tobytes()).hexdigest() == GOLDEN[number]["digest"]
    actual = means(prediction, truth)
    assert {str(number): value for number, (value, _) in actual.items()} == GOLDEN[number]["j"]
    assert {str(number): value for number, (_, value) in actual.items()} == GOLDEN[number]["f"]


@pytest.mark.parametrize("seed", range(KNOWN))
def test_davis2017_counts_the_frames_before_an_object_is_seen_as_right(seed):
    """This is where it differs from the package; and an object that no scored frame shows is scored nevertheless."""
    prediction, truth = clip(seed)
    actual, later = score_sequence(prediction, truth), score_sequence(prediction, truth, counting="vos-benchmark")
    for ours, theirs in ((actual.region, later.region), (actual.boundary, later.boundary)):
        np.testing.assert_array_equal(ours[later.numbers - 1], np.nan_to_num(theirs, nan=1.0))
    assert actual.numbers.tolist() == list(range(1, truth[0].max() + 1))


def test_the_clips_hold_every_case():
    """Empty masks on either side, on both, objects that appear, vanish and come back; scores from 0 to 1."""
    seen, values = set(), []
    for number in range(KNOWN):
        prediction, truth = clip(number)
        scores = score_sequence(prediction, truth)
        values += [*scores.region.ravel(), *scores.boundary.ravel()]
        for number in range(1, len(scores.region) + 1):
            true, predicted = ((masks == number).any((1, 2)) for masks in (truth, prediction))
            seen |= set(zip(true[1:-1].tolist(), predicted[1:-1].tolist(), strict=True))
            steps = np.diff(true.astype(int))
            seen |= {"appears"} if not true[0] and true.any() else set()
            seen |= {"vanishes"} if true[0] and not true[-1] else set()
            seen |= {"comes back"} if true[0] and (steps == -1).any() and (steps == 1).any() else set()
    assert seen == {(a, b) for a in (True, False) for b in (True, False)} | {"appears", "vanishes", "comes back"}
    assert min(values) == 0
    assert max(values) == 1
    assert len(set(values)) > 200
    assert sum(clip(number)[1].max() > clip(number)[1][0].max() for number in range(KNOWN, len(GOLDEN))) > 5


def test_the_package_itself_agrees_where_it_is_installed():
    evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator()
    rng = np.random.default_rng(1)
    truth = (rng.integers(0, 3, size=(4, 6, 11)).astype(np.uint8)).repeat(80, 1).repeat(80, 2)  # 480 x 880
    prediction = np.roll(truth, (5, 9), (1, 2))
    for predicted, true in zip(prediction[1:-1], truth[1:-1], strict=True):
        evaluator.feed_frame(predicted, true)
    region, boundary = evaluator.conclude()
    assert means(prediction, truth) == {number: [region[number], boundary[number]] for number in region}


def test_the_first_and_last_frames_do_not_count():
    prediction, truth = random_clip(3)
    expected = score_sequence(prediction, truth)
    assert expected.region.shape == expected.boundary.shape == (truth[0].max(), len(truth) - 2)
    spoiled = prediction.copy()
    spoiled[[0, -1]] = 77
    actual = score_sequence(spoiled, truth)
    np.testing.assert_array_equal(actual.region, expected.region)
    np.testing.assert_array_equal(actual.boundary, expected.boundary)


def test_objects_are_those_of_the_first_mask():
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 2:8, 2:8] = 2  # there is no object 1
    truth[1:, 12:18, 12:18] = 3  # comes later: davis2017-evaluation does not know it
    prediction = np.where(truth == 3, 0, truth)
    scores = score_sequence(prediction, truth)
    assert scores.region.shape == (2, 2)
    assert (scores.region == 1).all()
    assert (scores.boundary == 1).all()
    missing = score_sequence(np.zeros_like(truth), truth)
    assert missing.region.tolist() == missing.boundary.tolist() == [[1, 1], [0, 0]]


def test_means_are_over_objects_and_not_over_frames():
    short = ObjectScores(np.array([[1.0], [0.5]]), np.array([[0.5], [0.5]]), np.array([1, 2]))
    long = ObjectScores(np.array([[0.0, np.nan, 0.5]]), np.array([[0.0, np.nan, 0.0]]), np.array([1]))
    means = mean_scores([short, long])
    assert means.region == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert means.boundary == pytest.approx(1 / 3)
    assert means.both == pytest.approx((means.region + means.boundary) / 2)
    assert means.objects == 3
    with pytest.raises(ValueError, match="sequences: expected one or more"):
        mean_scores([])


def test_void_is_background_or_counts_for_nothing():
    truth = np.zeros((3, 40, 40), np.uint8)
    truth[:, 5:15, 5:15] = 1
    truth[:, 5:15, 15:25] = 255
    prediction = np.where(truth == 255, 1, truth)  # says that the void is the object's
    assert score_sequence(prediction, truth).region.item() == 0.5
    assert score_sequence(prediction, truth).boundary.item() < 0.8
    excluded = score_sequence(prediction, truth, "excluded")
    assert excluded.region.item() == 1
    assert excluded.boundary.item() == 1
    truth[truth == 255] = 0
    np.testing.assert_array_equal(score_sequence(prediction, truth).region, [[0.5]])


def test_reach_of_the_boundary_is_a_share_of_the_diagonal():
    """300 x 400 pixels have a diagonal of 500: 4 pixels are in reach, 5 are not."""
    truth = np.zeros((300, 400), bool)
    truth[:, :200] = True
    for shift, expected in ((0, 1), (4, 1), (5, 0)):
        moved = np.broadcast_to(np.arange(400) < 200 + shift, truth.shape)
        assert boundary_accuracy(moved, truth) == expected
    assert boundary_accuracy(truth, truth[:, ::-1]) == 1  # the same line from the other side
    assert region_similarity(truth, truth[:, ::-1]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((4, 9, 9), np.uint8)}, r"same \[T, H, W\], got \(4, 9, 9\) and \(4, 8, 9\)"),
        ({"frames": 2}, "2 frames, .* expected 3 or more"),
        ({"truth": np.zeros((4, 8, 9), np.uint8)}, "first true mask shows no object"),
        ({"prediction": np.full((4, 8, 9), 3, np.uint8)}, "prediction of frame 1 has object 3, there are 2"),
        ({"void": "ignored"}, "void: expected one of background, excluded, got 'ignored'"),
        ({"counting": "later"}, "counting: expected one of davis2017, vos-benchmark, got 'later'"),
        ({"truth": np.zeros((4, 8, 9), np.uint8), "counting": "vos-benchmark"}, "no true mask between the first and"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_error(change, message):
    truth = np.zeros((4, 8, 9), np.uint8)
    truth[:, 2:4], truth[:, 5:7] = 1, 2
    frames = change.pop("frames", 4)
    fields = {"prediction": truth, "truth": truth} | change
    fields |= {name: fields[name][:frames] for name in ("prediction", "truth")}
    with pytest.raises(ValueError, match=message):
        score_sequence(**fields)
