"""One transformer block: x += ls1 * attention(norm1(x)); x += ls2 * mlp(norm2(x)).

The block does not know where keys and values come from: the caller passes `attend`, a function of the rotated query,
key and value of the present frames, which returns the attended values and whatever it has to carry (a cache).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.ops.rope import apply_rope
from omnistream_jax.sharding import GATHERED, gathers

REMAT = ("auto", "none", "dots", "block")
"""What is kept for a block's backward pass: what is fastest, everything, its products, or its input alone."""

# (query, key, value), each [B, T, P, H, D] -> (attended [B, T, P, H, D], carry)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def kernel_init(config: BackboneConfig) -> nn.initializers.Initializer:
    """How every kernel of a backbone starts."""
    return nn.initializers.truncated_normal(config.kernel_std)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with erf, as PyTorch computes it; `nn.gelu` goes through erfc, three times as slow on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def with_remat(run_block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """A block's function that keeps for its backward pass what `remat` says, "none", "dots" or "block".

    Parameters that a mesh splits are kept split, and gathered again (sharding.py): not even "none" keeps them whole.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        if not gathers():
            return run_block
        policy = policies.save_anything_except_these_names(GATHERED)
    elif remat in ("dots", "block"):
        policy = policies.dots_saveable if remat == "dots" else None
    else:
        raise ValueError(f"remat: expected one of {', '.join(REMAT)}, got {remat!r}")
    return jax.checkpoint(run_block, prevent_cse=False, policy=policy)  # a scan already keeps the two passes apart


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32, returned in `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d] -> [..., d]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries, keys and values come from one kernel."""

    config: BackboneConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        """x [B, T, P, d], rope tables [B or 1, T, P, D] -> ([B, T, P, d], carry)."""
        config = self.config
        heads, head_width = config.heads, config.head_width
        kernel = self.param("qkv_kernel", kernel_init(config), (config.width, 3, heads, head_width))
        has_bias = {"query": config.query_bias, "key": config.key_bias, "value": config.value_bias}
        zeros = nn.initializers.zeros
        biases = [
            self.param(f"{name}_bias", zeros, (heads, head_width)) if exists else jnp.zeros((heads, head_width))
            for name, exists in has_bias.items()
        ]
        qkv = jnp.einsum("btpd,dche->btpche", x, kernel.astype(self.dtype)) + jnp.stack(biases).astype(self.dtype)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        attended, carry = attend(apply_rope(query, *rope), apply_rope(key, *rope), value)
        projection = nn.DenseGeneral(
            config.width,
            axis=(-2, -1),
            use_bias=config.projection_bias,
            dtype=self.dtype,
            kernel_init=kernel_init(config),
            name="projection",
        )
        return projection(attended), carry


class Mlp(nn.Module):
    """GELU(x W1) W2, or SwiGLU (silu(x W1) * x W2) W3."""

    config: BackboneConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d] -> [..., d]."""
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            init = kernel_init(config)
            return nn.Dense(features, use_bias=config.mlp_bias, dtype=self.dtype, kernel_init=init, name=name)

        hidden = dense(config.mlp_width, "hidden")(x)
        if config.mlp == "swiglu":
            hidden = nn.silu(dense(config.mlp_width, "gate")(x)) * hidden
        else:
            hidden = exact_gelu(hidden)
        return dense(config.width, "output")(hidden)


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale on both branches."""

    config: BackboneConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        """x [B, T, P, d] -> ([B, T, P, d], carry of `attend`)."""
        config = self.config
        scale_init = nn.initializers.constant(config.layer_scale)
        scales = [self.param(f"layer_scale{i}", scale_init, (config.width,)).astype(self.dtype) for i in (1, 2)]
        normed = LayerNorm(config.norm_epsilon, self.dtype, name="norm1")(x)
        attended, carry = Attention(config, self.dtype, name="attention")(normed, rope, attend)
        x = x + scales[0] * attended
        normed = LayerNorm(config.norm_epsilon, self.dtype, name="norm2")(x)
        return x + scales[1] * Mlp(config, self.dtype, name="mlp")(normed), carry
