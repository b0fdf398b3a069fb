"""Next-token cross-entropy of a decoder with a large vocabulary, never all its logits in memory at once."""

from functools import partial

import jax
import jax.numpy as jnp

from omnistream_jax.ops.precision import precision_of


def language_loss(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 256,
    shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the tokens to be learned, and how many of them are the likeliest token.

    L_cap (OmniStream eq. 9), where the mask chooses the answers. Logits are hidden @ embedding.T; hidden[b, i] predicts
    targets[b, i]: the caller shifts. The tokens of the mask are brought together and visited `chunk` at a time, so
    logits take [shards, chunk, V] float32 instead of [B, L, V], and tokens outside the mask cost no time.

    Products take their factors in the dtype of `hidden` and add up in float32; everything between is float32.

    Args:
        hidden: [B, L, D], the decoder's states after its final norm, any float dtype.
        embedding: [V, D], the output matrix: the token embedding where they are tied.
        targets: integers [B, L] in [0, V) where the mask is set (else the loss is NaN); the others are not read.
        mask: bool [B, L], the positions that count.
        chunk: tokens of a shard whose logits are held at once, >= 1. Fewer need less memory; each chunk adds once to
            the embedding's gradient, so that very few take longer.
        shards: devices over which the rows are split in equal parts, a divisor of B. Each then visits its own tokens
            and adds up its own gradient of the embedding, and these are added once; with 1 every device would visit
            the tokens of all.

    Returns:
        The loss, float32 scalar, and the share of the masked tokens whose logit is the highest, float32 scalar (a tie
        counts). Both 0 where the mask is empty; then the gradients are 0 too. The accuracy has no gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a chunk or a number of shards that cannot be.
    """
    _check(hidden, embedding, targets, mask, chunk, shards)
    tokens = hidden.shape[0] // shards * hidden.shape[1]
    hidden = hidden.reshape(shards, tokens, hidden.shape[2])
    targets, mask = targets.reshape(shards, tokens), mask.reshape(shards, tokens)
    return _mean_loss(hidden, embedding, targets, mask, min(chunk, tokens))


# s: shard; t: token; v: entry of the vocabulary; d: width
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mean_loss(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`language_loss` of [S, T, D], [V, D], [S, T] and [S, T]."""
    _, chunks, hidden, targets, mask = _masked_first(hidden, targets, mask, chunk)
    kernel = embedding.astype(hidden.dtype)

    def visit(index: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, labels, kept = _slices(index, chunk, hidden, targets, mask)
        losses, hits, _ = _cross_entropy(_logits(states, kernel), labels, kept)
        return sums[0] + losses, sums[1] + hits

    return _means(jax.lax.fori_loop(0, chunks, visit, _zero_sums(mask)), mask)


def _mean_loss_forward(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Both gradients are made here, while a chunk's logits are there, and wait for the factor of the backward pass.

    Recomputing the logits there would be a fourth product of this size beside three, and save nothing: the loss is the
    last thing of the forward pass, so that its gradients are wanted at once.
    """
    order, chunks, hidden, targets, mask = _masked_first(hidden, targets, mask, chunk)
    kernel = embedding.astype(hidden.dtype)
    count = jnp.maximum(jnp.sum(mask), 1)

    def visit(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss_sum, hit_sum, d_hidden, d_embedding = carry
        states, labels, kept = _slices(index, chunk, hidden, targets, mask)
        logits = _logits(states, kernel)
        losses, hits, log_normaliser = _cross_entropy(logits, labels, kept)
        is_target = labels[..., None] == jnp.arange(logits.shape[-1])
        d_logits = (jnp.exp(logits - log_normaliser[..., None]) - is_target) * (kept / count)[..., None]
        d_logits = d_logits.astype(kernel.dtype)
        d_states = _product("stv,vd->std", d_logits, kernel)
        d_kernel = _product("stv,std->svd", d_logits, states)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_states.astype(hidden.dtype), index * chunk, axis=1)
        return loss_sum + losses, hit_sum + hits, d_hidden, d_embedding + d_kernel

    d_embedding = jnp.zeros((hidden.shape[0], *embedding.shape), jnp.float32)
    carry = (*_zero_sums(mask), jnp.zeros_like(hidden), d_embedding)
    loss_sum, hit_sum, d_hidden, d_embedding = jax.lax.fori_loop(0, chunks, visit, carry)
    d_hidden = _take(d_hidden, jnp.argsort(order, axis=1))
    d_embedding = jnp.sum(d_embedding, axis=0).astype(embedding.dtype)
    return _means((loss_sum, hit_sum), mask), (d_hidden, d_embedding)


def _mean_loss_backward(
    _chunk: int, gradients: tuple[jax.Array, jax.Array], factors: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_embedding = ((factors[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_embedding, None, None


_mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)


def _masked_first(
    hidden: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The tokens of each shard, those of the mask first, padded to whole chunks.

    Returns:
        order: int32 [S, T], where the tokens were.
        chunks: int32 scalar, those that hold a token of the mask in any shard.
        hidden, targets, mask: of T tokens rounded up to whole chunks.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    chunks = -(-jnp.max(jnp.sum(mask, axis=1)) // chunk)
    padding = (0, -mask.shape[1] % chunk)
    hidden, targets, mask = (
        jnp.pad(_take(array, order), ((0, 0), padding, *[(0, 0)] * (array.ndim - 2)))
        for array in (hidden, targets, mask)
    )
    return order, chunks, hidden, targets, mask


def _take(array: jax.Array, order: jax.Array) -> jax.Array:
    """[S, N, ...] and [S, T] -> [S, T, ...]."""
    return jnp.take_along_axis(array, order.reshape(order.shape + (1,) * (array.ndim - 2)), axis=1)


def _slices(index: jax.Array, chunk: int, *arrays: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk, axis=1) for array in arrays]


def _logits(states: jax.Array, kernel: jax.Array) -> jax.Array:
    return _product("std,vd->stv", states, kernel)


def _product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """In float32, of factors as they are."""
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32, precision=precision_of(left.dtype))


def _cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a chunk [S, C, V]: the sum of losses [S], the number of hits [S], and the log-normaliser [S, C]."""
    highest = jnp.max(logits, axis=-1)
    log_normaliser = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
    known = (targets >= 0) & (targets < logits.shape[-1])
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    losses = jnp.where(known, log_normaliser - at_target, jnp.nan)
    hits = mask & known & (at_target == highest)
    return jnp.sum(jnp.where(mask, losses, 0.0), axis=1), jnp.sum(hits, axis=1, dtype=jnp.int32), log_normaliser


def _zero_sums(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of losses and of hits, [S] each: added over the shards once, after the last chunk."""
    return jnp.zeros(mask.shape[0], jnp.float32), jnp.zeros(mask.shape[0], jnp.int32)


def _means(sums: tuple[jax.Array, jax.Array], mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    return jnp.sum(sums[0]) / count, jnp.sum(sums[1]) / count


def _check(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int, shards: int
) -> None:
    if hidden.ndim != 3 or embedding.ndim != 2 or hidden.shape[2] != embedding.shape[1]:
        raise ValueError(
            f"expected hidden [B, L, D] and embedding [V, D] with equal D, got {hidden.shape} and {embedding.shape}"
        )
    if targets.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"targets and mask: expected hidden's [B, L], {hidden.shape[:2]}, got {targets.shape} and {mask.shape}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets: expected integers, got {targets.dtype}")
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")
    if 0 in hidden.shape or 0 in embedding.shape:
        raise ValueError(f"expected no empty axis, got hidden {hidden.shape} and embedding {embedding.shape}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if shards < 1 or hidden.shape[0] % shards:
        raise ValueError(f"shards: expected a divisor of the {hidden.shape[0]} rows of hidden, got {shards}")
