"""Depth with confidence (OmniStream eq. 6), VGGT's form of it, and the masked pieces of all geometric losses.

Legend: B clips, T frames, H x W pixels. A residual is prediction minus target, 0 where there is no target. What lies
outside a mask may be NaN or infinite: it is replaced before any arithmetic, since the gradient of a NaN that is
replaced afterwards is still NaN. What lies inside is taken as it is, so that a prediction that is NaN is noticed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from omnistream_jax.losses.means import Mean, add_means, mean_of

VGGT_LARGEST = 100.0  # VGGT clips every error there
VGGT_FILTERED_AT_LEAST = 1000  # its quantile filter must leave more pixels than this, or all are kept


class RegressionPieces(NamedTuple):
    """The three terms of a VGGT regression loss, float32 scalars; its loss is their sum."""

    confidence: jax.Array
    regression: jax.Array
    gradient: jax.Array

    @property
    def total(self) -> jax.Array:
        """The loss."""
        return self.confidence + self.regression + self.gradient


def depth_loss(
    prediction: jax.Array,
    confidence: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    alpha: float = 0.2,
    gradient_scales: int = 1,
) -> jax.Array:
    """L_depth: mean over valid pixels of c |r| + c |r_right - r| + c |r_below - r| - alpha log c.

    OmniStream eq. 6. r is the residual of a pixel and c its confidence; a difference counts where both pixels are
    valid, and its c is that of the pixel it starts from, so that c = alpha / (|r| + its differences) is the minimum.
    The paper writes a sum; the mean keeps the loss the same at every resolution.

    Args:
        prediction: [B, T, H, W], any float dtype.
        confidence: [B, T, H, W], > 0.
        target: [B, T, H, W], in the units of prediction; no gradient flows into it.
        valid: bool [B, T, H, W], over which the mean of the whole batch is taken.
        alpha: what confidence is worth.
        gradient_scales: n, the differences averaged over the maps of every 1st, 2nd, ..., 2^(n-1)th pixel, each
            divided by its own count of valid pixels. The paper has one scale, VGGT four.

    Returns:
        float32 scalar; 0 where nothing is valid.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, or gradient_scales < 1.
    """
    return add_means(depth_means(prediction, confidence, target, valid, alpha=alpha, gradient_scales=gradient_scales))


def depth_means(
    prediction: jax.Array,
    confidence: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    alpha: float = 0.2,
    gradient_scales: int = 1,
) -> list[Mean]:
    """The means of which `depth_loss` is the sum, for batches that are taken in parts; arguments as there."""
    _check_depth(prediction, confidence, target, valid)
    residual = masked_difference(prediction, target, valid)
    confidence = masked_confidence(confidence, valid)
    gradient = at_scales(_weighted_differences, gradient_scales, residual, confidence, valid)
    own = mean_of(weigh(jnp.abs(residual), confidence, alpha), valid)
    return [own, *(mean.times(1 / gradient_scales) for mean in gradient)]


def vggt_depth_loss(
    prediction: jax.Array,
    confidence: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    gamma: float = 1.0,
    alpha: float = 0.2,
    gradient_scales: int = 4,
    weigh_gradient: bool = False,
    valid_range: float | None = None,
    minimum_valid: int = 100,
) -> RegressionPieces:
    """VGGT's depth loss (Wang et al. 2025, training/loss.py): an unweighted error beside the weighted one.

    Args:
        prediction: [B, T, H, W], any float dtype.
        confidence: [B, T, H, W], > 0.
        target: [B, T, H, W]; no gradient flows into it.
        valid: bool [B, T, H, W].
        gamma: weight of the errors that are multiplied with confidence.
        alpha: what confidence is worth.
        gradient_scales: as in `depth_loss`.
        weigh_gradient: differences are weighted too, by the confidence of the pixel they end at. As in VGGT, the
            log of the confidence then counts at every pixel, valid or not; only a confidence that is not a positive
            number is left out where its pixel is not valid.
        valid_range: see `vggt_regression`.
        minimum_valid: with fewer valid pixels in the batch all pieces are 0.

    Returns:
        The three pieces; all 0 where nothing is valid.

    Raises:
        ValueError: as in `depth_loss`.
    """
    _check_depth(prediction, confidence, target, valid)
    residual = masked_difference(prediction, target, valid)
    weighted, plain = vggt_regression(jnp.abs(residual), confidence, valid, gamma, alpha, valid_range)
    usable = jnp.isfinite(confidence) & (confidence > 0)
    everywhere = masked_confidence(confidence, valid | usable)

    def differences(residual: jax.Array, confidence: jax.Array, valid: jax.Array) -> jax.Array:
        right, below = (jnp.minimum(error, VGGT_LARGEST) for error in forward_differences(residual, valid))
        if weigh_gradient:
            right = weigh(gamma * right, confidence[..., :, 1:], alpha)
            below = weigh(gamma * below, confidence[..., 1:, :], alpha)
        mean = (jnp.sum(right) + jnp.sum(below)) / number_of(valid)
        return jnp.where(jnp.any(valid), mean, 0.0)

    gradient = mean_over_scales(differences, gradient_scales, residual, everywhere, valid)
    return pieces_of_enough(RegressionPieces(weighted, plain, gradient), valid, minimum_valid)


def vggt_regression(
    error: jax.Array, confidence: jax.Array, valid: jax.Array, gamma: float, alpha: float, valid_range: float | None
) -> tuple[jax.Array, jax.Array]:
    """VGGT's mean of gamma * error * c - alpha log c, and its mean error, over valid pixels.

    Args:
        error: float32 [B, T, H, W], >= 0, finite also outside the mask.
        confidence: [B, T, H, W], > 0.
        valid: bool [B, T, H, W].
        gamma: weight of the error that is multiplied with confidence.
        alpha: what confidence is worth.
        valid_range: in (0, 1], keep only pixels below this quantile, for each of the two means its own, where more
            than 1000 are left. None keeps all.

    Returns:
        Two float32 scalars.

    Raises:
        ValueError: valid_range outside (0, 1].
    """
    if valid_range is not None and not 0 < valid_range <= 1:
        raise ValueError(f"valid_range: expected a quantile in (0, 1] or None, got {valid_range}")
    error = jnp.minimum(error, VGGT_LARGEST)
    weighted = weigh(gamma * error, masked_confidence(confidence, valid), alpha)
    weighted = jnp.clip(weighted, -VGGT_LARGEST, VGGT_LARGEST)
    if valid_range is None:
        return masked_mean(weighted, valid), masked_mean(error, valid)
    return (
        masked_mean(weighted, _below_quantile(weighted, valid, valid_range)),
        masked_mean(error, _below_quantile(error, valid, valid_range)),
    )


def pieces_of_enough(pieces: RegressionPieces, valid: jax.Array, minimum_valid: int) -> RegressionPieces:
    """The pieces, or zeros where the batch has fewer valid pixels than minimum_valid."""
    enough = jnp.sum(valid) >= minimum_valid
    return RegressionPieces(*(jnp.where(enough, piece, 0.0) for piece in pieces))


def masked_difference(prediction: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """The residual: prediction - target where valid [...], else 0; arrays [...] or [..., C] -> float32 alike."""
    mask = valid.reshape(valid.shape + (1,) * (prediction.ndim - valid.ndim))
    prediction = jnp.where(mask, prediction.astype(jnp.float32), 0.0)
    return prediction - jnp.where(mask, jax.lax.stop_gradient(target).astype(jnp.float32), 0.0)


def masked_confidence(confidence: jax.Array, valid: jax.Array) -> jax.Array:
    """Confidence where valid, else 1, whose log is 0; [...] -> float32 [...]."""
    return jnp.where(valid, confidence.astype(jnp.float32), 1.0)


def weigh(error: jax.Array, confidence: jax.Array, alpha: float) -> jax.Array:
    """The error under a learned confidence c: c * error - alpha log c, smallest at c = alpha / error."""
    return confidence * error - alpha * jnp.log(confidence)


def masked_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of values [...], finite everywhere, where valid [...]; 0 where nothing is valid."""
    return add_means([mean_of(values, valid)])


