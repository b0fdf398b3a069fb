"""Attention over frames. B clips, T frames, P tokens a frame, H heads of width D.

Frame-causality (OmniStream eq. 3-4) is block-wise: a token sees all tokens of its own and of earlier frames,

    frame      0 1 2 3
    query 0    x . . .
    query 1    x x . .
    query 2    x x x .
    query 3    x x x x

so the queries of a frame meet a static prefix of the keys and no mask is needed. A window of W frames with S sinks
keeps the first S frames and the newest W - S of that prefix.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.ops.cache import BlockCache

# Up to this many groups of frames are unrolled; longer clips put several frames in a group.
_UNROLLED_GROUPS = 16
# Keys of the cache that are read at once while streaming (measured on a CPU: ViT-B, 201 tokens a frame).
_CHUNK_TOKENS = 402


def attention(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Softmax attention, the reference that faster paths are held to.

    Args:
        query: [B, N, H, D].
        key, value: [B, S, H, D].
        visible: bool, broadcastable to [B, H, N, S]; None shows every key. Each query must see at least one.

    Returns:
        [B, N, H, D] in the query's dtype; scores and softmax are float32.
    """
    scores = jnp.einsum("bnhd,bshd->bhns", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhns,bshd->bnhd", weights, value)


def check_window(window: int | None, sinks: int) -> None:
    """Raise ValueError unless the window holds its sinks and at least one more frame, the query's own."""
    for name, value in (("sinks", sinks), ("window", 1 if window is None else window)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise ValueError(f"{name}: expected a whole number of frames, got {value!r}")
    if sinks < 0:
        raise ValueError(f"sinks: expected a number of frames >= 0, got {sinks}")
    if window is not None and window < sinks + 1:
        raise ValueError(
            f"window: {window} frames cannot hold {sinks} sinks and the query's own frame; expected >= {sinks + 1}"
        )


def _frame_sees(query_frame: jax.Array, key_frame: jax.Array, window: int | None, sinks: int) -> jax.Array:
    causal = key_frame <= query_frame
    if window is None:
        return causal
    return causal & ((key_frame < sinks) | (key_frame > query_frame - (window - sinks)))


def _visible_prefix(tokens: jax.Array, frame: int, window: int | None, sinks: int) -> jax.Array:
    """The frames of [B, T, ...] that `frame` sees, as [B, visible, ...]."""
    start = 0 if window is None else max(sinks, frame + 1 - (window - sinks))
    if start <= sinks:
        return tokens[:, : frame + 1]
    return jnp.concatenate([tokens[:, :sinks], tokens[:, start : frame + 1]], axis=1)


def _flat(tokens: jax.Array) -> jax.Array:
    batch, frames, per_frame, *rest = tokens.shape
    return tokens.reshape(batch, frames * per_frame, *rest)


def frame_causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, window: int | None = None, sinks: int = 1
) -> jax.Array:
    """Frame-causal attention of a whole clip, OmniStream eq. 3-4.

    Args:
        query, key, value: [B, T, P, H, D], already rotated.
        window: frames that a query sees, its own and the sinks included; None sees all earlier ones.
        sinks: first frames that stay visible under a window.

    Returns:
        [B, T, P, H, D].
    """
    check_window(window, sinks)
    frames = query.shape[1]
    if frames <= _UNROLLED_GROUPS:
        outputs = [
            attention(
                query[:, t],
                _flat(_visible_prefix(key, t, window, sinks)),
                _flat(_visible_prefix(value, t, window, sinks)),
            )
            for t in range(frames)
        ]
        return jnp.stack(outputs, axis=1)

    per_group = -(-frames // _UNROLLED_GROUPS)
    per_frame = query.shape[2]
    outputs = []
    for start in range(0, frames, per_group):
        stop = min(start + per_group, frames)
        keys, values = _flat(key[:, :stop]), _flat(value[:, :stop])
        key_frame = jnp.arange(stop * per_frame) // per_frame

        def one_frame(item, keys=keys, values=values, key_frame=key_frame):
            frame, frame_query = item
            sees = _frame_sees(frame, key_frame, window, sinks)
            # Zeroed as well as masked: a NaN in a frame still to come would pass through its zero weight.
            return attention(frame_query, keys, jnp.where(sees[:, None, None], values, 0), sees)

        group = jnp.moveaxis(query[:, start:stop], 1, 0)
        outputs.append(jax.lax.map(one_frame, (jnp.arange(start, stop), group)))
    return jnp.moveaxis(jnp.concatenate(outputs), 0, 1)


def attend_cache(query: jax.Array, cache: BlockCache, frame_index: jax.Array) -> jax.Array:
    """One frame's queries to the frames in a cache, at the cost of the frames that are there.

    A loop over chunks of the cache with a running softmax (Milakov and Gimelshein 2018; FlashAttention): it ends with
    the longest stream of the batch, whatever the capacity, and no scores larger than a chunk's are ever held.

    Args:
        query: [B, P, H, D], rotated.
        cache: of one block, the present frame written.
        frame_index: int32 [B], index of the present frame in its stream.

    Returns:
        [B, P, H, D] in the query's dtype.
    """
    batch, capacity, tokens, heads, width = cache.key.shape
    # Keeping the scores of a chunk small keeps them in the processor's cache.
    chunk = min(capacity, max(1, _CHUNK_TOKENS // tokens))
    visible_frames = jnp.minimum(frame_index + 1, capacity)
    scaled = jnp.swapaxes(query, 1, 2) * query.shape[-1] ** -0.5  # [B, H, P, D]

    def read(buffer: jax.Array, start: jax.Array) -> jax.Array:  # [B, H, chunk * P, D]
        piece = jax.lax.dynamic_slice_in_dim(buffer, start, chunk, axis=1)
        return jnp.swapaxes(piece.reshape(batch, chunk * tokens, heads, width), 1, 2).astype(query.dtype)

    def one_chunk(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, summed = carry
        # The last chunk is moved back where it would pass the end; frames that were seen already are hidden.
        start = jnp.minimum(i * chunk, capacity - chunk)
        frame = start + jnp.arange(chunk * tokens) // tokens
        visible = (frame >= i * chunk) & (frame < visible_frames[:, None])  # [B, chunk * P]
        scores = jnp.einsum("bhpd,bhnd->bhpn", scaled, read(cache.key, start), preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_largest)
        shrink = jnp.exp(largest - new_largest)
        values = jnp.einsum(
            "bhpn,bhnd->bhpd",
            weights.astype(query.dtype),
            read(cache.value, start),
            preferred_element_type=jnp.float32,
        )
        return new_largest, total * shrink + weights.sum(-1, keepdims=True), summed * shrink + values

    # Every stream sees its first slot, so the first chunk makes `largest` finite.
    shape = (batch, heads, tokens)
    start = (jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width)))
    chunks = (visible_frames.max() + chunk - 1) // chunk
    _, total, summed = jax.lax.fori_loop(0, chunks, one_chunk, start)
    return jnp.swapaxes(summed / total, 1, 2).astype(query.dtype)
