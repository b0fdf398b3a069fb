"""The losses of streaming geometry against VGGT's numbers (golden 07b), by hand, and under masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometry_cases import compiled
from goldens import load_golden, relative_error
from scipy.spatial.transform import Rotation

from omnistream_jax.losses.depth import depth_loss, vggt_depth_loss
from omnistream_jax.losses.geometry import (
    camera_loss,
    corner_normals,
    point_loss,
    ray_loss,
    vggt_camera_loss,
    vggt_point_loss,
)

TOLERANCE = 1e-4

# Compiled whole, as training does, and once for all tests of a shape; it is faster than operation by operation.
depth = compiled(depth_loss, static_argnames=("alpha", "gradient_scales"))
depth_to_confidence = compiled(jax.grad(depth_loss, argnums=1))
rays = compiled(ray_loss, static_argnames="alpha")
points_between = compiled(point_loss, static_argnames="norm")
cameras = compiled(camera_loss, static_argnames="weights")
cameras_to_prediction = compiled(jax.grad(camera_loss))


@pytest.fixture(scope="module")
def golden():
    return load_golden("07b_vggt_geometry_losses")


def total_and_pieces(loss):
    def function(*arguments):
        pieces = loss(*arguments)
        return pieces.total, pieces

    return function


def check_pieces(pieces, golden, case, kind):
    for name, value in zip(("conf", "reg", "grad"), pieces, strict=True):
        assert relative_error(value, golden.outputs[f"{case}/loss_{name}_{kind}"]) <= TOLERANCE, name


# --- VGGT's numbers


def depth_arrays(golden):
    inputs = golden.inputs
    return inputs["pred_depth"][..., 0], inputs["pred_depth_conf"], golden.outputs["norm/depths"], inputs["mask"]


def test_depth_agrees_with_vggt(golden):
    differentiate = compiled(jax.value_and_grad(total_and_pieces(vggt_depth_loss), argnums=(0, 1), has_aux=True))
    (_, pieces), (to_depth, to_confidence) = differentiate(*depth_arrays(golden))
    check_pieces(pieces, golden, "depth", "depth")
    assert relative_error(to_depth[..., None], golden.grads["depth_total/d_pred_depth"]) <= TOLERANCE
    assert relative_error(to_confidence, golden.grads["depth_total/d_pred_conf"]) <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "options"), [("depth_q98", {"valid_range": 0.98}), ("depth_gradconf", {"weigh_gradient": True})]
)
def test_the_options_of_depth_agree_with_vggt(golden, case, options):
    pieces = compiled(functools.partial(vggt_depth_loss, **options))(*depth_arrays(golden))
    check_pieces(pieces, golden, case, "depth")


def test_points_agree_with_vggt(golden):
    inputs, target = golden.inputs, golden.outputs["norm/world_points"]
    differentiate = compiled(jax.value_and_grad(total_and_pieces(vggt_point_loss), has_aux=True))
    (_, pieces), gradient = differentiate(inputs["pred_points"], inputs["pred_points_conf"], target, inputs["mask"])
    check_pieces(pieces, golden, "point_normal", "point")
    assert relative_error(gradient, golden.grads["point_normal_total/d_pred_points"]) <= TOLERANCE


def test_the_two_norm_of_points_agrees_with_vggt(golden):
    inputs = golden.inputs
    value = points_between(inputs["pred_points"], golden.outputs["norm/world_points"], inputs["mask"], norm="l2")
    assert relative_error(value, golden.outputs["point_normal/loss_reg_point"]) <= TOLERANCE


def camera_target(golden):
    """VGGT's pose encoding of the normalised cameras, by SciPy."""
    extrinsics, intrinsics = golden.outputs["norm/extrinsics"], golden.inputs["intrinsics"]
    quaternion = Rotation.from_matrix(extrinsics[..., :3].reshape(-1, 3, 3)).as_quat(canonical=True)
    quaternion = quaternion.reshape(*extrinsics.shape[:2], 4)
    height, width = golden.inputs["mask"].shape[2:]
    vertical = 2 * np.arctan(height / 2 / intrinsics[..., 1, 1])
    horizontal = 2 * np.arctan(width / 2 / intrinsics[..., 0, 0])
    parts = [extrinsics[..., 3], quaternion, vertical[..., None], horizontal[..., None]]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def test_cameras_agree_with_vggt(golden):
    target = camera_target(golden)
    predictions = [golden.inputs[f"pose_enc_list.{index}"] for index in range(2)]
    valid = np.broadcast_to(golden.inputs["mask"][:, :1].sum((2, 3)) > 100, target.shape[:2])
    differentiate = compiled(jax.value_and_grad(total_and_pieces(vggt_camera_loss), has_aux=True))
    (_, pieces), gradients = differentiate(predictions, target, valid)
    expected = {"translation": "T", "rotation": "R", "field": "FL", "total": "camera"}
    for name, theirs in expected.items():
        assert relative_error(getattr(pieces, name), golden.outputs[f"camera/loss_{theirs}"]) <= TOLERANCE, name
    for index, gradient in enumerate(gradients):
        assert relative_error(gradient, golden.grads[f"camera/d_pose{index}"]) <= TOLERANCE


