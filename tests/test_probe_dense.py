"""The dense probes' pieces against PyTorch and torchmetrics (tests/data/make_dense_probe.py) and scikit-learn."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import relative_error
from mesh_cases import run_program
from safetensors.numpy import load_file
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score, mean_squared_error

from omnistream_jax.data.probes.ade20k import resize_nearest
from omnistream_jax.evals.image_depth_metrics import eigen_crop, image_depth_metrics, mean_of_images
from omnistream_jax.evals.probes.ade20k import predicted_labels, upsampled_cross_entropy
from omnistream_jax.evals.probes.dense_plots import (
    DepthExample,
    SegmentationExample,
    class_colours,
    plot_depth,
    plot_segmentation,
)
from omnistream_jax.evals.probes.windows import plan_windows
from omnistream_jax.evals.segmentation_metrics import confusion_matrix, segmentation_metrics
from omnistream_jax.losses.sig import grouped_sig_loss, sig_loss
from omnistream_jax.models.probes import (
    BatchNorm,
    LinearClassifier,
    LinearDepth,
    LinearSegmentation,
    pad_to_patches,
    resize_bilinear,
)

GOLDEN = load_file(Path(__file__).parent / "data" / "dense_probe.safetensors")
LIMITS = {"min_depth": 0.001, "max_depth": 10.0}


def golden_variables(prefix):
    params = {}
    for name in ("norm.scale", "norm.bias", "linear.kernel", "linear.bias"):
        module, leaf = name.split(".")
        params.setdefault(module, {})[leaf] = jnp.asarray(GOLDEN[f"{prefix}/{name}"], jnp.float32)
    width = len(params["norm"]["scale"])
    statistics = {"norm": {"mean": jnp.zeros(width), "variance": jnp.ones(width)}}
    return {"params": params, "batch_stats": statistics}


def trained(head, prefix, loss_of):
    """The loss, the gradients and the new statistics of one step in training."""
    variables, features = golden_variables(prefix), jnp.asarray(GOLDEN[f"{prefix}/features"], jnp.float32)[:, None]

    def loss(params):
        maps, updated = head.apply(
            {**variables, "params": params},
            features,
            True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return loss_of(maps), (maps, updated["batch_stats"]["norm"])

    (value, (maps, statistics)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    for name in ("norm.scale", "norm.bias", "linear.kernel", "linear.bias"):
        module, leaf = name.split(".")
        assert relative_error(gradients[module][leaf], GOLDEN[f"{prefix}/grad/{name}"]) < 1e-5, name
    assert relative_error(statistics["mean"], GOLDEN[f"{prefix}/running_mean"]) < 1e-6
    assert relative_error(statistics["variance"], GOLDEN[f"{prefix}/running_variance"]) < 1e-6
    return float(value), np.asarray(maps)


def test_the_depth_head_its_loss_and_its_gradients_are_pytorchs():
    target = jnp.asarray(GOLDEN["depth/target"], jnp.float32)[:, None]

    def loss_of(maps):
        return grouped_sig_loss(resize_bilinear(maps, 13, 17), target, target > 0, 2)

    loss, maps = trained(LinearDepth(8, **LIMITS), "depth", loss_of)
    assert relative_error(maps[:, 0], GOLDEN["depth/maps"]) < 1e-6
    assert relative_error(resize_bilinear(jnp.asarray(maps), 13, 17)[:, 0], GOLDEN["depth/large"]) < 1e-6
    assert loss == pytest.approx(float(GOLDEN["depth/loss"]), rel=1e-5)
    large = jnp.asarray(GOLDEN["depth/large"], jnp.float32)[:, None]
    early = grouped_sig_loss(large, target, target > 0, 2, with_variance=jnp.asarray(False))
    assert float(early) == pytest.approx(float(GOLDEN["depth/loss_without_variance"]), rel=1e-5)


@pytest.mark.parametrize("mean", ["all", "labelled"])
def test_the_segmentation_head_its_loss_and_its_gradients_are_pytorchs(mean):
    labels = jnp.asarray(GOLDEN["segmentation/labels"].astype(np.uint8))[:, None]
    expected = GOLDEN["segmentation/loss" + ("" if mean == "all" else "_labelled")]
    share = float(np.mean(GOLDEN["segmentation/labels"] != 255)) if mean == "labelled" else 1.0

    def loss_of(maps):  # scaled so that both have the golden's gradient
        return upsampled_cross_entropy(maps, labels, mean) * share

    loss, _ = trained(LinearSegmentation(5, dropout=0.0), "segmentation", loss_of)
    assert loss / share == pytest.approx(float(expected), rel=1e-5)


def test_sig_loss_is_the_formula_in_float64_and_takes_no_heed_of_what_is_not_valid():
    generator = np.random.default_rng(0)
    prediction, target = generator.uniform(0.5, 9, (3, 50)), generator.uniform(0.5, 9, (3, 50))
    valid = generator.random((3, 50)) < 0.7
    g = np.log(prediction[valid] + 1e-3) - np.log(target[valid] + 1e-3)
    expected = math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    target[~valid], prediction[~valid] = np.nan, -5.0
    value, gradient = jax.value_and_grad(sig_loss)(jnp.asarray(prediction), jnp.asarray(target), jnp.asarray(valid))
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~valid] == 0).all()
    assert (np.asarray(gradient)[valid] != 0).all()


def test_sig_loss_of_a_perfect_prediction_or_of_nothing_is_zero_with_gradient_zero():
    depth, nothing = jnp.full((4,), 2.0), jnp.zeros((4,), bool)
    for valid in (~nothing, nothing):
        value, gradient = jax.value_and_grad(sig_loss)(depth, depth, valid)
        assert float(value) == 0
        assert (np.asarray(gradient) == 0).all()
    pair = jnp.stack([depth, 2 * depth])
    counted = grouped_sig_loss(pair, jnp.ones((2, 4)), jnp.stack([~nothing, nothing]), 1)
    assert float(counted) == pytest.approx(float(sig_loss(depth, jnp.ones(4), ~nothing)))  # not half of it


def test_sig_loss_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="one shape"):
        sig_loss(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="bool mask"):
        sig_loss(jnp.ones(3), jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="divisor of the batch of 3"):
        grouped_sig_loss(jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones((3, 2), bool), 2)


def test_batch_norm_in_evaluation_uses_the_running_statistics():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (5, 4, 6)), jnp.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    assert (np.asarray(variables["batch_stats"]["mean"]) == 0).all()  # making it is no step
    out = norm.apply(variables, x, False)
    np.testing.assert_allclose(out, x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_heads_begin_small():
    classifier = LinearClassifier(300).init(jax.random.key(0), jnp.zeros((1, 200)))["params"]["linear"]
    depth = LinearDepth(256, **LIMITS).init(jax.random.key(0), jnp.zeros((1, 1, 2, 2, 200)), False)["params"]["linear"]
    head = LinearSegmentation(150, dropout=0.1)
    segmentation = head.init(jax.random.key(0), jnp.zeros((1, 1, 2, 2, 200)), False)["params"]["linear"]
    for params, outputs in ((classifier, 300), (depth, 256), (segmentation, 150)):
        assert params["kernel"].shape == (200, outputs)
        assert float(jnp.std(params["kernel"])) == pytest.approx(0.01, rel=0.03)
        assert (np.asarray(params["bias"]) == 0).all()


def test_dropout_takes_whole_channels_of_an_image():
    head, patches = LinearSegmentation(4, dropout=0.5), jnp.ones((3, 1, 2, 2, 16))
    variables = head.init(jax.random.key(0), patches, False)
    dropped = head.apply(
        variables,
        patches,
        True,
        rngs={"dropout": jax.random.key(1)},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: type(module).__name__ == "Dropout",
    )[1]["intermediates"]["Dropout_0"]["__call__"][0]
    dropped = np.asarray(dropped)
    assert (dropped == dropped[:, :, :1, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert not (dropped[0] == dropped[1]).all()


def test_padding_to_patches_is_central_and_larger_behind():
    padded = np.asarray(pad_to_patches(jnp.ones((1, 1, 13, 16, 3)), 16))
    assert padded.shape == (1, 1, 16, 16, 3)
    assert (padded[0, 0, :, 0, 0] == [0] + [1] * 13 + [0, 0]).all()


# Metrics


def test_the_eigen_crop_is_the_published_one_and_scales():
    assert eigen_crop(480, 640) == (slice(45, 471), slice(41, 601))
    assert eigen_crop(240, 320) == (slice(22, 235), slice(20, 300))


def scores_by_hand(prediction, target, rows, columns):
    pairs = []
    for y in range(*rows):
        for x in range(*columns):
            g = float(target[y, x])
            if 0.001 < g < 10:
                pairs.append((min(max(float(prediction[y, x]), 0.001), 10.0), g))
    count = len(pairs)
    return {
        "rmse": math.sqrt(sum((p - g) ** 2 for p, g in pairs) / count),
        "abs_rel": sum(abs(p - g) / g for p, g in pairs) / count,
        "a1": sum(max(p / g, g / p) < 1.25 for p, g in pairs) / count,
    }


def test_image_depth_metrics_are_those_of_plain_loops():
    generator = np.random.default_rng(0)
    target = generator.uniform(-1, 12, (48, 64)).astype(np.float32).clip(0)  # some unknown, some beyond 10 m
    prediction = (target * generator.lognormal(0, 0.3, target.shape) - 0.1).astype(np.float32)
    for crop, rows, columns in (("eigen", (4, 47), (4, 60)), ("none", (0, 48), (0, 64))):
        expected = scores_by_hand(prediction, target, rows, columns)
        result = image_depth_metrics(prediction, target, crop=crop, **LIMITS)
        for name, value in expected.items():
            assert getattr(result, name) == pytest.approx(value, rel=1e-12), (crop, name)
    valid = (target > 0.001) & (target < 10)
    error = mean_squared_error(target[valid], prediction[valid].clip(0.001, 10)) ** 0.5
    assert result.rmse == pytest.approx(error, rel=1e-6)


def test_the_mean_is_that_of_images_and_not_of_pixels():
    small = image_depth_metrics(np.full((1, 2), 3.0), np.full((1, 2), 2.0), crop="none", **LIMITS)
    large = image_depth_metrics(np.full((10, 20), 5.0), np.full((10, 20), 2.0), crop="none", **LIMITS)
    none = image_depth_metrics(np.ones((3, 3)), np.zeros((3, 3)), crop="none", **LIMITS)
    assert none is None
    assert mean_of_images([small, large, none]).rmse == pytest.approx((1 + 3) / 2)
    with pytest.raises(ValueError, match="at least one with a valid pixel"):
        mean_of_images([none])


def test_depth_metrics_refuse_what_cannot_be_scored():
    with pytest.raises(ValueError, match="finite"):
        image_depth_metrics(np.full((2, 2), np.nan), np.ones((2, 2)), crop="none", **LIMITS)
    with pytest.raises(ValueError, match="one shape"):
        image_depth_metrics(np.ones((2, 3)), np.ones((2, 2)), crop="none", **LIMITS)
    with pytest.raises(ValueError, match="eigen or none"):
        image_depth_metrics(np.ones((2, 2)), np.ones((2, 2)), crop="garg", **LIMITS)


def test_miou_is_torchmetrics_and_the_confusion_is_scikit_learns():
    prediction, target = GOLDEN["miou/prediction"], GOLDEN["miou/target"]
    confusion = sum(confusion_matrix(one, truth, 7) for one, truth in zip(prediction, target, strict=True))
    labelled = target != 255
    np.testing.assert_array_equal(confusion, sklearn_confusion(target[labelled], prediction[labelled], labels=range(7)))
    metrics = segmentation_metrics(confusion)
    assert metrics.miou == pytest.approx(float(GOLDEN["miou/value"]), rel=1e-6)  # torchmetrics' own is float32
    present = [0, 1, 2, 4, 6]
    assert np.isnan(metrics.ious[5])
    assert metrics.ious[3] == metrics.ious[6] == 0
    by_class = jaccard_score(target[labelled], prediction[labelled], labels=present, average=None, zero_division=0)
    np.testing.assert_allclose(metrics.ious[present], by_class)
    assert metrics.pixel_accuracy == pytest.approx(np.mean(prediction[labelled] == target[labelled]))


def test_perfect_labels_score_one_and_permuted_ones_the_chance():
    target = np.random.default_rng(0).integers(0, 10, (50, 200))
    perfect = segmentation_metrics(confusion_matrix(target, target, 10))
    assert perfect.miou == perfect.pixel_accuracy == perfect.mean_accuracy == 1
    permuted = np.random.default_rng(1).permutation(target.ravel()).reshape(target.shape)
    metrics = segmentation_metrics(confusion_matrix(permuted, target, 10))
    assert metrics.pixel_accuracy == pytest.approx(0.1, abs=0.01)
    assert metrics.miou == pytest.approx(0.1 / 1.9, abs=0.01)


def test_confusion_refuses_numbers_that_are_no_class():
    for prediction, target, name in (([3], [0], "prediction"), ([0], [3], "target")):
        with pytest.raises(ValueError, match=f"{name}: expected classes 0 to 2"):
            confusion_matrix(np.array(prediction), np.array(target), 3)
    with pytest.raises(ValueError, match="expected labelled pixels"):
        segmentation_metrics(confusion_matrix(np.array([0]), np.array([255]), 3))


# The sliding window


@pytest.mark.parametrize(
    ("side", "starts"),
    [
        (512, (0,)),
        (513, (0, 1)),
        (683, (0, 171)),
        (853, (0, 341)),
        (854, (0, 341, 342)),
        (2048, (0, 341, 682, 1023, 1364, 1536)),
    ],
)
def test_windows_of_512_at_every_341(side, starts):
    plan = plan_windows(512, side, 512, 341)
    assert (plan.rows, plan.columns) == ((0,), starts)
    assert len(list(plan.places())) == plan.count == len(starts)
    covered = np.zeros((512, side))
    for place in plan.places():
        assert covered[place].shape == (512, 512)
        covered[place] += 1
    assert covered.min() >= 1
    with pytest.raises(ValueError, match="at most the picture's 511"):
        plan_windows(600, 511, 512, 341)


def test_labels_from_windows_are_those_of_summed_and_divided_logits():
    plan = plan_windows(16, 38, 16, 10)
    assert plan.columns == (0, 10, 20, 22)
    logits = GOLDEN["sliding/logits"].astype(np.float32)
    rows, columns = plan.row_matrix(4, 29), plan.column_matrix(4, 57)
    large = np.einsum("yh,xnw,nhwc->yxc", rows, columns.reshape(57, 4, 4), logits)
    np.testing.assert_allclose(large, GOLDEN["sliding/large"], atol=1e-5)
    heads = np.stack([logits, -logits], axis=1)
    labels = predicted_labels(heads, plan, 29, 57)
    np.testing.assert_array_equal(labels[0], GOLDEN["sliding/labels"])
    np.testing.assert_array_equal(labels[1], GOLDEN["sliding/large"].argmin(-1))


def test_windows_in_rows_and_columns_find_their_places():
    plan = plan_windows(12, 20, 8, 6)
    assert (plan.rows, plan.columns) == ((0, 4), (0, 6, 12))
    truth = np.random.default_rng(0).integers(0, 9, (12, 20))
    windows = np.stack([np.eye(9)[truth[place]] for place in plan.places()])[:, None]  # a cell a pixel
    np.testing.assert_array_equal(predicted_labels(windows.astype(np.float32), plan, 12, 20)[0], truth)


@pytest.mark.parametrize("size", [(5, 13), (15, 22), (7, 4)])
def test_labels_are_resized_as_pytorch_does(size):
    labels = GOLDEN["nearest/labels"].astype(np.uint8)
    np.testing.assert_array_equal(resize_nearest(labels, *size), GOLDEN[f"nearest/{size[0]}x{size[1]}"])


# Meshes


ON_A_MESH = """
import mesh_cases
import sys
import numpy as np, jax, jax.numpy as jnp
from omnistream_jax.models.probes import BatchNorm
from omnistream_jax.sharding import make_mesh, global_batch
x = np.random.default_rng(0).normal(3, 2, (4, 1, 2, 2, 5)).astype(np.float32)
x *= np.arange(1, 5)[:, None, None, None, None]
norm = BatchNorm()
variables = norm.init(jax.random.key(0), x, True)
run = jax.jit(lambda x: norm.apply(variables, x, True, mutable=["batch_stats"]))
mesh = make_mesh(data=2)
with jax.set_mesh(mesh):
    batch = global_batch({"x": x}, mesh)["x"]
    assert len(batch.sharding.device_set) == 2 and batch.addressable_shards[0].data.shape[0] == 2
    split, statistics = run(batch)
