"""The terms of L_geo beside depth: rays, points and cameras (OmniStream eq. 6-8), and VGGT's forms of them.

Legend: B clips, T frames, H x W pixels. Every mean is over all valid cells, pixels or frames of the batch. What lies
outside a mask may be NaN or infinite (see losses/depth.py, which has the pieces). An L1 norm here is the sum over a
vector's components, so that it and the 2-norm of a point are lengths in the same units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnistream_jax.geometry.cameras import FIELDS_OF_VIEW, QUATERNION, TRANSLATION
from omnistream_jax.losses.depth import (
    VGGT_LARGEST,
    RegressionPieces,
    check_map,
    masked_confidence,
    masked_difference,
    masked_mean,
    mean_over_scales,
    pieces_of_enough,
    vggt_regression,
)
from omnistream_jax.losses.means import Mean, add_means, mean_of
from omnistream_jax.losses.normalize import l2_normalize

VGGT_NORMALS_AT_LEAST = 10  # with fewer normals at a scale, that scale adds nothing


def ray_loss(
    prediction: jax.Array,
    target: jax.Array,
    valid_origin: jax.Array,
    valid_direction: jax.Array,
    confidence: jax.Array | None = None,
    alpha: float = 0.2,
) -> jax.Array:
    """L_ray: mean L1 norm of the origins' residuals plus that of the directions', each over its own valid cells.

    OmniStream eq. 6-8. Where both masks are equal this is the mean L1 norm of the 6-vector. A clip without poses has
    neither part; one with poses of unknown scale has directions only.

    Args:
        prediction: [..., 6], origin and direction (o, d) of the cells of a ray map, any float dtype.
        target: [..., 6]; no gradient flows into it.
        valid_origin: bool [...].
        valid_direction: bool [...].
        confidence: [...], > 0: multiplies the residuals of its cell, and -alpha log confidence is added, averaged
            over the cells where either part is valid. None: no confidence is trained.
        alpha: what confidence is worth; of no meaning without confidence.

    Returns:
        float32 scalar; 0 where nothing is valid.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    return add_means(ray_means(prediction, target, valid_origin, valid_direction, confidence, alpha))


def ray_means(
    prediction: jax.Array,
    target: jax.Array,
    valid_origin: jax.Array,
    valid_direction: jax.Array,
    confidence: jax.Array | None = None,
    alpha: float = 0.2,
) -> list[Mean]:
    """The means of which `ray_loss` is the sum, for batches that are taken in parts; arguments as there."""
    _check_vectors(prediction, target, 6)
    cells = prediction.shape[:-1]
    check_map("valid_origin", valid_origin, cells, mask=True)
    check_map("valid_direction", valid_direction, cells, mask=True)
    origin = vector_norm(masked_difference(prediction[..., :3], target[..., :3], valid_origin))
    direction = vector_norm(masked_difference(prediction[..., 3:], target[..., 3:], valid_direction))
    if confidence is None:
        return [mean_of(origin, valid_origin), mean_of(direction, valid_direction)]
    check_map("confidence", confidence, cells)
    either = valid_origin | valid_direction
    confidence = masked_confidence(confidence, either)
    return [
        mean_of(confidence * origin, valid_origin),
        mean_of(confidence * direction, valid_direction),
        mean_of(jnp.log(confidence), either).times(-alpha),
    ]


def point_loss(prediction: jax.Array, target: jax.Array, valid: jax.Array, *, norm: str = "l1") -> jax.Array:
    """L_points: mean norm of the residuals of points (origin + depth * direction) over valid pixels.

    OmniStream eq. 6-8.

    Args:
        prediction: [B, T, H, W, 3], any float dtype.
        target: [B, T, H, W, 3]; no gradient flows into it.
        valid: bool [B, T, H, W].
        norm: "l1", the paper's, or "l2", the Euclidean distance, as in VGGT's code.

    Returns:
        float32 scalar; 0 where nothing is valid.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, or an unknown norm.
    """
    return add_means(point_means(prediction, target, valid, norm=norm))


def point_means(prediction: jax.Array, target: jax.Array, valid: jax.Array, *, norm: str = "l1") -> list[Mean]:
    """The mean that `point_loss` is, for batches that are taken in parts; arguments as there."""
    _check_points(prediction, target, valid)
    return [mean_of(vector_norm(masked_difference(prediction, target, valid), norm), valid)]