# --- by hand


def maps(*rows):
    """One frame of one clip: [1, 1, H, W, ...]."""
    return np.array(rows, np.float32)[None, None]


# Residuals [[-0.5, 1], [0, 3]].
PREDICTION, TARGET, CONFIDENCE = maps([1, 2], [3, 5]), maps([1.5, 1], [3, 2]), maps([1, 2], [3, 4])


def test_depth_of_two_by_two_pixels():
    value = depth(PREDICTION, CONFIDENCE, TARGET, np.ones((1, 1, 2, 2), bool))
    errors = 1 * 0.5 + 2 * 1 + 3 * 0 + 4 * 3
    to_the_right = 1 * 1.5 + 3 * 3
    below = 1 * 0.5 + 2 * 2
    np.testing.assert_allclose(value, (errors + to_the_right + below - 0.2 * np.log(24)) / 4, rtol=1e-6)


def test_depth_of_three_valid_pixels_of_four():
    valid = maps([1, 1], [1, 0]).astype(bool)
    value = depth(PREDICTION, CONFIDENCE, TARGET, valid, alpha=0.5)
    np.testing.assert_allclose(value, (2.5 + 1.5 + 0.5 - 0.5 * np.log(6)) / 3, rtol=1e-6)


def test_depth_at_two_scales():
    columns = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 1, 4, 4))
    ones, valid = np.ones_like(columns), np.ones(columns.shape, bool)
    value = depth(columns, ones, 0 * columns, valid, gradient_scales=2)
    np.testing.assert_allclose(value, 1.5 + (12 / 16 + 4 / 4) / 2, rtol=1e-6)


@pytest.mark.parametrize("residual", [0.05, 0.4])
def test_the_best_confidence_is_alpha_over_the_residual(residual):
    shape = (1, 1, 2, 2)
    prediction, target, valid = np.full(shape, residual, np.float32), np.zeros(shape, np.float32), np.ones(shape, bool)
    best = np.full(shape, 0.2 / residual, np.float32)
    assert np.max(np.abs(depth_to_confidence(prediction, best, target, valid))) < 1e-6
    at_best, below, above = (depth(prediction, share * best, target, valid) for share in np.float32([1, 0.8, 1.2]))
    assert at_best < min(below, above)


def test_the_best_confidence_counts_the_differences_too():
    sums = maps([0.5 + 1.5 + 0.5, 1 + 2], [0 + 3, 3])
    gradient = depth_to_confidence(PREDICTION, np.float32(0.2) / sums, TARGET, np.ones((1, 1, 2, 2), bool))
    assert np.max(np.abs(gradient)) < 1e-6


def test_the_resolution_does_not_change_the_loss():
    @functools.partial(compiled, static_argnums=0)
    def losses(side):
        shape = (2, 3, side, side)
        valid = jnp.ones(shape, bool)
        depths = depth_loss(jnp.full(shape, 2.0), jnp.full(shape, 1.5), jnp.full(shape, 1.7), valid)
        directions = ray_loss(jnp.full((*shape, 6), 1.0), jnp.full((*shape, 6), 0.8), valid, valid)
        return depths, directions, point_loss(jnp.full((*shape, 3), 1.0), jnp.full((*shape, 3), 0.8), valid)

    np.testing.assert_allclose(losses(8), losses(4), rtol=1e-5)
    np.testing.assert_allclose(losses(4), [1.5 * 0.3 - 0.2 * np.log(1.5), 1.2, 0.6], rtol=1e-5)


def test_points_by_hand_in_both_norms():
    points = maps([[3, -4, 0], [9, 9, 9]], [[0, 0, 2], [0, 0, 0]])
    valid = maps([1, 0], [1, 1]).astype(bool)
    np.testing.assert_allclose(points_between(points, 0 * points, valid), (7 + 2) / 3, rtol=1e-6)
    np.testing.assert_allclose(points_between(points, 0 * points, valid, norm="l2"), (5 + 2) / 3, rtol=1e-6)


def test_equal_points_have_a_finite_gradient_in_the_two_norm():
    points, valid = np.ones((1, 1, 2, 2, 3), np.float32), np.ones((1, 1, 2, 2), bool)
    gradient = compiled(jax.grad(functools.partial(point_loss, norm="l2")))(points, points, valid)
    np.testing.assert_array_equal(gradient, 0)


