"""Gram anchoring: keeps the similarities between patches where an earlier teacher had them."""

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.losses.normalize import l2_normalize

CUBIC_COEFFICIENT = -0.75


def gram_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference between the Gram matrices of normalised patch features, per image.

    One term of L_ssl (OmniStream eq. 5, 11-15); DINOv3, Siméoni et al. 2025, section 4. The papers write
    the squared Frobenius norm, a sum; DINOv3's code takes the mean over entries, and so does this.

    Args:
        student: [B, N, D], N patches of B images, any float dtype; L2-normalised here.
        teacher: [B, N, D'] features of the Gram teacher at the same patches; no gradient flows into them.

    Returns:
        float32 scalar.

    Raises:
        ValueError: shapes that do not fit.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"expected student and teacher [B, N, width] with equal B and N, got {student.shape} and {teacher.shape}"
        )
    difference = _gram(student) - _gram(jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.square(difference))


def _gram(features: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, N, N], cosines between the patches of an image."""
    features = l2_normalize(features)
    # b: image; n, m: patch; d: width
    return jnp.einsum("bnd,bmd->bnm", features, features, precision=jax.lax.Precision.HIGHEST)


def resize_patches(features: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes a map of patch features bicubically, for a Gram teacher at a higher resolution.

    The kernel is Keys' cubic convolution (1981) with a = -0.75, cell centres aligned (align_corners=False),
    borders repeated, and no antialiasing when shrinking: DINOv3 resizes the Gram teacher's
    features with PyTorch's F.interpolate, and this gives its values. `jax.image.resize`
    has a = -0.5 and other borders, and antialiases by default, so it cannot stand in.

    Args:
        features: [B, h, w, D], any float dtype.
        height: rows of the result, >= 1.
        width: columns of the result, >= 1.

    Returns:
        float32 [B, height, width, D].

    Raises:
        ValueError: features that are not [B, h, w, D], or a size below 1.
    """
    if features.ndim != 4:
        raise ValueError(f"features: expected [B, h, w, D], got shape {features.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width: expected at least 1, got {height} and {width}")
    if features.shape[1:3] == (height, width):
        return features.astype(jnp.float32)
    rows = cubic_matrix(features.shape[1], height)
    columns = cubic_matrix(features.shape[2], width)
    # y, x: new cell; h, w: old cell
    return jnp.einsum(
        "yh,xw,bhwd->byxd",
        rows,
        columns,
        features.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def cubic_matrix(size: int, new_size: int) -> np.ndarray:
    """The weights of `resize_patches` along one axis: float32 [new_size, size], rows sum to one."""
    centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new_size, size))
    for tap in range(4):
        index = first + tap
        # A tap outside the map reads the border cell; several taps may add up there.
        np.add.at(matrix, (np.arange(new_size), index.clip(0, size - 1)), _cubic(centre - index))
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel at signed distances, in cells."""
    a, x = CUBIC_COEFFICIENT, np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
