"""The loss of depth probes: spread and mean of log-ratios (Eigen et al. 2014, in the form of AdaBins and DINOv3)."""

import jax
import jax.numpy as jnp

_MEAN_WEIGHT = 0.15  # of the squared mean
_EPSILON = 1e-3  # added to both depths


def sig_loss(
    prediction: jax.Array, target: jax.Array, valid: jax.Array, *, with_variance: bool | jax.Array = True
) -> jax.Array:
    """sqrt(var(g) + 0.15 mean(g)^2) over the valid pixels, g = log(p + 1e-3) - log(t + 1e-3); the variance unbiased.

    DINOv3's SigLoss. It leaves the variance out of its first 100 steps, so that the scale is found first.

    Args:
        prediction: [...], depth > 0.
        target: [...], true depth; no gradient flows into it.
        valid: bool [...], which pixels count; what lies elsewhere may be anything.
        with_variance: whether the variance counts; may be traced.

    Returns:
        float32 scalar, of gradient 0 where it is 0: a perfect prediction, or nothing that is valid.

    Raises:
        ValueError: shapes that differ, or a mask that is not bool.
    """
    if not prediction.shape == target.shape == valid.shape or valid.dtype != bool:
        raise ValueError(
            "expected prediction, target and a bool mask of one shape, got "
            f"{prediction.shape}, {target.shape} and {valid.dtype} {valid.shape}"
        )
    predicted = jnp.where(valid, prediction.astype(jnp.float32), 1.0)
    true = jnp.where(valid, jax.lax.stop_gradient(target.astype(jnp.float32)), 1.0)
    ratio = jnp.log(predicted + _EPSILON) - jnp.log(true + _EPSILON)  # 0 where nothing is valid
    count = jnp.sum(valid).astype(jnp.float32)
    mean = jnp.sum(ratio) / jnp.maximum(count, 1)
    deviation = jnp.where(valid, ratio - mean, 0.0)
    variance = jnp.sum(jnp.square(deviation)) / jnp.maximum(count - 1, 1)
    squared = jnp.where(with_variance, variance, 0.0) + _MEAN_WEIGHT * jnp.square(mean)
    # The root's own gradient is infinite at 0.
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def grouped_sig_loss(
    prediction: jax.Array, target: jax.Array, valid: jax.Array, images: int, *, with_variance: bool | jax.Array = True
) -> jax.Array:
    """The mean of `sig_loss` over groups of images; DINOv3 takes the loss of each device's 2 images, and their mean.

    Args:
        prediction: [N, ...], as target and valid; arguments as of `sig_loss`.
        target: [N, ...].
        valid: bool [N, ...].
        images: of a group; divides N. Groups without a valid pixel do not count.
        with_variance: as of `sig_loss`.

    Raises:
        ValueError: as `sig_loss`, or groups that do not divide the batch.
    """
    if images < 1 or len(prediction) % images:
        raise ValueError(f"images: expected a divisor of the batch of {len(prediction)} images, got {images}")
    grouped = (x.reshape(-1, images, *x.shape[1:]) for x in (prediction, target, valid))
    losses = jax.vmap(lambda *group: sig_loss(*group, with_variance=with_variance))(*grouped)
    counted = jnp.any(valid.reshape(len(losses), -1), axis=1)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counted), 1)
