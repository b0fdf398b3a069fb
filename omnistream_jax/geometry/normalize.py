"""Ground truth of geometry in units that do not depend on the data set: VGGT's normalisation of a clip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnistream_jax.geometry.arrays import require_shape, to_float
from omnistream_jax.geometry.cameras import to_first_frame, transform_points, unproject

SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6
COUNT_OFFSET = 1e-3


class NormalizedClip(NamedTuple):
    """Clips in the frames of their first cameras, in units of `scale`.

    Attributes:
        depth: [B, T, H, W], 0 where not valid.
        points: [B, T, H, W, 3] in the first camera's frame, 0 where not valid.
        cam_to_world: [B, T, 4, 4], from each camera to the first.
        scale: [B], what depth, points and translations were divided by.
    """

    depth: jax.Array
    points: jax.Array
    cam_to_world: jax.Array
    scale: jax.Array


def normalize_clip(
    depth: jax.Array,
    valid: jax.Array,
    cam_to_world: jax.Array,
    intrinsics: jax.Array,
    *,
    has_pose: jax.Array | None = None,
    pixels: jax.Array | None = None,
) -> NormalizedClip:
    """Moves clips into the frames of their first cameras and divides them by `clip_scale` (VGGT).

    Nothing that stands in `depth` where it is not valid, or in `cam_to_world` without poses, has an effect on values
    or gradients, NaN included.

    Args:
        depth: [B, T, H, W], along the camera's axis.
        valid: bool [B, T, H, W], where depth is known.
        cam_to_world: [B, T, 4, 4], in the units of depth.
        intrinsics: [B, T, 3, 3] in pixels.
        has_pose: bool [B]; None: all clips have poses. A clip without gets the identity for all its frames: its points
            stay in each frame's own camera, and there the mean is taken.
        pixels: [H, W, 2], as in `unproject`.

    Returns:
        float32 (float64 if given). A clip without one valid pixel has scale 1e-6, as in VGGT: its translations mean
        nothing then, and a loss has to mask them.

    Raises:
        ValueError: shapes other than these.
    """
    depth, cam_to_world, intrinsics = to_float(depth, cam_to_world, intrinsics)
    if depth.ndim != 4:
        raise ValueError(f"depth: expected shape [B, T, H, W], got {list(depth.shape)}")
    clips, frames = depth.shape[:2]
    for name, array, shape in (
        ("valid", valid, depth.shape),
        ("cam_to_world", cam_to_world, (clips, frames, 4, 4)),
        ("intrinsics", intrinsics, (clips, frames, 3, 3)),
        ("has_pose", jnp.ones(clips, bool) if has_pose is None else has_pose, (clips,)),
    ):
        if jnp.shape(array) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)} beside this depth, got {list(jnp.shape(array))}")
    valid = jnp.asarray(valid, bool)
    if has_pose is not None:
        has_pose = jnp.asarray(has_pose, bool)[:, None, None, None]
        cam_to_world = jnp.where(has_pose, cam_to_world, jnp.eye(4, dtype=cam_to_world.dtype))
    poses = to_first_frame(cam_to_world)
    depth = jnp.where(valid, depth, 0)
    points = transform_points(poses, unproject(depth, intrinsics, pixels))
    scale = clip_scale(points, valid)
    return NormalizedClip(
        depth=depth / scale[:, None, None, None],
        points=jnp.where(valid[..., None], points, 0) / scale[:, None, None, None, None],
        cam_to_world=scale_translations(poses, scale[:, None]),
        scale=scale,
    )


def clip_scale(points: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean distance of points from the origin over all valid pixels of all frames of a clip (VGGT's normalisation).

    Args:
        points: [B, T, H, W, 3]; no value where not valid has an effect, NaN included.
        valid: bool [B, T, H, W].

    Returns:
        [B]: sum of distances / (count + 1e-3), clipped to 1e-6 .. 1e6. The gradient is finite, also for points at the
        origin.

    Raises:
        ValueError: shapes that do not fit.
    """
    if jnp.ndim(points) != 5 or jnp.shape(points)[-1] != 3 or jnp.shape(points)[:-1] != jnp.shape(valid):
        raise ValueError(
            "points and valid: expected shapes [B, T, H, W, 3] and [B, T, H, W], "
            f"got {list(jnp.shape(points))} and {list(jnp.shape(valid))}"
        )
    (points,) = to_float(points)
    valid = jnp.asarray(valid, bool)
    squares = jnp.sum(jnp.square(jnp.where(valid[..., None], points, 0)), axis=-1)
    # The derivative of a root is infinite at zero.
    away = squares > 0
    distances = jnp.where(away, jnp.sqrt(jnp.where(away, squares, 1)), 0)
    mean = jnp.sum(distances, axis=(1, 2, 3)) / (jnp.sum(valid, axis=(1, 2, 3)) + COUNT_OFFSET)
    return jnp.clip(mean, SMALLEST_SCALE, LARGEST_SCALE)


def scale_translations(pose: jax.Array, scale: jax.Array) -> jax.Array:
    """Poses [..., 4, 4] whose translations are divided by scale [...], which broadcasts."""
    require_shape("pose", pose, 4, 4)
    pose, scale = to_float(pose, scale)
    return pose.at[..., :3, 3].divide(scale[..., None])
