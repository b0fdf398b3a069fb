"""The normalisation of a clip against VGGT's (golden 07b) and its mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometry_cases import check_gradients, compiled
from goldens import load_golden, relative_error
from scipy.spatial.transform import Rotation

from omnistream_jax.geometry.cameras import invert_pose, to_first_frame, transform_points
from omnistream_jax.geometry.normalize import clip_scale, normalize_clip, scale_translations

TOLERANCE = 1e-5

normalize = compiled(normalize_clip)


@pytest.fixture(scope="module")
def golden():
    return load_golden("07b_vggt_geometry_losses")


def clips(seed: int = 0) -> tuple[np.ndarray, ...]:
    """depth, valid, cam_to_world and intrinsics of 2 clips of 3 frames of 4 x 5 pixels, in float64."""
    rng = np.random.default_rng(seed)
    pose = np.tile(np.eye(4), (2, 3, 1, 1))
    pose[..., :3, :3] = Rotation.random(6, random_state=seed).as_matrix().reshape(2, 3, 3, 3)
    pose[..., :3, 3] = rng.normal(size=(2, 3, 3))
    intrinsics = np.tile([[4, 0, 2.2], [0, 5, 1.9], [0, 0, 1]], (2, 3, 1, 1))
    return rng.uniform(1, 5, (2, 3, 4, 5)), rng.random((2, 3, 4, 5)) < 0.7, pose, intrinsics


def test_one_pixel_that_looks_straight_ahead():
    """At 3, from a camera that then steps back by 1: the mean is of 3 and 2, and the third frame sees nothing."""
    depth, valid, pose, intrinsics = clips()
    depth[:], valid[:], pose[:] = 3, False, np.eye(4)
    valid[:, :2, 0, 0], pose[:, 1, 2, 3], intrinsics[..., :2, 2] = True, -1, 0.5
    clip = normalize(depth, valid, pose, intrinsics)
    np.testing.assert_allclose(clip.scale, [2.49875, 2.49875], rtol=1e-5)
    np.testing.assert_allclose(clip.points[0, :, 0, 0, 2], np.array([3, 2, 0]) / 2.49875, rtol=1e-5)
    np.testing.assert_allclose(clip.cam_to_world[0, :, 2, 3], np.array([0, -1, 0]) / 2.49875, rtol=1e-5)


def test_the_normalised_batch_agrees_with_vggt(golden):
    """Golden 07b gives points of its own, which are not those of its depths."""

    @compiled
    def run(extrinsics, world_points, cam_points, depths, valid):
        bottom = jnp.broadcast_to(jnp.array([0.0, 0, 0, 1]), (*extrinsics.shape[:2], 1, 4))
        world_to_cam = jnp.concatenate([extrinsics, bottom], axis=-2)
        poses = to_first_frame(invert_pose(world_to_cam))
        points = transform_points(world_to_cam[:, 0], world_points)
        scale = clip_scale(points, valid)
        wide = scale[:, None, None, None, None]
        return {
            "noscale/extrinsics": invert_pose(poses)[..., :3, :],
            "noscale/world_points": points,
            "norm/extrinsics": invert_pose(scale_translations(poses, scale[:, None]))[..., :3, :],
            "norm/world_points": points / wide,
            "norm/cam_points": cam_points / wide,
            "norm/depths": depths / wide[..., 0],
        }

    names = ("extrinsics", "world_points", "cam_points", "depths", "mask")
    found = run(*(golden.inputs[name] for name in names))
    errors = {name: relative_error(value, golden.outputs[name]) for name, value in found.items()}
    assert max(errors.values()) <= TOLERANCE, errors


def test_a_clip_agrees_with_the_same_in_numpy():
    depth, valid, pose, intrinsics = clips()
    u, v = np.meshgrid(np.arange(5) + 0.5, np.arange(4) + 0.5)
    rays = np.einsum("btij,hwj->bthwi", np.linalg.inv(intrinsics), np.stack([u, v, np.ones_like(u)], axis=-1))
    first = np.linalg.inv(pose[:, :1]) @ pose
    points = np.einsum("btij,bthwj->bthwi", first[..., :3, :3], rays * depth[..., None])
    points += first[..., None, None, :3, 3]
    distance = np.linalg.norm(points, axis=-1)
    scale = np.array([distance[b][valid[b]].sum() / (valid[b].sum() + 1e-3) for b in range(2)])
    clip = normalize(depth, valid, pose, intrinsics)
    assert clip.points.dtype == jnp.float32
    assert relative_error(clip.scale, scale) <= TOLERANCE
    wide = scale[:, None, None, None]
    assert relative_error(clip.depth, np.where(valid, depth / wide, 0)) <= TOLERANCE
    assert relative_error(clip.points, np.where(valid[..., None], points / wide[..., None], 0)) <= TOLERANCE
    first[..., :3, 3] /= wide[..., 0]
    assert relative_error(clip.cam_to_world, first) <= TOLERANCE


def test_units_and_the_world_do_not_matter():
    depth, valid, pose, intrinsics = clips()
    moved = np.linalg.inv(pose[0, 1]) @ pose
    moved[..., :3, 3] *= 100
    one, other = normalize(depth, valid, pose, intrinsics), normalize(depth * 100, valid, moved, intrinsics)
    assert relative_error(other.scale, 100 * np.asarray(one.scale)) <= TOLERANCE
    for name in ("depth", "points", "cam_to_world"):
        assert relative_error(getattr(other, name), np.asarray(getattr(one, name))) <= TOLERANCE


def test_a_clip_without_poses_is_measured_in_its_own_cameras():
    """Whatever stands in its poses; the clip beside it is as before. Depths may be those of other pixels' places."""
    depth, valid, pose, intrinsics = clips()
    expected = normalize(depth, valid, pose, intrinsics)
    own = normalize(depth, valid, np.tile(np.eye(4), (2, 3, 1, 1)), intrinsics)
    pose[1] = np.nan
    whole_numbers = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0)), axis=-1)
    intrinsics[..., :2, 2] -= 0.5
    clip = normalize(depth, valid, pose, intrinsics, has_pose=np.array([True, False]), pixels=whole_numbers)
    for name in ("depth", "points", "cam_to_world", "scale"):
        np.testing.assert_allclose(getattr(clip, name)[0], getattr(expected, name)[0], atol=1e-6)
        np.testing.assert_allclose(getattr(clip, name)[1], getattr(own, name)[1], atol=1e-6)
    np.testing.assert_array_equal(clip.cam_to_world[1], np.tile(np.eye(4), (3, 1, 1)))