def test_normals_of_a_plane_point_one_way_and_need_three_pixels():
    rows, columns = np.meshgrid(np.arange(3.0), np.arange(4.0), indexing="ij")
    points = np.stack([columns, rows, 2 * columns + 0 * rows], axis=-1).astype(np.float32)
    valid = np.ones((3, 4), bool)
    valid[0, 0] = False
    points[0, 0] = np.nan
    normals, corners = compiled(corner_normals)(points, valid)
    # Down x right of a camera that looks along z: the normal of z = 2 x that points at the camera.
    np.testing.assert_allclose(normals[corners], np.tile([2, 0, -1] / np.sqrt(5), (21, 1)), atol=1e-6)
    np.testing.assert_array_equal(corners[:, 0, 0], [False, False, False, True])
    assert corners.sum() == 4 * 6 - 3


# --- the parts of rays and cameras


def ray_arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 5, 6)).astype(np.float32), rng.normal(size=(2, 5, 6)).astype(np.float32)


@pytest.mark.parametrize(("origins", "directions"), [(True, True), (False, True), (True, False)])
def test_each_mask_of_rays_switches_its_part(origins, directions):
    prediction, target = ray_arrays()
    value = rays(prediction, target, np.full((2, 5), origins), np.full((2, 5), directions))
    errors = np.abs(prediction - target)
    expected = origins * errors[..., :3].sum(-1).mean() + directions * errors[..., 3:].sum(-1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_clip_of_unknown_scale_adds_its_directions_only():
    prediction, target = ray_arrays()
    has_origin = np.broadcast_to([[True], [False]], (2, 5))
    value = rays(prediction, target, has_origin, np.ones((2, 5), bool))
    errors = np.abs(prediction - target)
    np.testing.assert_allclose(value, errors[0, :, :3].sum(-1).mean() + errors[..., 3:].sum(-1).mean(), rtol=1e-6)


def test_confidence_of_rays_is_trained_where_it_is_given():
    prediction, target = ray_arrays()
    origins = np.broadcast_to([[True], [False]], (2, 5))
    directions = np.arange(10).reshape(2, 5) > 1
    confidence = np.linspace(0.5, 2, 10, dtype=np.float32).reshape(2, 5)
    arrays = prediction, target, origins, directions
    errors = np.abs(prediction - target)
    expected = (
        (confidence * errors[..., :3].sum(-1))[origins].mean()
        + (confidence * errors[..., 3:].sum(-1))[directions].mean()
        - 0.3 * np.log(confidence)[origins | directions].mean()
    )
    np.testing.assert_allclose(rays(*arrays, confidence, alpha=0.3), expected, rtol=1e-5)
    np.testing.assert_allclose(rays(*arrays, np.ones_like(confidence), alpha=0.3), rays(*arrays), rtol=1e-6)
    gradient = compiled(jax.grad(ray_loss, argnums=4))(*arrays, confidence)
    assert np.all(gradient[origins | directions] != 0)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_each_mask_of_cameras_switches_its_part(part):
    rng = np.random.default_rng(1)
    prediction, target = rng.normal(size=(2, 2, 3, 9)).astype(np.float32)
    parts = np.split(np.abs(prediction - target), [3, 7], axis=-1)
    means = np.array([errors.sum(-1).mean() for errors in parts])
    masks, weights = np.ones((3, 2, 3), bool), (1.0, 2.0, 0.5)
    np.testing.assert_allclose(cameras(prediction, target, *masks), means.sum(), rtol=1e-6)
    masks[part] = False
    expected = means @ np.delete(np.eye(3), part, axis=0).sum(0)
    np.testing.assert_allclose(cameras(prediction, target, *masks), expected, rtol=1e-6)
    weighted = (means * weights).sum() - means[part] * weights[part]
    np.testing.assert_allclose(cameras(prediction, target, *masks, weights=weights), weighted, rtol=1e-6)
    switched_off = np.split(cameras_to_prediction(prediction, target, *masks), [3, 7], axis=-1)
    assert [bool(np.any(values)) for values in switched_off] == [index != part for index in range(3)]


def test_vggt_clips_translations_and_the_last_round_weighs_most():
    target, valid = np.zeros((1, 2, 9), np.float32), np.ones((1, 2), bool)
    far = target + np.array([1e4] + [0] * 8, np.float32)
    loss = compiled(vggt_camera_loss)
    first, last = loss([far, target], target, valid), loss([target, far], target, valid)
    np.testing.assert_allclose(first.total, 0.6 * 100 / 3 / 2, rtol=1e-6)
    np.testing.assert_allclose(last.total, 100 / 3 / 2, rtol=1e-6)


# --- masks, for every loss: name -> (loss, channels of the prediction or None, axes of the mask)

SHAPE = (1, 2, 12, 12)
LOSSES = {
    "depth": (lambda p, c, t, m: depth_loss(p, c, t, m, gradient_scales=2), None, 4),
    "vggt_depth": (
        lambda p, c, t, m: vggt_depth_loss(p, c, t, m, gradient_scales=2, weigh_gradient=True, valid_range=0.9).total,
        None,
        4,
    ),
    "ray": (lambda p, c, t, m: ray_loss(p, t, m, m, c), 6, 4),
    "point_l1": (lambda p, c, t, m: point_loss(p, t, m), 3, 4),
    "point_l2": (lambda p, c, t, m: point_loss(p, t, m, norm="l2"), 3, 4),
    "vggt_point": (lambda p, c, t, m: vggt_point_loss(p, c, t, m, normal_scales=1).total, 3, 4),
    "camera": (lambda p, c, t, m: camera_loss(p, t, m, m, m), 9, 2),
    "vggt_camera": (lambda p, c, t, m: vggt_camera_loss([p], t, m).total, 9, 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_lies_outside_a_mask_has_no_influence(name):
    loss, width, axes = LOSSES[name]
    cells = SHAPE[-2:] if axes == 2 else SHAPE
    shape = cells if width is None else (*cells, width)
    rng = np.random.default_rng(2)
    prediction, target = rng.normal(size=(2, *shape)).astype(np.float32)
    confidence = rng.uniform(1, 2, cells).astype(np.float32)
    valid = rng.uniform(size=cells) < 0.7
    confidence[~valid] = 1  # VGGT's weighted differences count log c outside the mask as well
    differentiate = compiled(jax.value_and_grad(loss, argnums=(0, 1)))
    clean, clean_gradients = differentiate(prediction, confidence, target, valid)
    assert clean != 0
    assert np.any(clean_gradients[0])

    outside = valid.reshape(valid.shape + (1,) * (prediction.ndim - valid.ndim))
    for bad in (np.nan, np.inf):
        arrays = [np.where(outside, array, bad).astype(np.float32) for array in (prediction, target)]
        bad_confidence = np.where(valid, confidence, bad).astype(np.float32)
        value, (to_prediction, to_confidence) = differentiate(arrays[0], bad_confidence, arrays[1], valid)
        np.testing.assert_allclose(value, clean, rtol=1e-6)
        np.testing.assert_allclose(to_prediction, clean_gradients[0], rtol=1e-6, atol=1e-9)
        assert np.all(np.isfinite(to_confidence))
        np.testing.assert_array_equal(to_prediction[~valid], 0)

        value, gradients = differentiate(arrays[0], bad_confidence, arrays[1], np.zeros_like(valid))
        assert value == 0
        assert value.dtype == jnp.float32
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


def test_a_prediction_that_is_nan_where_it_counts_is_not_hidden():
    assert jnp.isnan(depth(np.nan * PREDICTION, CONFIDENCE, TARGET, np.ones((1, 1, 2, 2), bool)))


def test_vggt_skips_a_batch_with_too_few_pixels():
    valid = np.arange(288).reshape(SHAPE) < 99
    ones = np.ones(SHAPE, np.float32)
    loss = compiled(functools.partial(vggt_depth_loss, gradient_scales=1))
    assert loss(ones, ones, 0 * ones, valid).total == 0
    assert loss(ones, ones, 0 * ones, valid, minimum_valid=99).total > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth_loss(PREDICTION[0], CONFIDENCE, TARGET, PREDICTION > 0), r"prediction: expected \[B, T, H, W\]"),
        (lambda: depth_loss(PREDICTION, CONFIDENCE, TARGET[..., :1], PREDICTION > 0), "target: expected shape"),
        (lambda: depth_loss(PREDICTION, CONFIDENCE, TARGET, PREDICTION), "valid: expected a bool mask"),
        (lambda: depth_loss(PREDICTION, CONFIDENCE, TARGET, PREDICTION > 0, gradient_scales=0), "gradient scales"),
        (lambda: vggt_depth_loss(PREDICTION, CONFIDENCE, TARGET, PREDICTION > 0, valid_range=98), "valid_range"),
        (lambda: ray_loss(*np.ones((2, 4, 6)), np.ones(4, bool), np.ones(3, bool)), "valid_direction: expected shape"),
        (lambda: point_loss(*np.ones((2, 1, 1, 2, 2, 3)), np.ones((1, 1, 2, 2), bool), norm="L2"), "norm: expected"),
        (lambda: camera_loss(*np.ones((2, 1, 2, 7)), *np.ones((3, 1, 2), bool)), r"prediction: expected \[..., 9\]"),
        (lambda: vggt_camera_loss([], np.ones((1, 2, 9)), np.ones((1, 2), bool)), "predictions: expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
