"""Poses, fields of view, camera vectors, pixels and points against VGGT's (golden 07a) and their mathematics."""

import jax
import numpy as np
import pytest
from geometry_cases import check_gradients, compiled
from goldens import load_golden, relative_error
from scipy.spatial.transform import Rotation

from omnistream_jax.geometry.cameras import (
    compose_pose,
    decode_camera,
    encode_camera,
    fields_of_view,
    invert_pose,
    pixel_centres,
    to_first_frame,
    transform_points,
    unproject,
)

TOLERANCE = 1e-5
HEIGHT, WIDTH = 24, 40

invert, first_frame, move, lift = map(compiled, (invert_pose, to_first_frame, transform_points, unproject))
encode, decode = (
    compiled(function, static_argnames=("height", "width", "convention")) for function in (encode_camera, decode_camera)
)


@pytest.fixture(scope="module")
def golden():
    return load_golden("07a_vggt_pose_encoding")


def poses(*batch: int, seed: int = 0) -> np.ndarray:
    """Random float64 [*batch, 4, 4]."""
    count = int(np.prod(batch))
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    pose[:, :3, 3] = np.random.default_rng(seed).normal(size=(count, 3))
    return pose.reshape(*batch, 4, 4)


def square(extrinsics: np.ndarray) -> np.ndarray:
    """[..., 3, 4] -> [..., 4, 4]."""
    bottom = np.broadcast_to(np.array([0, 0, 0, 1], extrinsics.dtype), (*extrinsics.shape[:-2], 1, 4))
    return np.concatenate([extrinsics, bottom], axis=-2)