def camera_loss(
    prediction: jax.Array,
    target: jax.Array,
    translation_valid: jax.Array,
    rotation_valid: jax.Array,
    field_valid: jax.Array,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> jax.Array:
    """L_camera: weighted sum of the mean L1 norms of translation, quaternion and fields of view.

    OmniStream eq. 6-8; with equal masks and weights of 1 the mean L1 norm of the 9-vector. Both signs of
    a quaternion are the same rotation, and L1 tells them apart: the target's w must be >= 0, the sign that the
    prediction learns.

    Args:
        prediction: [B, T, 9], translation 3, quaternion (x, y, z, w), vertical and horizontal field of view in
            radians; any float dtype.
        target: [B, T, 9]; no gradient flows into it.
        translation_valid: bool [B, T], each part averaged over its own valid frames.
        rotation_valid: bool [B, T].
        field_valid: bool [B, T].
        weights: of translation, rotation and field of view.

    Returns:
        float32 scalar; 0 where nothing is valid.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    masks = (translation_valid, rotation_valid, field_valid)
    return add_means(camera_means(prediction, target, *masks, weights=weights))


def camera_means(
    prediction: jax.Array,
    target: jax.Array,
    translation_valid: jax.Array,
    rotation_valid: jax.Array,
    field_valid: jax.Array,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> list[Mean]:
    """The means of which `camera_loss` is the sum, for batches that are taken in parts; arguments as there."""
    _check_cameras("prediction", prediction, target)
    masks = {"translation_valid": translation_valid, "rotation_valid": rotation_valid, "field_valid": field_valid}
    for name, mask in masks.items():
        check_map(name, mask, prediction.shape[:-1], mask=True)
    residuals = _camera_residuals(prediction, target, tuple(masks.values()))
    terms = zip(weights, residuals, masks.values(), strict=True)
    return [mean_of(vector_norm(residual), mask).times(weight) for weight, residual, mask in terms]


class CameraPieces(NamedTuple):
    """The terms of VGGT's camera loss before their weights, and their weighted sum; float32 scalars."""

    translation: jax.Array
    rotation: jax.Array
    field: jax.Array
    total: jax.Array


def vggt_camera_loss(
    predictions: Sequence[jax.Array],
    target: jax.Array,
    valid_frames: jax.Array,
    *,
    gamma: float = 0.6,
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5),
) -> CameraPieces:
    """VGGT's camera loss (Wang et al. 2025, training/loss.py): over the rounds of an iterative head.

    Errors are means over components, not sums, and those of translation are clipped at 100.

    Args:
        predictions: camera vectors [B, T, 9] of each of n rounds, first to last; as in `camera_loss`.
        target: [B, T, 9], its quaternions with w >= 0; no gradient flows into it.
        valid_frames: bool [B, T]. VGGT takes all frames of a clip whose first has more than 100 valid pixels.
        gamma: round i of 0 .. n-1 weighs gamma^(n-1-i) / n.
        weights: of translation, rotation and field of view in the total.

    Returns:
        The pieces; all 0 where no frame is valid.

    Raises:
        ValueError: no predictions, shapes that do not fit, or a mask that is not bool.
    """
    if not predictions:
        raise ValueError("predictions: expected at least one round")
    for index, prediction in enumerate(predictions):
        _check_cameras(f"predictions[{index}]", prediction, target)
    check_map("valid_frames", valid_frames, target.shape[:-1], mask=True)

    def errors(prediction: jax.Array) -> jax.Array:
        translation, *others = _camera_residuals(prediction, target, (valid_frames,) * 3)
        parts = [jnp.clip(translation, -VGGT_LARGEST, VGGT_LARGEST), *others]
        return jnp.stack([masked_mean(jnp.mean(jnp.abs(part), axis=-1), valid_frames) for part in parts])

    rounds = len(predictions)
    decayed = [gamma ** (rounds - 1 - index) * errors(prediction) for index, prediction in enumerate(predictions)]
    parts = sum(decayed) / rounds
    return CameraPieces(*parts, total=jnp.sum(parts * jnp.array(weights)))


