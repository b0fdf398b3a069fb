"""Self-distillation on CLS tokens (DINO), and the entropies that reveal a collapse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr


def dino_loss(
    student_logits: jax.Array,
    teacher_probs: jax.Array,
    student_temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> jax.Array:
    """Cross-entropy between teacher targets and student softmax, averaged over pairs of crops.

    One term of L_ssl (OmniStream eq. 5, 11-15); DINO, Caron et al. 2021, in the form of DINOv2 and DINOv3.

    Args:
        student_logits: [S, B, K], S student crops of B samples, any float dtype.
        teacher_probs: [T, B, K], T teacher crops of the same samples; each row sums to one.
            Targets: no gradient flows into them.
        student_temperature: > 0.
        ignore_diagonal: leave out the pairs with student crop i and teacher crop i, which are the same
            view when both are the global crops in the same order.

    Returns:
        float32 scalar: the mean over samples and over the pairs that count.

    Raises:
        ValueError: shapes that do not fit, or no pair left to compare.
    """
    if student_logits.ndim != 3 or teacher_probs.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
        raise ValueError(
            "expected student_logits [S, B, K] and teacher_probs [T, B, K] with equal B and K, "
            f"got {student_logits.shape} and {teacher_probs.shape}"
        )
    student_crops, samples, _ = student_logits.shape
    teacher_crops = teacher_probs.shape[0]
    pairs = student_crops * teacher_crops
    if ignore_diagonal:
        pairs -= min(student_crops, teacher_crops)
    if pairs == 0:
        raise ValueError("ignore_diagonal leaves no pair: one student crop and one teacher crop were given")

    log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / student_temperature, axis=-1)
    targets = jax.lax.stop_gradient(teacher_probs).astype(jnp.float32)
    # s, t: crops; b: sample; k: prototype
    cross_entropy = -jnp.einsum("sbk,tbk->st", log_probs, targets, precision=jax.lax.Precision.HIGHEST)
    if ignore_diagonal:
        same_view = jnp.eye(student_crops, teacher_crops, dtype=bool)
        cross_entropy = jnp.where(same_view, 0.0, cross_entropy)
    return jnp.sum(cross_entropy) / (samples * pairs)


class TeacherEntropy(NamedTuple):
    """Two entropies in nats, float32 scalars in [0, log K]; see `teacher_entropy`."""

    batch_mean: jax.Array
    targets: jax.Array


def teacher_entropy(
    teacher_logits: jax.Array,
    targets: jax.Array,
    temperature: float | jax.Array,
    row_mask: jax.Array | None = None,
) -> TeacherEntropy:
    """Entropies that tell a healthy teacher from a collapsed one.

    `batch_mean` is the entropy of the mean over the batch of softmax(teacher_logits / temperature),
    without centring: it falls to 0 when all samples go to one prototype. Centred targets cannot show that,
    for Sinkhorn-Knopp spreads even equal rows evenly. `targets` is the mean entropy of a single
    target: it rises to log K when the teacher no longer tells samples apart.
    (DINO, Caron et al. 2021, names the two ways of collapse.)

    Args:
        teacher_logits: [..., K] before centring, any float dtype.
        targets: [..., K], the centred probabilities made of them.
        temperature: teacher temperature, > 0; may be traced.
        row_mask: bool [...], False for rows that are padding; None means all real.

    Returns:
        TeacherEntropy(batch_mean, targets), in nats, without gradient. Both are 0 if no row is real.

    Raises:
        ValueError: shapes that do not fit.
    """
    if teacher_logits.shape != targets.shape:
        raise ValueError(
            f"expected teacher_logits and targets of one shape, got {teacher_logits.shape} and {targets.shape}"
        )
    if row_mask is None:
        row_mask = jnp.ones(targets.shape[:-1], bool)
    if row_mask.shape != targets.shape[:-1]:
        raise ValueError(f"row_mask: expected shape {targets.shape[:-1]}, got {row_mask.shape}")
    real = row_mask[..., None]
    rows = tuple(range(targets.ndim - 1))
    count = jnp.maximum(jnp.sum(row_mask), 1)
    teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
    targets = jax.lax.stop_gradient(targets).astype(jnp.float32)

    probs = jax.nn.softmax(teacher_logits / temperature, axis=-1)
    mean_probs = jnp.sum(jnp.where(real, probs, 0.0), axis=rows) / count
    target_entropy = jnp.sum(jnp.where(real, entr(targets), 0.0)) / count
    return TeacherEntropy(batch_mean=jnp.sum(entr(mean_probs)), targets=target_entropy)
