"""Rotation matrices and quaternions (x, y, z, w)."""

import jax
import jax.numpy as jnp

from omnistream_jax.geometry.arrays import matrix_of, require_shape, to_float


def quaternion_to_matrix(quaternion: jax.Array) -> jax.Array:
    """The rotation of a quaternion of any length but zero.

    Args:
        quaternion: [..., 4], (x, y, z, w). Its length has no effect; the zero quaternion gives NaN.

    Returns:
        [..., 3, 3], float32 (float64 if given). Gradients are finite wherever the values are.

    Raises:
        ValueError: a last axis that is not 4 long.
    """
    require_shape("quaternion", quaternion, 4)
    (quaternion,) = to_float(quaternion)
    # Squares of very short or long quaternions would leave float32; the result is the same at any length.
    quaternion = quaternion / jax.lax.stop_gradient(jnp.max(jnp.abs(quaternion), axis=-1, keepdims=True))
    x, y, z, w = jnp.moveaxis(quaternion, -1, 0)
    s = 2 / jnp.sum(jnp.square(quaternion), axis=-1)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return matrix_of(rows)


def matrix_to_quaternion(rotation: jax.Array) -> jax.Array:
    """The unit quaternion of a rotation, with w >= 0.

    Every entry of the matrix 4 q q^T is a sum of entries of the rotation (Shepperd 1978; Markley 2008), and each of
    its rows is a multiple of q. The one with the largest diagonal entry, at least 1, is normalised: no root or quotient
    comes near zero, so values and gradients are good everywhere. At turns by 180 degrees w is 0 and both signs stand
    for the same rotation; there the largest component is positive.

    Args:
        rotation: [..., 3, 3], rotation matrices; small deviations from orthogonality are averaged out in part.

    Returns:
        [..., 4], (x, y, z, w), float32 (float64 if given).

    Raises:
        ValueError: last axes that are not 3 x 3.
    """
    require_shape("rotation", rotation, 3, 3)
    (rotation,) = to_float(rotation)
    (a, b, c), (d, e, f), (g, h, i) = jnp.moveaxis(rotation, (-2, -1), (0, 1))
    rows = [
        [1 + a - e - i, b + d, c + g, h - f],
        [b + d, 1 - a + e - i, f + h, c - g],
        [c + g, f + h, 1 - a - e + i, d - b],
        [h - f, c - g, d - b, 1 + a + e + i],
    ]
    products = matrix_of(rows)
    largest = jnp.argmax(jnp.diagonal(products, axis1=-2, axis2=-1), axis=-1)
    row = jnp.take_along_axis(products, largest[..., None, None], axis=-2)[..., 0, :]
    quaternion = row / jnp.linalg.norm(row, axis=-1, keepdims=True)
    return jnp.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
