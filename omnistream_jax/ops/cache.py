"""The key-value cache of a stream: one buffer of keys and one of values per block, in slots of one frame each.

An unbounded stream puts frame t in slot t. A window of W frames with S sinks is a ring: frames 0 .. S-1 keep their
slots for ever, later ones reuse the other W - S in turn, so that after a frame is written the buffer holds exactly
the frames it may see:

    W = 4, S = 1     slot  0 1 2 3
    after frame 3          0 1 2 3
    after frame 5          0 4 5 3

Keys are cached already rotated by their true time index, so the order of slots does not matter. A slot is visible
once written; buffers start at zero because NaN in an unwritten slot would leak through zero weights.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class BlockCache:
    """Keys and values of one block: [B, capacity, P, H, D] each, capacity in frames."""

    key: jax.Array
    value: jax.Array

    @property
    def capacity(self) -> int:
        """Frames that the buffers hold."""
        return self.key.shape[1]


def empty_cache(batch: int, capacity: int, tokens: int, heads: int, head_width: int, dtype: jnp.dtype) -> BlockCache:
    """A cache of zeros for `batch` streams of frames of `tokens` tokens."""
    shape = (batch, capacity, tokens, heads, head_width)
    return BlockCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def frame_slot(frame_index: jax.Array, window: int | None, sinks: int) -> jax.Array:
    """The slot that frame `frame_index` [B] takes: int32 [B]."""
    if window is None:
        return frame_index
    in_ring = sinks + (frame_index - sinks) % (window - sinks)
    return jnp.where(frame_index < sinks, frame_index, in_ring)


def write_frame(cache: BlockCache, key: jax.Array, value: jax.Array, slot: jax.Array) -> BlockCache:
    """Put one frame's keys and values [B, P, H, D] into slot [B] of each stream."""
    key_buffer, value_buffer = cache.key, cache.value
    # One update a stream, unrolled: a scatter over the batch is not done in place.
    for b in range(slot.shape[0]):
        start = (b, slot[b], 0, 0, 0)
        key_buffer = jax.lax.dynamic_update_slice(key_buffer, key[b][None, None].astype(key_buffer.dtype), start)
        value_buffer = jax.lax.dynamic_update_slice(
            value_buffer, value[b][None, None].astype(value_buffer.dtype), start
        )
    return BlockCache(key_buffer, value_buffer)


def grow_cache(cache: BlockCache, capacity: int) -> BlockCache:
    """The same cache with room for `capacity` frames."""
    room = ((0, 0), (0, capacity - cache.capacity), (0, 0), (0, 0), (0, 0))
    return BlockCache(jnp.pad(cache.key, room), jnp.pad(cache.value, room))
