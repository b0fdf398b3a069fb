"""Qwen3, the decoder (Yang et al. 2025, "Qwen3 Technical Report", and its released code).

Letters: B rows, L tokens of a row, D width, H query heads and K key-value heads of width W, V vocabulary, N blocks,
C slots of a cache.

A token's place is its index in the row, and decides with its segment what it sees (ops/attention.py:segment_attention);
its position is what its keys and queries are rotated by. Segment 0 is padding. So one row may hold several texts, and
texts of unequal lengths are padded on either side:

    left padding    . . a b c      packed    a b c d e .
    segments        0 0 1 1 1                1 1 1 2 2 0
    positions       0 0 0 1 2                0 1 2 0 1 0
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omnistream_jax.models.backbone import split_kernels, streaming_params
from omnistream_jax.models.block import Attend, with_remat
from omnistream_jax.ops.attention import segment_attention
from omnistream_jax.ops.precision import full_precision
from omnistream_jax.ops.rope import apply_rope
from omnistream_jax.sharding import gathered_block

_KERNEL_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """What determines a decoder's parameters and mathematics; the defaults are those of Qwen3-0.6B.

    Attributes:
        vocabulary_size: V, rows of the embedding.
        width: D of a token.
        depth: number of blocks.
        heads, kv_heads: of queries, and of keys and values; heads is a multiple of kv_heads.
        head_width: W of one head, even; heads * head_width need not be the width.
        hidden: width of the MLP.
        rope_theta: base of the rotary periods.
        norm_eps: epsilon of every RMSNorm.
        tied: logits are made with the embedding; else with a matrix of their own.
        max_length: tokens of a row that it is made for (max_position_embeddings): `generate` takes no more.
    """

    vocabulary_size: int = 151_936
    width: int = 1024
    depth: int = 28
    heads: int = 16
    kv_heads: int = 8
    head_width: int = 128
    hidden: int = 3072
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = True
    max_length: int = 40_960

    def __post_init__(self):
        for field in ("vocabulary_size", "width", "depth", "heads", "kv_heads", "head_width", "hidden", "max_length"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{field}: expected a whole number of at least 1, got {value!r}")
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{field}: expected a positive number, got {value!r}")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied: expected True or False, got {self.tied!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} query heads do not share {self.kv_heads} key-value heads evenly")
        if self.head_width % 2:
            raise ValueError(f"head_width: expected an even number (channels turn in pairs), got {self.head_width}")


# The published dense sizes; tiny is for experiments on a CPU.
DECODER_PRESETS = {
    "tiny": Qwen3Config(width=128, depth=4, heads=4, kv_heads=2, head_width=32, hidden=384),
    "0.6b": Qwen3Config(),
    "1.7b": Qwen3Config(width=2048, hidden=6144),
    "4b": Qwen3Config(width=2560, depth=36, heads=32, hidden=9728),
    "8b": Qwen3Config(width=4096, depth=36, heads=32, hidden=12_288, tied=False),
    "14b": Qwen3Config(width=5120, depth=40, heads=40, hidden=17_408, tied=False),
    "32b": Qwen3Config(width=5120, depth=64, heads=64, hidden=25_600, tied=False),
}


def decoder_preset(name: str = "0.6b", **changes: object) -> Qwen3Config:
    """The named size with some fields changed; ValueError for an unknown name."""
    if name not in DECODER_PRESETS:
        raise ValueError(f"decoder.preset: expected one of {', '.join(DECODER_PRESETS)}, got {name!r}")
    return dataclasses.replace(DECODER_PRESETS[name], **changes)


@struct.dataclass
class DecoderCache:
    """Keys and values of the tokens so far, rotated; the token at place p of its row has slot p.

    Attributes:
        keys, values: [N, B, C, K, W] in the dtype of the computation.
        segments: int32 [B, C].
        length: int32 scalar, slots that are written, the same in every row (shorter rows are padded on the left).
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """C, the tokens that a row can hold."""
        return self.keys.shape[2]

    def check_room(self, tokens: int) -> None:
        """Raise ValueError unless `tokens` more fit; inside jit only what the capacity alone tells is known."""
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + tokens > self.capacity:
            raise ValueError(
                f"decoder cache: {tokens} tokens do not fit, {used} of its {self.capacity} slots are in use"
            )


