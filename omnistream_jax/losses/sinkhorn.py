"""Sinkhorn-Knopp centring of the teacher's prototype scores (SwAV; DINOv2, DINOv3)."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp


def sinkhorn_knopp(
    logits: jax.Array,
    temperature: float | jax.Array,
    iterations: int = 3,
    row_mask: jax.Array | None = None,
) -> jax.Array:
    """Turns teacher logits into targets that use all prototypes equally over the batch.

    exp(logits / temperature) is scaled in turn so that every prototype has the same total and every
    row sums to one (Cuturi 2013; SwAV, Caron et al. 2020; in OmniStream's L_ssl, eq. 5, 11-15, as in
    DINOv2 and DINOv3). The two scalings are kept as logarithms, one number per prototype and one per row,
    so that no spread of logits overflows or leaves a row of zeros. All sums run over the global array: under
    jit the result does not depend on how the rows are sharded.

    Args:
        logits: [R, K] teacher logits of R samples over K prototypes, any float dtype.
        temperature: teacher temperature, > 0; may be traced.
        iterations: number of (prototypes, rows) scalings, >= 1.
        row_mask: bool [R], False for padding rows, whose logits are never read; None means all real.

    Returns:
        float32 [R, K]: rows sum to one, padding rows are zero. No gradient flows through it.

    Raises:
        ValueError: logits that are not [R, K], a row_mask that is not bool [R], or iterations < 1.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [rows, prototypes], got shape {logits.shape}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    if row_mask is None:
        row_mask = jnp.ones(logits.shape[:1], bool)
    if row_mask.shape != logits.shape[:1] or row_mask.dtype != bool:
        raise ValueError(f"row_mask: expected bool {logits.shape[:1]}, got {row_mask.dtype} {row_mask.shape}")
    real = row_mask[:, None]
    scores = jax.lax.stop_gradient(logits).astype(jnp.float32) / temperature
    scores = jnp.where(real, scores, 0.0)
    row_scale = jnp.zeros((logits.shape[0], 1), jnp.float32)
    for _ in range(iterations):
        prototype_scale = logsumexp(scores - row_scale, axis=0, keepdims=True, where=real)
        row_scale = logsumexp(scores - prototype_scale, axis=1, keepdims=True)
    probs = jnp.where(real, jnp.exp(scores - prototype_scale - row_scale), 0.0)
    return jax.lax.stop_gradient(probs)
