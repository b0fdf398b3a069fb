"""Splash attention on a TPU: the frame-causal mask is computed inside the kernel and hidden blocks are skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from omnistream_jax.sharding import on_each_device

_LANES = 128  # sequence lengths and blocks are multiples of it
_BLOCK = 512


class _FrameCausalMask(splash_attention_mask._ComputableMask):
    """Token q of frame q // tokens sees token k of frame k // tokens where a clip's `_frame_sees` says so."""

    def __init__(self, length: int, tokens: int, window: int | None, sinks: int):
        self._key = (length, tokens, window, sinks)

        def frame_of(index):  # the kernel has no flooring division; indices are never negative
            return index // tokens if isinstance(index, np.ndarray) else jax.lax.div(index, jnp.int32(tokens))

        def sees(query_index, key_index):
            query_frame, key_frame = frame_of(query_index), frame_of(key_index)
            causal = key_frame <= query_frame
            if window is None:
                return causal
            return causal & ((key_frame < sinks) | (key_frame > query_frame - (window - sinks)))

        super().__init__((length, length), sees)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FrameCausalMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash((_FrameCausalMask, self._key))


def splash_frame_causal(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None = None,
    sinks: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """Frame-causal attention of a clip [B, T, P, H, D] in one kernel; `interpret` runs it on a CPU, for tests.

    XLA cannot split the kernel over a mesh: each device runs it on its own clips and heads.
    """
    options = {"window": window, "sinks": sinks, "interpret": interpret}
    return on_each_device(functools.partial(_attend, **options), 3)(query, key, value)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, *, window: int | None, sinks: int, interpret: bool
) -> jax.Array:
    batch, frames, tokens, heads, width = query.shape
    length = frames * tokens
    padded = -(-length // _LANES) * _LANES
    block = next(size for size in (_BLOCK, 256, _LANES) if padded % size == 0)

    def prepare(x: jax.Array) -> jax.Array:  # [B, H, padded, D]; the padding counts as later frames
        x = jnp.swapaxes(x.reshape(batch, length, heads, width), 1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    kernel = _kernel(padded, tokens, window, sinks, heads, block, interpret)
    out = jax.vmap(kernel)(prepare(query * width**-0.5), prepare(key), prepare(value))
    return jnp.swapaxes(out[:, :, :length], 1, 2).reshape(query.shape).astype(query.dtype)


def _kernel(length, tokens, window, sinks, heads, block, interpret):
    mask = splash_attention_mask.MultiHeadMask([_FrameCausalMask(length, tokens, window, sinks)] * heads)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    make = functools.partial(splash_attention_kernel.make_splash_mha, head_shards=1, q_seq_shards=1)
    return make(mask, block_sizes=sizes, interpret=interpret)