def test_numbers_worked_out_by_hand():
    """A focal length of half the height sees 90 degrees; the pixel in the corner looks up and to the left."""
    intrinsics = np.array([[12, 0, 20], [0, 12, 12], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(fields_of_view(intrinsics, 24, 40), [np.pi / 2, 2 * np.arctan(5 / 3)], atol=1e-6)
    points = lift(np.full((24, 40), 6, np.float32), intrinsics)
    np.testing.assert_allclose(points[0, 0], [-9.75, -5.75, 6], atol=1e-5)
    np.testing.assert_allclose(points[23, 39], [9.75, 5.75, 6], atol=1e-5)


def test_camera_vectors_agree_with_vggt(golden):
    height, width = golden.config["image_hw"]
    cam_to_world, intrinsics = invert(square(golden.inputs["extrinsics"])), golden.inputs["intrinsics"]
    encoding = encode(cam_to_world, intrinsics, height, width, "world_to_cam")
    assert relative_error(encoding, golden.outputs["pose_enc"]) <= TOLERANCE
    cam_to_world, intrinsics = decode(golden.outputs["pose_enc"], height, width, "world_to_cam")
    extrinsics = invert(cam_to_world)[..., :3, :]
    assert relative_error(extrinsics, golden.outputs["extrinsics_back"]) <= TOLERANCE
    assert relative_error(intrinsics, golden.outputs["intrinsics_back"]) <= TOLERANCE


def test_inverses_and_points_agree_with_vggt(golden):
    """VGGT's pixels are at whole numbers."""
    cam_to_world = invert(square(golden.inputs["extrinsics"]))[0]
    assert relative_error(cam_to_world, golden.outputs["se3_inverse"]) <= TOLERANCE
    pixels = pixel_centres(*golden.config["image_hw"]) - 0.5
    points = lift(golden.inputs["depth"], golden.inputs["intrinsics"][0], pixels)
    assert relative_error(move(cam_to_world, points), golden.outputs["world_points"]) <= TOLERANCE


@pytest.mark.parametrize("convention", ["cam_to_world", "world_to_cam"])
def test_a_camera_vector_decodes_to_its_camera(convention):
    """Whatever the length of its quaternion."""
    pose, fields = poses(2, 4), np.random.default_rng(0).uniform(0.3, 2.5, (2, 4, 2)).astype(np.float32)
    intrinsics = np.tile([[0, 0, WIDTH / 2], [0, 0, HEIGHT / 2], [0, 0, 1]], (2, 4, 1, 1))
    intrinsics[..., [1, 0], [1, 0]] = np.array([HEIGHT, WIDTH]) / 2 / np.tan(fields / 2)
    encoding = np.array(encode(pose, intrinsics, HEIGHT, WIDTH, convention))
    told = pose if convention == "cam_to_world" else np.linalg.inv(pose)
    assert relative_error(encoding[..., :3], told[..., :3, 3]) <= TOLERANCE
    expected = Rotation.from_matrix(told[..., :3, :3].reshape(-1, 3, 3)).as_quat(canonical=True)
    assert relative_error(encoding[..., 3:7].reshape(-1, 4), expected) <= TOLERANCE
    assert relative_error(encoding[..., 7:], fields) <= TOLERANCE
    for length in (1, -5):
        encoding[..., 3:7] *= length
        decoded = decode(encoding, HEIGHT, WIDTH, convention)
        assert relative_error(decoded[0], pose) <= TOLERANCE
        assert relative_error(decoded[1], intrinsics) <= TOLERANCE


def test_an_unknown_convention_is_an_error():
    with pytest.raises(ValueError, match="convention: expected 'cam_to_world' or 'world_to_cam', got 'w2c'"):
        encode_camera(np.eye(4), np.eye(3), 24, 40, "w2c")


def test_the_first_camera_becomes_the_identity():
    pose = poses(2, 3)
    relative = first_frame(pose)
    np.testing.assert_allclose(relative[:, 0], np.tile(np.eye(4), (2, 1, 1)), atol=1e-6)
    assert relative_error(relative, np.linalg.inv(pose[:, :1]) @ pose) <= TOLERANCE


def test_a_world_far_away_costs_no_precision():
    """4096 m off, an inverse times a pose would be wrong by millimetres."""
    pose = poses(2, 3)
    pose[..., :3, 3] = np.round(pose[..., :3, 3] * 1024) / 1024  # so that sums are exact in float32
    away = pose.copy()
    away[..., :3, 3] += 4096
    assert relative_error(first_frame(away), np.asarray(first_frame(pose))) <= 1e-6


def test_points_go_through_the_pose_and_back():
    pose, points = poses(2, 4), np.random.default_rng(0).normal(size=(2, 4, 4, 5, 3))
    moved = move(pose, points)
    expected = np.einsum("btij,bthwj->bthwi", pose[..., :3, :3], points) + pose[..., None, None, :3, 3]
    assert relative_error(moved, expected) <= TOLERANCE
    assert relative_error(move(invert(pose), moved), points) <= TOLERANCE
    # One point each, rows of points, and one pose for all.
    assert relative_error(move(pose, points[:, :, 1, 2]), expected[:, :, 1, 2]) <= TOLERANCE
    assert relative_error(move(pose, points[:, :, 1]), expected[:, :, 1]) <= TOLERANCE
    assert relative_error(move(pose[0, 1], points[0, 1]), expected[0, 1]) <= TOLERANCE


def test_cells_cover_the_image_evenly():
    centres = np.asarray(pixel_centres(4, 6))
    np.testing.assert_array_equal(centres[2, 5], [5.5, 2.5])
    # Two by two pixels, or two rows of one and three columns of two.
    blocks = centres.reshape(2, 2, 3, 2, 2).mean((1, 3))
    np.testing.assert_allclose(pixel_centres(4, 6, 2, 3), blocks, atol=1e-6)
    np.testing.assert_array_equal(pixel_centres(4, 6, columns=3)[3, 2], [5, 3.5])


def test_points_project_onto_their_pixels():
    """Also with skew and the principal point far off the centre."""
    intrinsics = np.array([[30, 2, 3], [0, 40, 20], [0, 0, 1]])
    points = np.asarray(lift(np.random.default_rng(0).uniform(1, 9, (HEIGHT, WIDTH)), intrinsics), np.float64)
    projected = points @ intrinsics.T
    np.testing.assert_allclose(projected[..., :2] / projected[..., 2:], pixel_centres(HEIGHT, WIDTH), atol=1e-4)


def test_leading_axes_are_a_batch():
    rng, pose = np.random.default_rng(0), poses(2, 4).astype(np.float32)
    intrinsics = np.tile(np.array([[30, 0, 20], [0, 40, 12], [0, 0, 1]], np.float32), (2, 4, 1, 1))
    intrinsics[..., 0, 0] = rng.uniform(20, 60, (2, 4))
    depth = rng.uniform(1, 2, (2, 4, 4, 5)).astype(np.float32)

    def one(pose, intrinsics, depth):
        encoding = encode_camera(pose, intrinsics, HEIGHT, WIDTH, "world_to_cam")
        pose, intrinsics = decode_camera(encoding, HEIGHT, WIDTH, "world_to_cam")
        return transform_points(pose, unproject(depth, intrinsics))

    encoding = encode(pose, intrinsics, HEIGHT, WIDTH, "world_to_cam")
    decoded = decode(encoding, HEIGHT, WIDTH, "world_to_cam")
    one_by_one = compiled(jax.vmap(jax.vmap(one)))(pose, intrinsics, depth)
    np.testing.assert_allclose(move(decoded[0], lift(depth, decoded[1])), one_by_one, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    """The first camera is the identity."""

    def outputs(pose, intrinsics, depth):
        encoding = encode_camera(to_first_frame(pose), intrinsics, 4, 6, "world_to_cam")
        decoded = decode_camera(encoding, 4, 6)
        return encoding, transform_points(decoded[0], unproject(depth, decoded[1]))

    pose, intrinsics = poses(2, seed=3), np.tile([[4, 0.0, 3], [0, 5, 2], [0, 0, 1]], (2, 1, 1))
    pose[0] = np.eye(4)
    check_gradients(outputs, pose, intrinsics, np.ones((2, 4, 6)))


def test_other_shapes_are_errors():
    with pytest.raises(ValueError, match=r"cam_to_world: expected shape \[..., T, 4, 4\], got \[4, 4\]"):
        to_first_frame(np.eye(4))
    with pytest.raises(ValueError, match=r"pose: expected shape \[..., 4, 4\], got \[3, 4\]"):
        invert_pose(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"points: expected shape \[2\] \+ \[..., 3\] for these poses, got \[3, 3\]"):
        transform_points(poses(2), np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"pixels: expected shape \[..., 4, 6, 2\], got \[6, 4, 2\]"):
        unproject(np.ones((4, 6)), np.eye(3), np.ones((6, 4, 2)))
    with pytest.raises(ValueError, match="translation"):
        compose_pose(np.eye(3), np.ones(2))
