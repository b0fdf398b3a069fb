"""V-JEPA 2's attentive probe: self-attention over all tokens of a video, then one learnable query, then a linear map.

B videos, N tokens of width D, H heads.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from omnistream_jax.models.block import LayerNorm, exact_gelu
from omnistream_jax.ops.attention import attention, attention_path
from omnistream_jax.ops.cudnn import cudnn_attention
from omnistream_jax.ops.precision import full_precision
from omnistream_jax.ops.splash import splash_frame_causal

KERNEL_STD = 0.02
"""Of kernels and of the query; PyTorch's trunc_normal_ cuts at +-2 absolute, 100 of them away: a plain normal."""

_WHOLE_SCORES = 2048**2  # scores of a head up to which no loop over queries is worth it
_QUERY_CHUNK = 512


class AttentiveProbe(nn.Module):
    """The classifier of V-JEPA 2's frozen evaluations (Assran et al. 2025; OmniStream, Tab. 11).

    depth - 1 pre-norm self-attention blocks, a cross-attention block without an output projection, whose one query is
    learnt, and a linear layer, without a norm before it. Starts as V-JEPA 2's: kernels and the query normal with
    deviation 0.02; the output kernels (of attention and MLP) of self-attention block l = 1, 2, ... divided by
    sqrt(2 l), and the cross-attention's MLP output likewise with the last block's l; biases zero; the linear layer
    uniform within 1 / sqrt(D), its bias too (PyTorch's default, which nothing there changes).
    Parameters are float32; products run in `dtype`; norms, softmax and the linear layer in float32.

    Attributes:
        classes: C, outputs.
        heads: of attention; they divide D.
        depth: blocks, the cross-attention included.
        hidden: width of the MLPs; None: 4 D.
        norm_epsilon: of every LayerNorm: 1e-5 in V-JEPA 2, 1e-6 in the files of `transformers`.
        remat: whether only each block's input is kept for the backward pass.
        dtype: of the computation.
    """

    classes: int
    heads: int
    depth: int
    hidden: int | None = None
    norm_epsilon: float = 1e-5
    remat: bool = True
    dtype: DTypeLike = jnp.float32

    @full_precision
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, N, D] of videos to logits, float32 [B, C]."""
        hidden = self.hidden or 4 * tokens.shape[-1]
        sizes = (self.heads, self.depth, hidden, self.norm_epsilon, self.remat, self.dtype)
        pooled = AttentivePooler(*sizes, name="pooler")(tokens)
        bound = _symmetric_uniform(pooled.shape[-1] ** -0.5)
        return nn.Dense(self.classes, dtype=jnp.float32, kernel_init=bound, bias_init=bound, name="linear")(pooled)


class AttentivePooler(nn.Module):
    """The probe without its linear layer: its attributes are those of `AttentiveProbe`."""

    heads: int
    depth: int
    hidden: int
    norm_epsilon: float = 1e-5
    remat: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, N, D] to one vector a video, float32 [B, D].

        Raises:
            ValueError: the heads do not divide D, or there is no block.
        """
        width = tokens.shape[-1]
        if self.depth < 1:
            raise ValueError(f"depth: expected 1 block or more, the cross-attention included, got {self.depth}")
        if self.heads < 1 or width % self.heads:
            raise ValueError(f"heads: expected a divisor of the tokens' width {width}, got {self.heads}")
        query = self.param("query", nn.initializers.normal(KERNEL_STD), (width,))
        make_block, make_cross = _SelfAttentionBlock, _CrossAttentionBlock
        if self.remat:
            make_block, make_cross = nn.remat(make_block), nn.remat(make_cross)
        sizes = (self.heads, self.hidden, self.norm_epsilon, self.dtype)
        tokens = tokens.astype(self.dtype)
        for layer in range(1, self.depth):
            tokens = make_block(*sizes, KERNEL_STD / math.sqrt(2 * layer), name=f"block_{layer - 1}")(tokens)
        last = max(self.depth - 1, 1)
        cross = make_cross(*sizes, KERNEL_STD / math.sqrt(2 * last), name="cross")
        return cross(query.astype(self.dtype), tokens).astype(jnp.float32)


