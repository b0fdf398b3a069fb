"""The projector: visual tokens as the decoder's inputs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from omnistream_jax.ops.precision import full_precision

PROJECTOR, DECODER = "projector", "decoder"
"""The names of the two in the parameters of a training run and of a language model."""


class Projector(nn.Module):
    """Two linear layers with an exact GELU between, from the backbone's width to the decoder's.

    The two-layer MLP in front of OmniStream's decoder (L_cap, eq. 9), that of LLaVA-1.5 (Liu et al. 2023); both layers
    have the decoder's width. Kernels start normal with standard deviation 0.02 and biases zero, as transformers
    initialises LLaVA's (initializer_range; Qwen3's is the same, so that new weights on both sides fit each other).
    Parameters are float32; the computation runs in `dtype`.

    Attributes:
        width: of the decoder.
        dtype: dtype of the computation and of the result.
    """

    width: int
    dtype: DTypeLike = jnp.float32

    @full_precision
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps visual tokens [..., backbone's width] to [..., width]."""
        dense = partial(nn.Dense, self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        return dense(name="mlp_1")(nn.gelu(dense(name="mlp_0")(tokens), approximate=False))


@partial(jax.jit, static_argnums=0)
def project(projector: Projector, params: Mapping[str, Any], patches: jax.Array) -> jax.Array:
    """Patches [B, T, h, w, backbone's width] as visual tokens [B, T h w, width], frame by frame."""
    return projector.apply({"params": params}, patches.reshape(len(patches), -1, patches.shape[-1]))
