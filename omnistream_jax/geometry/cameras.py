"""Pinhole cameras: poses, fields of view, the 9-vector that the camera head predicts, pixels and points.

OpenCV's axes, z-depth, intrinsics in pixels, pixel centres at + 0.5 (data/schema.py). Everything is batched over
leading axes, and float32 (float64 if given).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.geometry.arrays import einsum, matrix_of, require_shape, to_float
from omnistream_jax.geometry.rotations import matrix_to_quaternion, quaternion_to_matrix

Convention = Literal["cam_to_world", "world_to_cam"]

# The parts of a 9-vector; the quaternion is (x, y, z, w), the fields of view are vertical and horizontal.
TRANSLATION, QUATERNION, FIELDS_OF_VIEW = slice(0, 3), slice(3, 7), slice(7, 9)


def compose_pose(rotation: jax.Array, translation: jax.Array) -> jax.Array:
    """[..., 4, 4] of a rotation [..., 3, 3] and a translation [..., 3].

    Raises:
        ValueError: shapes other than these.
    """
    require_shape("rotation", rotation, 3, 3)
    require_shape("translation", translation, 3)
    rotation, translation = to_float(rotation, translation)
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0, 0, 0, 1], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def invert_pose(pose: jax.Array) -> jax.Array:
    """The inverse [..., 4, 4] of rigid motions [..., 4, 4]: camera-to-world from world-to-camera and back.

    Raises:
        ValueError: last axes that are not 4 x 4.
    """
    require_shape("pose", pose, 4, 4)
    (pose,) = to_float(pose)
    rotation, translation = pose[..., :3, :3], pose[..., :3, 3]
    return compose_pose(jnp.swapaxes(rotation, -1, -2), -einsum("...ji,...j->...i", rotation, translation))


def to_first_frame(cam_to_world: jax.Array) -> jax.Array:
    """Poses of a clip in the frame of its first camera, whose own pose becomes the identity.

    Args:
        cam_to_world: [..., T, 4, 4]. Large coordinates are no harm: positions are subtracted before anything else.

    Returns:
        [..., T, 4, 4], from each camera to the first.

    Raises:
        ValueError: last axes that are not 4 x 4, or no axis of frames.
    """
    require_shape("cam_to_world", cam_to_world, 4, 4)
    if jnp.ndim(cam_to_world) < 3:
        raise ValueError(f"cam_to_world: expected shape [..., T, 4, 4], got {list(jnp.shape(cam_to_world))}")
    (cam_to_world,) = to_float(cam_to_world)
    rotation, position = cam_to_world[..., :3, :3], cam_to_world[..., :3, 3]
    first = rotation[..., :1, :, :]
    # k, j: axes of the camera; i: of the world
    return compose_pose(
        einsum("...ik,...ij->...kj", first, rotation),
        einsum("...ik,...i->...k", first, position - position[..., :1, :]),
    )


def fields_of_view(intrinsics: jax.Array, height: int, width: int) -> jax.Array:
    """(vertical, horizontal) fields of view in radians, as if the principal point lay at the centre (VGGT).

    Args:
        intrinsics: [..., 3, 3] in pixels, of an image of `height` x `width` pixels.
        height: of the image.
        width: of the image.

    Returns:
        [..., 2], each 2 atan(size / 2 / focal length).

    Raises:
        ValueError: last axes that are not 3 x 3.
    """
    require_shape("intrinsics", intrinsics, 3, 3)
    (intrinsics,) = to_float(intrinsics)
    focal = jnp.stack([intrinsics[..., 1, 1], intrinsics[..., 0, 0]], axis=-1)
    return 2 * jnp.arctan(jnp.array([height / 2, width / 2], focal.dtype) / focal)


def intrinsics_from_fields(fields: jax.Array, height: int, width: int) -> jax.Array:
    """Intrinsics [..., 3, 3] in pixels of fields of view [..., 2], the principal point at (width / 2, height / 2).

    Args:
        fields: (vertical, horizontal) in radians, within 0 to pi.
        height: of the image in pixels.
        width: of the image in pixels.

    Raises:
        ValueError: a last axis that is not 2 long.
    """
    require_shape("fields", fields, 2)
    (fields,) = to_float(fields)
    half = jnp.array([height / 2, width / 2], fields.dtype)
    focal_y, focal_x = jnp.moveaxis(half / jnp.tan(fields / 2), -1, 0)
    zero, one = jnp.zeros_like(focal_x), jnp.ones_like(focal_x)
    rows = [[focal_x, zero, one * half[1]], [zero, focal_y, one * half[0]], [zero, zero, one]]
    return matrix_of(rows)


def encode_camera(
    cam_to_world: jax.Array,
    intrinsics: jax.Array,
    height: int,
    width: int,
    convention: Convention = "cam_to_world",
) -> jax.Array:
    """Cameras as 9-vectors: translation 3, quaternion (x, y, z, w) 4, fields of view (vertical, horizontal) 2.

    Principal points are dropped.

    Args:
        cam_to_world: [..., 4, 4].
        intrinsics: [..., 3, 3] in pixels.
        height: of the image in pixels.
        width: of the image in pixels.
        convention: which motion translation and quaternion tell: "cam_to_world" (Depth Anything 3) or its inverse
            "world_to_cam" (VGGT).

    Returns:
        [..., 9].

    Raises:
        ValueError: shapes other than these, or an unknown convention.
    """
    cam_to_world, intrinsics = to_float(cam_to_world, intrinsics)
    pose = _in_convention(cam_to_world, convention)
    parts = [pose[..., :3, 3], matrix_to_quaternion(pose[..., :3, :3]), fields_of_view(intrinsics, height, width)]
    return jnp.concatenate(parts, axis=-1)


def decode_camera(
    encoding: jax.Array, height: int, width: int, convention: Convention = "cam_to_world"
) -> tuple[jax.Array, jax.Array]:
    """The cameras of 9-vectors; see `encode_camera`, whose inverse it is but for the principal point.

    Args:
        encoding: [..., 9]; the quaternion may have any length but zero, as a head predicts it.
        height: of the image in pixels.
        width: of the image in pixels.
        convention: as in `encode_camera`.

    Returns:
        cam_to_world [..., 4, 4] and intrinsics [..., 3, 3].

    Raises:
        ValueError: a last axis that is not 9 long, or an unknown convention.
    """
    require_shape("encoding", encoding, 9)
    (encoding,) = to_float(encoding)
    pose = compose_pose(quaternion_to_matrix(encoding[..., QUATERNION]), encoding[..., TRANSLATION])
    return _in_convention(pose, convention), intrinsics_from_fields(encoding[..., FIELDS_OF_VIEW], height, width)


def _in_convention(pose: jax.Array, convention: Convention) -> jax.Array:
    """Camera-to-world to the convention, or back: each way is its own inverse."""
    require_shape("cam_to_world", pose, 4, 4)
    if convention == "cam_to_world":
        return pose
    if convention == "world_to_cam":
        return invert_pose(pose)
    raise ValueError(f"convention: expected 'cam_to_world' or 'world_to_cam', got {convention!r}")


def pixel_centres(height: int, width: int, rows: int | None = None, columns: int | None = None) -> jax.Array:
    """Centres (u, v), in pixels of a height x width image, of a grid of equal cells that covers it.

    Args:
        height: of the image.
        width: of the image.
        rows: of the grid; None: `height`, one cell per pixel, so that v = row + 0.5.
        columns: likewise, for `width`.

    Returns:
        [rows, columns, 2], in JAX's default float type.
    """
    rows, columns = height if rows is None else rows, width if columns is None else columns
    v, u = (np.arange(rows) + 0.5) * (height / rows), (np.arange(columns) + 0.5) * (width / columns)
    return jnp.asarray(np.stack(np.meshgrid(u, v), axis=-1))


def camera_rays(intrinsics: jax.Array, pixels: jax.Array) -> jax.Array:
    """K^-1 (u, v, 1): what pixels look at, at depth 1, in the frame of the camera.

    Args:
        intrinsics: [..., 3, 3], upper triangular with 1 in the corner.
        pixels: [rows, columns, 2], (u, v) in pixels.

    Returns:
        [..., rows, columns, 3], in the type of the intrinsics; z is 1.

    Raises:
        ValueError: shapes other than these.
    """
    require_shape("intrinsics", intrinsics, 3, 3)
    require_shape("pixels", pixels, 2)
    (intrinsics,) = to_float(intrinsics)
    u, v = jnp.moveaxis(jnp.asarray(pixels).astype(intrinsics.dtype), -1, 0)
    entry = intrinsics[..., None, None, :, :]
    y = (v - entry[..., 1, 2]) / entry[..., 1, 1]
    x = (u - entry[..., 0, 2] - entry[..., 0, 1] * y) / entry[..., 0, 0]
    return jnp.stack([x, y, jnp.ones_like(x)], axis=-1)


def unproject(depth: jax.Array, intrinsics: jax.Array, pixels: jax.Array | None = None) -> jax.Array:
    """Points of a depth map in the frame of its camera.

    Args:
        depth: [..., H, W], along the camera's axis.
        intrinsics: [..., 3, 3] in pixels.
        pixels: [H, W, 2], where (u, v) each depth was taken; None: `pixel_centres(H, W)`.

    Returns:
        [..., H, W, 3].

    Raises:
        ValueError: shapes other than these.
    """
    depth, intrinsics = to_float(depth, intrinsics)
    if depth.ndim < 2:
        raise ValueError(f"depth: expected shape [..., H, W], got {list(depth.shape)}")
    pixels = pixel_centres(*depth.shape[-2:]) if pixels is None else pixels
    require_shape("pixels", pixels, *depth.shape[-2:], 2)
    return depth[..., None] * camera_rays(intrinsics, pixels)


def transform_points(pose: jax.Array, points: jax.Array) -> jax.Array:
    """Moves points by a pose.

    Args:
        pose: [..., 4, 4].
        points: [..., 3], [..., N, 3] or [..., H, W, 3], the leading axes being those of `pose`.

    Returns:
        As `points`.

    Raises:
        ValueError: shapes other than these.
    """
    require_shape("pose", pose, 4, 4)
    require_shape("points", points, 3)
    pose, points = to_float(pose, points)
    batch = pose.shape[:-2]
    if points.shape[: len(batch)] != batch or points.ndim <= len(batch):
        raise ValueError(f"points: expected shape {[*batch]} + [..., 3] for these poses, got {list(points.shape)}")
    flat = points.reshape(*batch, int(np.prod(points.shape[len(batch) : -1])), 3)
    moved = einsum("...ij,...nj->...ni", pose[..., :3, :3], flat) + pose[..., None, :3, 3]
    return moved.reshape(points.shape)
