"""L2 normalisation with a floor on the norm, safe to differentiate at zero."""

import jax
import jax.numpy as jnp


def l2_normalize(features: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Divides each vector by max(its L2 norm, eps), in float32.

    Args:
        features: [..., D], any float dtype.
        eps: floor of the norm; must be >= 1e-18, so that its square is a float32.

    Returns:
        float32 [..., D]. The gradient is finite everywhere, also at the zero vector.
    """
    features = features.astype(jnp.float32)
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # The floor is inside the root: the derivative of a bare norm is NaN at zero.
    return features * jax.lax.rsqrt(jnp.maximum(squares, eps**2))
