"""What all of geometry computes in: float32 at full precision, checked shapes."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Matrix products at the accelerators' default precision keep 8 to 11 bits: too few for a pose.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def to_float(*arrays: ArrayLike) -> list[jax.Array]:
    """The arrays in one type: float64 if one of them is float64 (which needs JAX's x64 mode), else float32."""
    found = [jnp.asarray(array) for array in arrays]
    dtype = jnp.promote_types(jnp.result_type(*found), jnp.float32)
    return [array.astype(dtype) for array in found]


def require_shape(name: str, array: ArrayLike, *ending: int) -> None:
    """Raises ValueError unless the array's shape ends in `ending`."""
    shape = jnp.shape(array)
    if len(shape) < len(ending) or shape[len(shape) - len(ending) :] != ending:
        raise ValueError(f"{name}: expected shape [..., {', '.join(map(str, ending))}], got {list(shape)}")


def matrix_of(rows: list[list[jax.Array]]) -> jax.Array:
    """Matrices [..., len(rows), len(rows[0])] of their entries, each of shape [...]."""
    entries = jnp.stack([entry for row in rows for entry in row], axis=-1)
    return entries.reshape(*entries.shape[:-1], len(rows), len(rows[0]))
