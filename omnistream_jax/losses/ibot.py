"""Self-distillation on masked patches (iBOT)."""

import jax
import jax.numpy as jnp


def ibot_loss(
    student_logits: jax.Array,
    teacher_probs: jax.Array,
    weights: jax.Array,
    crops: int,
    student_temperature: float = 0.1,
) -> jax.Array:
    """Cross-entropy on masked patches: averaged within each crop, then over the crops.

    One term of L_ssl (OmniStream eq. 5, 11-15); iBOT, Zhou et al. 2022, in the form of DINOv2 and DINOv3.
    The masked patches of all crops are gathered into M rows, a static number; rows left over are padding.

    Args:
        student_logits: [M, K] student logits at masked patches, any float dtype.
        teacher_probs: [M, K] targets for the same patches; no gradient flows into them.
        weights: [M], 1 / (number of masked patches in the row's crop), zero for padding rows.
        crops: number of crops in the batch, those without any masked patch included, >= 1.
        student_temperature: > 0.

    Returns:
        float32 scalar; 0 when nothing is masked. A crop without masks adds 0 but counts as a crop.

    Raises:
        ValueError: shapes that do not fit, or crops < 1.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_probs.shape:
        raise ValueError(
            "expected student_logits and teacher_probs of one shape [M, K], "
            f"got {student_logits.shape} and {teacher_probs.shape}"
        )
    if weights.shape != student_logits.shape[:1]:
        raise ValueError(f"weights: expected shape {student_logits.shape[:1]}, got {weights.shape}")
    if crops < 1:
        raise ValueError(f"crops: expected at least 1, got {crops}")
    log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / student_temperature, axis=-1)
    targets = jax.lax.stop_gradient(teacher_probs).astype(jnp.float32)
    cross_entropy = -jnp.sum(targets * log_probs, axis=-1)
    return jnp.sum(cross_entropy * weights.astype(jnp.float32)) / crops