whole, expected = run(x)
np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(whole.mean((0, 1, 2, 3)), 0, atol=1e-5)
np.testing.assert_allclose(statistics["batch_stats"]["variance"], expected["batch_stats"]["variance"], rtol=1e-5)
from pathlib import Path
from dense_probe_cases import PIXELS, colour_head, recipe, see_pixels, write_ade
from omnistream_jax.evals.probes import ade20k
sizes = {"size": 32, "window": 32, "stride": 21, "augmentation__crop": 32}
protocol = ade20k.build(recipe("ade20k", data=str(write_ade(Path(sys.argv[1]))), evaluate_batch=3, **sizes), PIXELS)
with jax.set_mesh(mesh):
    samples = [protocol.validation().sample(i) for i in range(3)]
    score = protocol.evaluate(see_pixels, colour_head(), samples).scores[0]
assert score["miou"] == 1.0, score
print("same")
"""


def test_batch_statistics_are_those_of_the_global_batch_on_two_devices_and_windows_are_split(tmp_path):
    assert run_program(ON_A_MESH, 2, str(tmp_path)).strip() == "same"


def test_the_plots_are_drawn(tmp_path):
    generator = np.random.default_rng(0)
    frame, depth = generator.integers(0, 256, (8, 12, 3), np.uint8), generator.uniform(0, 5, (8, 12))
    unknown = DepthExample(frame, np.zeros((8, 12)), depth)
    plot_depth([DepthExample(frame, depth, depth + 0.1), unknown], "depth", tmp_path / "depth.png")
    labels = generator.integers(0, 256, (16, 24)).astype(np.uint8)
    plot_segmentation([SegmentationExample(frame, labels, labels)], 150, "labels", tmp_path / "labels.png")
    assert min((tmp_path / f"{name}.png").stat().st_size for name in ("depth", "labels")) > 5_000
    assert len(np.unique(class_colours(150)[:150], axis=0)) == 150
