"""How exactly matrix products of float32 are computed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
    """Of products of factors of `dtype`: `HIGHEST` for float32, which no accelerator then rounds."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else jax.lax.Precision.DEFAULT


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A module's method with products as exact as the module's own `dtype`: of float32, if it computes in that.

    By default accelerators round the factors of float32 products, to TF32 (10 bits) on NVIDIA and to bfloat16 (7 bits)
    on a TPU. Modules that compute in bfloat16 keep that default for the little that they do in float32.
    """

    @functools.wraps(method)
    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        if precision_of(module.dtype) == jax.lax.Precision.DEFAULT:
            return method(module, *args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return method(module, *args, **kwargs)

    return run