def number_of(valid: jax.Array) -> jax.Array:
    """How many are valid, at least 1, to divide by; float32 scalar."""
    return jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)


def forward_differences(residual: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|difference| to the pixel on the right and to the one below; 0 unless both pixels are valid.

    Args:
        residual: float32 [..., H, W], finite.
        valid: bool [..., H, W].

    Returns:
        float32 [..., H, W - 1] and [..., H - 1, W].
    """
    right = jnp.abs(residual[..., :, 1:] - residual[..., :, :-1])
    below = jnp.abs(residual[..., 1:, :] - residual[..., :-1, :])
    return (
        jnp.where(valid[..., :, 1:] & valid[..., :, :-1], right, 0.0),
        jnp.where(valid[..., 1:, :] & valid[..., :-1, :], below, 0.0),
    )


def mean_over_scales(measure: Callable[..., jax.Array], scales: int, *maps: jax.Array) -> jax.Array:
    """Mean of measure(*maps) with maps [B, T, H, W, ...] at every 1st, 2nd, ..., 2^(scales-1)th pixel.

    Raises:
        ValueError: scales < 1.
    """
    return sum(at_scales(measure, scales, *maps)) / scales


def at_scales(measure: Callable[..., Any], scales: int, *maps: jax.Array) -> list[Any]:
    """measure(*maps) with maps [B, T, H, W, ...] at every 1st, 2nd, ..., 2^(scales-1)th pixel.

    Raises:
        ValueError: scales < 1.
    """
    if scales < 1:
        raise ValueError(f"gradient scales: expected at least 1, got {scales}")
    return [measure(*(map_[:, :, :: 2**scale, :: 2**scale] for map_ in maps)) for scale in range(scales)]


def check_map(name: str, array: jax.Array, shape: tuple[int, ...], mask: bool = False) -> None:
    """Raises a ValueError unless the array has the shape and, being a mask, is bool."""
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if mask and array.dtype != bool:
        raise ValueError(f"{name}: expected a bool mask, got {array.dtype}")


def _check_depth(prediction: jax.Array, confidence: jax.Array, target: jax.Array, valid: jax.Array) -> None:
    if prediction.ndim != 4:
        raise ValueError(f"prediction: expected [B, T, H, W], got shape {prediction.shape}")
    check_map("confidence", confidence, prediction.shape)
    check_map("target", target, prediction.shape)
    check_map("valid", valid, prediction.shape, mask=True)


def _weighted_differences(residual: jax.Array, confidence: jax.Array, valid: jax.Array) -> Mean:
    right, below = forward_differences(residual, valid)
    weighted = jnp.sum(confidence[..., :, :-1] * right) + jnp.sum(confidence[..., :-1, :] * below)
    return Mean(weighted, jnp.sum(valid).astype(jnp.float32))


def _below_quantile(values: jax.Array, valid: jax.Array, quantile: float) -> jax.Array:
    """The valid pixels whose value is below that of the nearest rank; all valid ones if too few would be left."""
    values = jax.lax.stop_gradient(values)
    ordered = jnp.sort(jnp.where(valid, values, jnp.inf), axis=None)
    rank = jnp.round(quantile * (jnp.sum(valid) - 1)).astype(int)
    kept = valid & (values < ordered[jnp.maximum(rank, 0)])
    return jnp.where(jnp.sum(kept) > VGGT_FILTERED_AT_LEAST, kept, valid)