class _SelfAttentionBlock(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    heads: int
    hidden: int
    norm_epsilon: float
    dtype: DTypeLike
    output_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, N, D] -> [B, N, D]."""
        batch, count, width = x.shape
        normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm1")(x)
        qkv = _dense(3 * width, self.dtype, name="qkv")(normed)
        query, key, value = jnp.moveaxis(qkv.reshape(batch, count, 3, self.heads, width // self.heads), 2, 0)
        attended = token_attention(query, key, value).reshape(x.shape)
        x = x + _dense(width, self.dtype, self.output_std, name="projection")(attended)
        normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm2")(x)
        return x + _Mlp(self.hidden, self.output_std, self.dtype, name="mlp")(normed)


class _CrossAttentionBlock(nn.Module):
    """q += attention(q, norm1(x)); q += mlp(norm2(q)). The query is not normed, the attended values not projected."""

    heads: int
    hidden: int
    norm_epsilon: float
    dtype: DTypeLike
    output_std: float

    @nn.compact
    def __call__(self, query: jax.Array, x: jax.Array) -> jax.Array:
        """query [D], x [B, N, D] -> [B, D]."""
        batch, count, width = x.shape
        per_head = (self.heads, width // self.heads)
        asked = _dense(width, self.dtype, name="query")(query).reshape(1, 1, *per_head)
        normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm1")(x)
        key_value = _dense(2 * width, self.dtype, name="key_value")(normed)
        key, value = jnp.moveaxis(key_value.reshape(batch, count, 2, *per_head), 2, 0)
        attended = attention(jnp.broadcast_to(asked, (batch, *asked.shape[1:])), key, value)
        pooled = query + attended.reshape(batch, width)
        normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm2")(pooled)
        return pooled + _Mlp(self.hidden, self.output_std, self.dtype, name="mlp")(normed)


class _Mlp(nn.Module):
    """GELU(x W1) W2, the exact GELU."""

    hidden: int
    output_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        hidden = exact_gelu(_dense(self.hidden, self.dtype, name="hidden")(x))
        return _dense(x.shape[-1], self.dtype, self.output_std, name="output")(hidden)


def _dense(features: int, dtype: DTypeLike, std: float = KERNEL_STD, *, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)


def _symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def token_attention(query: jax.Array, key: jax.Array, value: jax.Array, query_chunk: int | None = None) -> jax.Array:
    """Attention of every token to every other, in memory that grows with N only, not with its square.

    Eight clips of 16 frames of 256 patches are 32,768 tokens, whose scores are 2 GB a head in bfloat16. On NVIDIA and
    TPUs a fused kernel computes them; else a loop over chunks of queries, each computed again in the backward pass.

    Args:
        query, key, value: [B, N, H, D].
        query_chunk: queries at once on the loop's way; None takes it for long videos only.

    Returns:
        [B, N, H, D].
    """
    _, count, _, width = query.shape
    path = attention_path(query.dtype, width)
    if query_chunk is None:
        if path == "cudnn" and count % 2 == 0:  # odd counts need lengths, which vmap cannot take
            return cudnn_attention(query, key, value)
        if path == "splash":  # a clip of a single frame, in which all see all
            return splash_frame_causal(query[:, None], key[:, None], value[:, None])[:, 0]
        if count**2 <= _WHOLE_SCORES:
            return attention(query, key, value)
        query_chunk = _QUERY_CHUNK
    chunks = -(-count // query_chunk)
    padded = jnp.pad(query, ((0, 0), (0, chunks * query_chunk - count), (0, 0), (0, 0)))
    pieces = jnp.moveaxis(padded.reshape(query.shape[0], chunks, query_chunk, *query.shape[2:]), 1, 0)
    one_chunk = jax.checkpoint(lambda piece: attention(piece, key, value), prevent_cse=False)
    attended = jnp.moveaxis(jax.lax.map(one_chunk, pieces), 0, 1)
    return attended.reshape(padded.shape)[:, :count]
