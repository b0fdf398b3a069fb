"""Heads of self-distillation, on top of the backbone."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from omnistream_jax.ops.precision import full_precision

BOTTLENECK_EPS = 1e-12


class DinoHead(nn.Module):
    """MLP, L2-normalised bottleneck and prototypes, for DINO and for iBOT.

    DINO, Caron et al. 2021, in the form of DINOv3 (OmniStream's L_ssl, eq. 5, 11-15): the prototypes are
    a plain linear layer without bias and without weight normalisation. Weights start normal with standard
    deviation 0.02 (the prototypes with their own), biases zero.
    Parameters are float32; matrix products run in `dtype`; normalisation and logits are float32.

    Attributes:
        prototypes: number K of prototypes.
        hidden: width of the hidden layers.
        bottleneck: width of the normalised bottleneck.
        layers: number of linear layers up to the bottleneck, >= 1.
        prototype_std: standard deviation of the prototypes at the start.
        dtype: dtype of the computation.
    """

    prototypes: int
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    prototype_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Names the layers mlp_0 .. mlp_{layers - 1} and last_layer."""
        if self.layers < 1:
            raise ValueError(f"DinoHead.layers: expected at least 1, got {self.layers}")
        # PyTorch's trunc_normal_ cuts at +-2 absolute, 100 standard deviations away: a plain normal.
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        widths = [self.hidden] * (self.layers - 1) + [self.bottleneck]
        self.mlp = [dense(width) for width in widths]
        # The sum over the bottleneck is kept in float32, where a bfloat16 result would round the logits.
        self.last_layer = dense(
            self.prototypes,
            use_bias=False,
            kernel_init=nn.initializers.normal(self.prototype_std),
            dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
        )

    @full_precision
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features [..., D] to logits over prototypes, float32 [..., K]."""
        return self.last_layer(self.embed(features))

    @full_precision
    def embed(self, features: jax.Array) -> jax.Array:
        """Maps features [..., D] to the bottleneck, float32 [..., bottleneck] of unit length."""
        hidden = features
        for layer in self.mlp[:-1]:
            hidden = nn.gelu(layer(hidden), approximate=False)
        hidden = self.mlp[-1](hidden).astype(jnp.float32)
        squares = jnp.sum(jnp.square(hidden), axis=-1, keepdims=True)
        return hidden * jax.lax.rsqrt(jnp.maximum(squares, BOTTLENECK_EPS**2))