@pytest.mark.parametrize("filler", [np.nan, np.inf])
def test_what_is_not_valid_has_no_effect(filler):
    depth, valid, pose, intrinsics = clips()
    clean = normalize(np.where(valid, depth, 0), valid, pose, intrinsics)
    dirty = normalize(np.where(valid, depth, filler), valid, pose, intrinsics)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.isfinite(leaf).all() for leaf in clean)


def test_the_scale_stays_within_its_bounds():
    points, valid = np.zeros((3, 1, 2, 2, 3), np.float32), np.ones((3, 1, 2, 2), bool)
    points[1], valid[2] = 1e9, False

    def total(points):
        scale = clip_scale(points, valid)
        return scale.sum(), scale

    (_, scale), gradient = compiled(jax.value_and_grad(total, has_aux=True))(points)
    np.testing.assert_allclose(scale, [1e-6, 1e6, 1e-6], rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_gradients_agree_with_finite_differences_beside_nan():
    """NaN where depth is not valid, and in the poses of the clip that has none."""
    depth, valid, pose, intrinsics = clips()
    depth[~valid], pose[1] = np.nan, np.nan
    has_pose = np.array([True, False])

    def outputs(depth, pose, intrinsics):
        return tuple(normalize_clip(depth, valid, pose, intrinsics, has_pose=has_pose))

    of_depth, of_pose, _ = check_gradients(outputs, depth, pose, intrinsics)
    assert np.all(of_depth[~valid] == 0)
    assert np.all(of_depth[valid] != 0)
    assert np.all(of_pose[1] == 0)


def test_shapes_that_do_not_fit_are_errors():
    depth, valid, pose, intrinsics = clips()
    with pytest.raises(ValueError, match=r"cam_to_world: expected shape \[2, 3, 4, 4\] beside this depth"):
        normalize_clip(depth, valid, pose[:, :2], intrinsics)
    with pytest.raises(ValueError, match=r"depth: expected shape \[B, T, H, W\], got \[3, 4, 5\]"):
        normalize_clip(depth[0], valid, pose, intrinsics)
    with pytest.raises(ValueError, match="points and valid: expected shapes"):
        clip_scale(depth, valid)
