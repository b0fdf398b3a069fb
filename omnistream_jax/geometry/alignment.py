"""Similarity between two sets of points, scale and shift between two depth maps.

Every function takes JAX or NumPy arrays and computes with that library in the dtype given (at least float32): the
float32 of a jitted model and the float64 of an evaluation share one piece of mathematics.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

SMALLEST_SCALE = 1e-3
RESIDUAL_FLOOR = 1e-8


class Similarity(NamedTuple):
    """A similarity: point -> scale * rotation @ point + translation.

    Attributes:
        scale: [...].
        rotation: [..., 3, 3], proper (determinant +1).
        translation: [..., 3].
    """

    scale: Array
    rotation: Array
    translation: Array


class PointMoments(NamedTuple):
    """First and second moments of two sets of corresponding points.

    Attributes:
        source_mean: [..., 3].
        target_mean: [..., 3].
        source_variance: [...], mean squared distance of the source from its mean.
        covariance: [..., 3, 3], mean of (target - mean) (source - mean)^T.
    """

    source_mean: Array
    target_mean: Array
    source_variance: Array
    covariance: Array


def umeyama(source: Array, target: Array, weights: Array | None = None, with_scale: bool = True) -> Similarity:
    """The similarity that brings the source closest to the target, in weighted least squares.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991, eq. 40-42;
    a reflection is never returned. Differentiable, also where singular values coincide; where the points leave the
    rotation free (all on one line, for instance) it is one of the best, and no gradient flows along the free angle.

    Args:
        source: [..., N, 3], N >= 1.
        target: [..., N, 3], corresponding points.
        weights: [..., N], non-negative; None weighs all alike. Points of weight 0 must still be finite.
        with_scale: False fixes the scale at 1.

    Returns:
        target ~ scale * rotation @ source + translation. Where the source's points all coincide (or all weights
        are 0) no scale exists: scale and translation are NaN there, unless `with_scale` is False.

    Raises:
        ValueError: shapes that do not fit.
    """
    xp = _namespace(source, target, weights)
    source_mean, target_mean, variance, covariance = point_moments(source, target, weights)
    rotation = _closest_rotation_jax(covariance) if xp is jnp else _closest_rotation(np, covariance)
    if with_scale:
        determined = variance > 0
        gain = xp.sum(rotation * covariance, axis=(-2, -1))  # trace(D S) of eq. 42
        scale = xp.where(determined, gain / xp.where(determined, variance, 1), xp.nan)
    else:
        scale = xp.ones_like(variance)
    rotated_mean = _matmul(rotation, source_mean[..., None])[..., 0]
    return Similarity(scale, rotation, target_mean - scale[..., None] * rotated_mean)


def apply_similarity(similarity: Similarity, points: Array) -> Array:
    """Moves points [..., N, 3] by a similarity with the same leading axes (or ones that broadcast): [..., N, 3]."""
    scale, rotation, translation = similarity
    rotated = _matmul(points, rotation.swapaxes(-1, -2))
    return scale[..., None, None] * rotated + translation[..., None, :]


def point_moments(source: Array, target: Array, weights: Array | None = None) -> PointMoments:
    """The moments from which `umeyama` computes; arguments and errors as there."""
    xp = _namespace(source, target, weights)
    if source.shape != target.shape or source.ndim < 2 or source.shape[-1] != 3 or source.shape[-2] == 0:
        raise ValueError(f"source and target: expected equal shapes [..., N, 3], got {source.shape}, {target.shape}")
    dtype = xp.result_type(source, target, xp.float32)
    source, target = xp.asarray(source, dtype), xp.asarray(target, dtype)
    if weights is None:
        share = xp.full(source.shape[:-1], 1 / source.shape[-2], dtype)
    elif weights.shape != source.shape[:-1]:
        raise ValueError(f"weights: expected shape {source.shape[:-1]}, got {weights.shape}")
    else:
        total = xp.sum(xp.asarray(weights, dtype), axis=-1, keepdims=True)
        share = xp.asarray(weights, dtype) / xp.where(total > 0, total, 1)
    share = share[..., None]
    source_mean, source = _centre(xp, source, share)
    target_mean, target = _centre(xp, target, share)
    variance = xp.sum(share * source**2, axis=(-2, -1))
    covariance = _matmul((share * target).swapaxes(-1, -2), source)
    return PointMoments(source_mean, target_mean, variance, covariance)


def _centre(xp: ModuleType, points: Array, share: Array) -> tuple[Array, Array]:
    """Mean [..., 3] and deviations from it [..., N, 3]; the deviations of points that all coincide are exactly 0."""
    origin = points[..., :1, :]
    points = points - origin
    mean = xp.sum(share * points, axis=-2, keepdims=True)
    return (origin + mean)[..., 0, :], points - mean


def fit_scale(prediction: Array, target: Array, valid: Array, iterations: int = 10) -> Array:
    """The scale of the video depth protocol: an unfinished L1 fit of scale * prediction to the target.

    s starts at mean(target) / mean(prediction); each iteration is a weighted least squares fit with weights
    1 / (|s * prediction - target| + 1e-8); at the end s is raised to at least 1e-3. Ten iterations are part of
    the protocol (CUT3R's evaluator, Wang et al. 2025): they stop short of the L1 optimum.

    Args:
        prediction: [..., N], the pixels that share one scale on the last axis (a whole sequence, flattened).
        target: [..., N].
        valid: bool [..., N]; other pixels are not read, so they may be NaN.
        iterations: how often the weights are renewed.

    Returns:
        [...]; NaN where no pixel is valid or the valid predictions sum to 0. Gradients flow through every iteration.
        A weight can reach 1e8, so rounding errors grow: in float32 the scale is noisy, up to 5e-3 of it on a few
        hundred pixels (0.4 % was measured on 350), and far less on whole sequences.

    Raises:
        ValueError: shapes that do not fit.
    """
    xp = _namespace(prediction, target, valid)
    prediction, target, _ = _pixels(prediction, target, valid)
    count = xp.maximum(xp.sum(valid > 0, axis=-1), 1).astype(prediction.dtype)
    mean = xp.sum(prediction, axis=-1) / count
    determined = mean != 0
    scale = xp.sum(target, axis=-1) / count / xp.where(determined, mean, 1)
    for _ in range(iterations):
        weights = 1 / (xp.abs(scale[..., None] * prediction - target) + RESIDUAL_FLOOR)
        square = xp.sum(weights * prediction**2, axis=-1)
        scale = xp.sum(weights * prediction * target, axis=-1) / xp.where(determined, square, 1)
    return xp.where(determined, xp.maximum(scale, SMALLEST_SCALE), xp.nan)


def fit_scale_and_shift(prediction: Array, target: Array, valid: Array) -> tuple[Array, Array]:
    """Scale and shift for which scale * prediction + shift is closest to the target in weighted least squares.

    The closed form (MiDaS, Ranftl et al. 2020, eq. 4). Not the "scale&shift" of the video depth protocol, which
    is in `evals/depth_metrics.py`.

    Args:
        prediction: [..., N], the pixels that share one scale and shift on the last axis.
        target: [..., N].
        valid: [..., N], bool, or weights >= 0; pixels of weight 0 are not read, so they may be NaN.

    Returns:
        (scale [...], shift [...]); both NaN where the valid predictions are fewer than two different numbers.

    Raises:
        ValueError: shapes that do not fit.
    """
    xp = _namespace(prediction, target, valid)
    prediction, target, weights = _pixels(prediction, target, valid)
    total = xp.sum(weights, axis=-1, keepdims=True)
    share = weights / xp.where(total > 0, total, 1)
    # Deviations from a valid pixel first: those of a constant prediction are then exactly 0.
    first = xp.argmax(weights > 0, axis=-1)[..., None]
    origin = xp.take_along_axis(prediction, first, axis=-1)
    offset = xp.sum(share * (prediction - origin), axis=-1, keepdims=True)
    centred = prediction - origin - offset
    target_mean = xp.sum(share * target, axis=-1, keepdims=True)
    variance = xp.sum(share * centred**2, axis=-1)
    determined = variance > 0
    slope = xp.sum(share * centred * (target - target_mean), axis=-1) / xp.where(determined, variance, 1)
    scale = xp.where(determined, slope, xp.nan)
    return scale, target_mean[..., 0] - scale * (origin + offset)[..., 0]


def _pixels(prediction: Array, target: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Prediction and target, 0 where not valid, and the weights, all of one float dtype."""
    xp = _namespace(prediction, target, valid)
    if prediction.ndim == 0 or not prediction.shape == target.shape == valid.shape:
        shapes = f"{prediction.shape}, {target.shape}, {valid.shape}"
        raise ValueError(f"prediction, target and valid: expected equal shapes [..., N], got {shapes}")
    dtype = xp.result_type(prediction, target, xp.float32)
    keep = valid > 0
    prediction = xp.where(keep, xp.asarray(prediction, dtype), 0)
    target = xp.where(keep, xp.asarray(target, dtype), 0)
    return prediction, target, xp.asarray(valid, dtype)


def _namespace(*arrays: Array | None) -> ModuleType:
    """jax.numpy if any array (or tracer) is JAX's, else numpy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _matmul(left: Array, right: Array) -> Array:
    """A matrix product in full precision: accelerators would round float32 factors."""
    if _namespace(left, right) is jnp:
        return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    return np.matmul(left, right)


def _signed_svd(xp: ModuleType, matrix: Array) -> tuple[Array, Array, Array]:
    """left, values, right with matrix = left diag(values) right^T and det(left right^T) = +1.

    The last value is negative where a plain singular value decomposition would give a reflection.
    """
    left, values, right_transposed = xp.linalg.svd(matrix)
    reflects = xp.linalg.det(left) * xp.linalg.det(right_transposed) < 0
    last = xp.where(reflects, -1, 1).astype(matrix.dtype)
    signs = xp.stack([xp.ones_like(last), xp.ones_like(last), last], axis=-1)
    return left * signs[..., None, :], values * signs, right_transposed.swapaxes(-1, -2)


def _closest_rotation(xp: ModuleType, matrix: Array) -> Array:
    """The rotation R that maximises trace(R^T matrix): [..., 3, 3] -> [..., 3, 3]."""
    left, _, right = _signed_svd(xp, matrix)
    return _matmul(left, right.swapaxes(-1, -2))


@jax.custom_jvp
def _closest_rotation_jax(matrix: jax.Array) -> jax.Array:
    """`_closest_rotation` with a derivative that is finite where the SVD's is not (equal singular values)."""
    return _closest_rotation(jnp, matrix)


@_closest_rotation_jax.defjvp
def _closest_rotation_derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """matrix = R P with P symmetric; the antisymmetric part of R^T d(matrix) gives dR = left turn right^T."""
    (matrix,), (tangent,) = primals, tangents
    left, values, right = _signed_svd(jnp, matrix)
    change = _matmul(_matmul(left.swapaxes(-1, -2), tangent), right)
    sums = values[..., :, None] + values[..., None, :]
    # Both values 0: the rotation is free in that plane.
    free = sums <= 8 * jnp.finfo(values.dtype).eps * values[..., :1, None]
    turn = jnp.where(free, 0, (change - change.swapaxes(-1, -2)) / jnp.where(free, 1, sums))
    right_transposed = right.swapaxes(-1, -2)
    return _matmul(left, right_transposed), _matmul(_matmul(left, turn), right_transposed)