def empty_cache(config: Qwen3Config, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32) -> DecoderCache:
    """A cache for `batch` rows of at most `capacity` tokens; `dtype` is the decoder's."""
    for name, value in (("batch", batch), ("capacity", capacity)):
        if operator.index(value) < 1:
            raise ValueError(f"decoder cache: {name}: expected at least 1, got {value}")
    shape = (config.depth, batch, capacity, config.kv_heads, config.head_width)
    # Buffers of their own, so that the cache can be donated.
    segments = jnp.zeros((batch, capacity), jnp.int32)
    return DecoderCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segments, jnp.zeros((), jnp.int32))


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon), scaled; over the last axis, in float32, returned in `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d] -> [..., d]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


class DecoderBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). `attend` decides where keys and values come from."""

    config: Qwen3Config
    dtype: jnp.dtype

    def _dense(self, name: str, *features: int, axis: int | tuple[int, ...] = -1) -> nn.DenseGeneral:
        options = {"use_bias": False, "dtype": self.dtype, "kernel_init": _KERNEL_INIT}
        return nn.DenseGeneral(features, axis=axis, name=name, **options)

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        """x [B, L, D], rope tables [B, L, W]; `attend` of [B, L, H or K, W] -> ([B, L, D], its carry)."""
        config = self.config

        def norm(name: str) -> RmsNorm:
            return RmsNorm(config.norm_eps, self.dtype, name=name)

        normed = norm("attention_norm")(x)
        query = norm("query_norm")(self._dense("query", config.heads, config.head_width)(normed))
        key = norm("key_norm")(self._dense("key", config.kv_heads, config.head_width)(normed))
        value = self._dense("value", config.kv_heads, config.head_width)(normed)
        attended, carry = attend(apply_rope(query, *rope), apply_rope(key, *rope), value)
        x = x + self._dense("projection", config.width, axis=(-2, -1))(attended)

        normed = norm("mlp_norm")(x)
        gated = nn.silu(self._dense("gate", config.hidden)(normed)) * self._dense("up", config.hidden)(normed)
        return x + self._dense("down", config.width)(gated), carry


class Qwen3(nn.Module):
    """The decoder. `embed`, `__call__` and `logits` are its three parts, for `apply(..., method="embed")`.

    Attributes:
        config: sizes and mathematics.
        dtype: of the products and of the cache; parameters, the sum that runs through the blocks, norms, softmax
            and logits are float32.
        remat: one of models.block.REMAT: what of a block is kept for the backward pass, and not computed again; "auto"
            is "dots", as in models/backbone.py.
        decoding: the parameters are those of `decoding_params`, made for calls with a cache.
    """

    config: Qwen3Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "auto"
    decoding: bool = False

    def setup(self):
        """Declare the parameters; those of all blocks are stacked along a leading axis [N, ...]."""
        config = self.config
        shape = (config.vocabulary_size, config.width)  # Hugging Face's order, for either matrix
        self.embedding = self.param("embedding", _KERNEL_INIT, shape)
        if not config.tied:
            self.output = self.param("output", _KERNEL_INIT, shape)
        self.blocks = self.param("blocks", self._init_blocks)
        self.norm = RmsNorm(config.norm_eps, self.dtype)

    def _block(self) -> DecoderBlock:
        return DecoderBlock(self.config, self.dtype, parent=None)

    def _init_blocks(self, key: jax.Array) -> dict:
        token, table = jnp.zeros((1, 1, self.config.width), self.dtype), jnp.zeros((1, 1, self.config.head_width))

        def init_one(block_key: jax.Array) -> dict:
            return self._block().init(block_key, token, (table, table), lambda q, k, v: (q, None))["params"]

        stacked = jax.vmap(init_one)(jax.random.split(key, self.config.depth))
        return split_kernels(stacked) if self.decoding else stacked

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, L] -> [B, L, D]. An id outside 0 .. V - 1 is a ValueError, and inside jit becomes NaN."""
        limit = self.config.vocabulary_size
        if not isinstance(tokens, jax.core.Tracer):
            _check_tokens(np.asarray(tokens), limit)
        tokens = jnp.where(tokens < 0, limit, tokens)  # negative ids would count from the end
        return jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)

    @full_precision
    def __call__(
        self, embeddings: jax.Array, positions: jax.Array, segments: jax.Array, cache: DecoderCache | None = None
    ) -> jax.Array | tuple[jax.Array, DecoderCache]:
        """The hidden states after the final norm.

        Args:
            embeddings: [B, L, D], of text (`embed`) or of anything else.
            positions: int32 [B, L], of each token in its own text, for the rotation.
            segments: int32 [B, L]: a token sees the tokens of its own number at its own place in the row or before
                it. Numbers 1 to 99 stand alone; from 100 on 100 k is an image and 100 k + t a text that sees it too
                (utils/segments.py): number independent texts below 100, or as 100 k. 0 is padding: nothing else sees
                it, and its output is finite and means nothing.
            cache: what stands before these tokens in their rows, and room for them.

        Returns:
            [B, L, D]; with a cache also the cache with these tokens in it.

        Raises:
            ValueError: shapes that do not fit, or a full cache. A cache that overflows unseen, inside jit, makes this
                and all later hidden states NaN.
        """
        self._check(embeddings, positions, segments, cache)
        # In bfloat16 the sum would lose more than all products do: 28 blocks, 1.8 % of the logits instead of 1.3 %.
        x = embeddings.astype(jnp.float32)
        rope = _rope_tables(positions, self.config)
        if cache is None:
            return self.norm(self._run(x, rope, segments))
        hidden, cache = self._run_cached(x, rope, segments, cache)
        fits = cache.length <= cache.capacity
        return jnp.where(fits, self.norm(hidden), jnp.nan), cache

    @full_precision
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 [..., V]; for the loss of long rows see losses/language.py instead."""
        matrix = (self.embedding if self.config.tied else self.output).astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden.astype(self.dtype), matrix, preferred_element_type=jnp.float32)

    def _run(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], segments: jax.Array) -> jax.Array:
        def attend(query, key, value):
            return segment_attention(query, key, value, segments, segments), None

        def run_block(x, params):
            params = gathered_block(params, self.dtype)
            return self._block().apply({"params": params}, x, rope, attend)[0], None

        run_block = with_remat(run_block, "dots" if self.remat == "auto" else self.remat)
        return jax.lax.scan(run_block, x, self.blocks)[0]

    def _run_cached(self, x, rope, segments, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        start = cache.length
        all_segments = jax.lax.dynamic_update_slice(cache.segments, segments.astype(jnp.int32), (0, start))

        def run_block(carry, block):
            x, *buffers = carry  # carried whole, so that each block writes its few slots in place
            params, layer = block

            def attend(query, *key_and_value):
                written = [
                    jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), (layer, 0, start, 0, 0))
                    for buffer, new in zip(buffers, key_and_value, strict=True)
                ]
                seen = (jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False) for buffer in written)
                return segment_attention(query, *seen, segments, all_segments, start), written

            x, written = self._block().apply({"params": params}, x, rope, attend)
            return (x, *written), None

        carry, depth = (x, cache.keys, cache.values), self.config.depth
        if self.decoding:
            for i in range(depth):
                carry, _ = run_block(carry, (_one_block(self.blocks, i), i))
        else:
            carry, _ = jax.lax.scan(run_block, carry, (self.blocks, jnp.arange(depth)))
        x, keys, values = carry
        return x, DecoderCache(keys, values, all_segments, start + segments.shape[1])

    def _check(self, embeddings, positions, segments, cache: DecoderCache | None) -> None:
        config = self.config
        if embeddings.ndim != 3 or embeddings.shape[-1] != config.width:
            raise ValueError(f"embeddings: expected [B, L, {config.width}], got {list(embeddings.shape)}")
        batch, length = embeddings.shape[:2]
        for name, array in (("positions", positions), ("segments", segments)):
            if array.shape != (batch, length) or not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name}: expected integers [{batch}, {length}], got {array.dtype}{list(array.shape)}")
        if cache is None:
            if self.decoding:
                raise ValueError("cache: parameters for decoding need one; without it take those of training")
            return
        expected = (config.depth, batch, cache.capacity, config.kv_heads, config.head_width)
        if cache.keys.shape != expected or cache.keys.dtype != jnp.dtype(self.dtype):
            raise ValueError(
                f"cache: expected keys of {jnp.dtype(self.dtype)}{list(expected)}, "
                f"got {cache.keys.dtype}{list(cache.keys.shape)}"
            )
        cache.check_room(length)


def output_matrix(params: Mapping[str, Any], config: Qwen3Config) -> jax.Array:
    """The matrix [V, D] that `Qwen3.logits` multiplies with, out of the decoder's parameters: for the fused loss."""
    return params["embedding" if config.tied else "output"]


def init_decoder(model: Qwen3, key: jax.Array) -> dict[str, Any]:
    """Random parameters: normal with standard deviation 0.02, as Qwen's code has it, norms one."""
    row = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, jnp.zeros((1, 1, model.config.width), model.dtype), row, row)["params"]


def decoding_params(params: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """The parameters for `Qwen3(decoding=True)`: each block's kernels apart, and what is cast to `dtype` cast once.

    A token's step that slices stacked kernels copies them, which triples its time on a CPU; but 28 blocks compile more
    slowly than one scan. On a CPU in float32 the kernels are views and take no memory.
    """
    return streaming_params(dict(params), dtype)


def _one_block(blocks: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The parameters of one block: a leaf is stacked or a tuple, and both take an index."""
    return jax.tree.map(lambda leaf: leaf[index], blocks, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _rope_tables(positions: jax.Array, config: Qwen3Config) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, L, W], for channels paired i and i + W/2: RoFormer (Su et al. 2021)."""
    half = config.head_width // 2
    frequencies = config.rope_theta ** -(np.arange(half) / half)
    angles = positions.astype(jnp.float32)[..., None] * np.tile(frequencies, 2).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _check_tokens(tokens: np.ndarray, vocabulary_size: int) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens: expected integers, got {tokens.dtype}")
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary_size)]
    if wrong.size:
        raise ValueError(f"tokens: expected ids 0 to {vocabulary_size - 1}, got {wrong[0]}")
