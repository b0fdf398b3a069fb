"""The key-value cache of a stream: one buffer of keys and one of values per block, in slots of one frame each.

An unbounded stream puts frame t in slot t. A window of W frames with S sinks is a ring: frames 0 .. S-1 keep their
slots for ever, later ones reuse the other W - S in turn, so that after a frame is written the buffer holds exactly
the frames it may see:

    W = 4, S = 1     slot  0 1 2 3
    after frame 3          0 1 2 3
    after frame 5          0 4 5 3

Keys are cached already rotated by their true time index, so the order of slots does not matter. A slot is visible
once written; buffers start at zero because NaN in an unwritten slot would leak through zero weights.

In eight bits each frame is rounded on its own: keys with one scale per head and channel, because a few channels of
keys are far larger than the rest, and values with one per token and head.
"""

import jax
import jax.numpy as jnp
from flax import struct

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")
_INT8_MAX = 127.0


@struct.dataclass
class BlockCache:
    """Keys and values of one block.

    Attributes:
        key, value: [B, capacity, P, H, D], capacity in frames.
        key_scale: float32 [B, capacity, H, D], what a unit of an int8 key is worth; None for floating-point caches.
        value_scale: float32 [B, capacity, P, H], likewise for values.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """Frames that the buffers hold."""
        return self.key.shape[1]


def empty_cache(batch: int, capacity: int, tokens: int, heads: int, head_width: int, dtype: jnp.dtype) -> BlockCache:
    """A cache of zeros for `batch` streams of frames of `tokens` tokens; `dtype` is one of CACHE_DTYPES."""
    shape = (batch, capacity, tokens, heads, head_width)
    cache = BlockCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if jnp.dtype(dtype) != jnp.int8:
        return cache
    return cache.replace(
        key_scale=jnp.zeros((batch, capacity, heads, head_width)),
        value_scale=jnp.zeros((batch, capacity, tokens, heads)),
    )


def frame_slot(frame_index: jax.Array, window: int | None, sinks: int) -> jax.Array:
    """The slot that frame `frame_index` [B] takes: int32 [B]."""
    if window is None:
        return frame_index
    in_ring = sinks + (frame_index - sinks) % (window - sinks)
    return jnp.where(frame_index < sinks, frame_index, in_ring)


def write_frame(cache: BlockCache, key: jax.Array, value: jax.Array, slot: jax.Array) -> BlockCache:
    """Put one frame's keys and values [B, P, H, D] into slot [B] of each stream."""
    frame = _encode_frame(cache, key, value)
    # One update a stream, unrolled: a scatter over the batch is not done in place.
    for b in range(slot.shape[0]):
        cache = jax.tree.map(
            lambda buffer, new, b=b: jax.lax.dynamic_update_slice(
                buffer, new[b][None, None], (b, slot[b], *[0] * (new.ndim - 1))
            ),
            cache,
            frame,
        )
    return cache


def read_frames(
    cache: BlockCache, start: jax.Array | int, frames: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the slots start .. start + frames - 1: [B, frames, P, H, D] each, in `dtype`."""
    piece = jax.tree.map(lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, start, frames, axis=1), cache)
    return _decode(piece, dtype)


def grow_cache(cache: BlockCache, capacity: int) -> BlockCache:
    """The same cache with room for `capacity` frames."""

    def pad(buffer: jax.Array) -> jax.Array:
        return jnp.pad(buffer, ((0, 0), (0, capacity - cache.capacity), *[(0, 0)] * (buffer.ndim - 2)))

    return jax.tree.map(pad, cache)


def _encode_frame(cache: BlockCache, key: jax.Array, value: jax.Array) -> BlockCache:
    """One frame [B, P, H, D] as the cache stores it, without the axis of slots."""
    if cache.key_scale is None:
        return BlockCache(key.astype(cache.key.dtype), value.astype(cache.value.dtype))
    key_scale = _scale(key, axis=1)  # [B, H, D]
    value_scale = _scale(value, axis=3)  # [B, P, H]
    return BlockCache(_round(key, key_scale[:, None]), _round(value, value_scale[..., None]), key_scale, value_scale)


def _scale(x: jax.Array, axis: int) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)).max(axis) / _INT8_MAX


def _round(x: jax.Array, scale: jax.Array) -> jax.Array:
    units = x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1.0)  # a channel of zeros has scale 0
    return jnp.round(units).astype(jnp.int8)


def _decode(cache: BlockCache, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    if cache.key_scale is None:
        return cache.key.astype(dtype), cache.value.astype(dtype)
    key = cache.key.astype(jnp.float32) * cache.key_scale[:, :, None]
    value = cache.value.astype(jnp.float32) * cache.value_scale[..., None]
    return key.astype(dtype), value.astype(dtype)