def vggt_point_loss(
    prediction: jax.Array,
    confidence: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    gamma: float = 1.0,
    alpha: float = 0.2,
    normal_scales: int = 3,
    valid_range: float | None = None,
    minimum_valid: int = 100,
) -> RegressionPieces:
    """VGGT's loss of points (Wang et al. 2025, training/loss.py), with the angle between normals as gradient term.

    The angle's term is the mean of 1 - cos over the normals of `corner_normals`.

    Args:
        prediction: [B, T, H, W, 3], any float dtype.
        confidence: [B, T, H, W], > 0.
        target: [B, T, H, W, 3]; no gradient flows into it.
        valid: bool [B, T, H, W].
        gamma: weight of the error that is multiplied with confidence.
        alpha: what confidence is worth.
        normal_scales: n, the normals' term averaged over the maps of every 1st, 2nd, ..., 2^(n-1)th pixel; one with
            fewer than 10 normals adds 0.
        valid_range: see `vggt_regression`.
        minimum_valid: with fewer valid pixels in the batch all pieces are 0.

    Returns:
        The three pieces; all 0 where nothing is valid.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, or an option out of its range.
    """
    _check_points(prediction, target, valid)
    check_map("confidence", confidence, valid.shape)
    error = vector_norm(masked_difference(prediction, target, valid), "l2")
    weighted, plain = vggt_regression(error, confidence, valid, gamma, alpha, valid_range)
    normals = mean_over_scales(_normal_error, normal_scales, prediction, target, valid)
    return pieces_of_enough(RegressionPieces(weighted, plain, normals), valid, minimum_valid)


def corner_normals(points: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Surface normals at the four corners of every square of 2 x 2 pixels, each from the three pixels that meet there.

        a -top- b
        |       |       corner a: left x top        corner b: right x top
       left   right     corner c: left x bottom     corner d: right x bottom
        |       |
        c -bot- d

    Args:
        points: float32 [..., H, W, 3]; where not valid, anything.
        valid: bool [..., H, W].

    Returns:
        float32 [4, ..., H - 1, W - 1, 3], of length 1 (shorter where the three points nearly lie on a line), in the
        order a, b, c, d, and where all three pixels are valid, bool [4, ..., H - 1, W - 1].
    """
    points = jnp.where(valid[..., None], points, 0.0)
    across = points[..., :, 1:, :] - points[..., :, :-1, :]
    down = points[..., 1:, :, :] - points[..., :-1, :, :]
    top, bottom = across[..., :-1, :, :], across[..., 1:, :, :]
    left, right = down[..., :, :-1, :], down[..., :, 1:, :]
    normals = jnp.cross(jnp.stack([left, right, left, right]), jnp.stack([top, top, bottom, bottom]))

    a, b, c, d = valid[..., :-1, :-1], valid[..., :-1, 1:], valid[..., 1:, :-1], valid[..., 1:, 1:]
    return l2_normalize(normals, eps=1e-8), jnp.stack([a & b & c, a & b & d, a & c & d, b & c & d])


def vector_norm(vectors: jax.Array, norm: str = "l1") -> jax.Array:
    """The "l1" or "l2" norm of vectors float32 [..., C] -> [...]; the gradient at the zero vector is zero.

    Raises:
        ValueError: another norm.
    """
    if norm == "l1":
        return jnp.sum(jnp.abs(vectors), axis=-1)
    if norm == "l2":
        squares = jnp.sum(jnp.square(vectors), axis=-1)
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    raise ValueError(f'norm: expected "l1" or "l2", got {norm!r}')


def _normal_error(prediction: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    predicted, corners = corner_normals(prediction.astype(jnp.float32), valid)
    expected, _ = corner_normals(jax.lax.stop_gradient(target).astype(jnp.float32), valid)
    mean = masked_mean(1 - jnp.sum(predicted * expected, axis=-1), corners)
    return jnp.where(jnp.sum(corners) >= VGGT_NORMALS_AT_LEAST, mean, 0.0)


def _camera_residuals(prediction: jax.Array, target: jax.Array, masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Residuals of translation [B, T, 3], quaternion [B, T, 4] and fields of view [B, T, 2], 0 outside their masks."""
    parts = zip((TRANSLATION, QUATERNION, FIELDS_OF_VIEW), masks, strict=True)
    return [masked_difference(prediction[..., part], target[..., part], mask) for part, mask in parts]


def _check_vectors(prediction: jax.Array, target: jax.Array, width: int, name: str = "prediction") -> None:
    if prediction.ndim < 1 or prediction.shape[-1] != width:
        raise ValueError(f"{name}: expected [..., {width}], got shape {prediction.shape}")
    check_map("target", target, prediction.shape)


def _check_points(prediction: jax.Array, target: jax.Array, valid: jax.Array) -> None:
    if prediction.ndim != 5 or prediction.shape[-1] != 3:
        raise ValueError(f"prediction: expected [B, T, H, W, 3], got shape {prediction.shape}")
    check_map("target", target, prediction.shape)
    check_map("valid", valid, prediction.shape[:-1], mask=True)


def _check_cameras(name: str, prediction: jax.Array, target: jax.Array) -> None:
    if prediction.ndim != 3:
        raise ValueError(f"{name}: expected [B, T, 9], got shape {prediction.shape}")
    _check_vectors(prediction, target, 9, name)
