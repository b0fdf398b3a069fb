"""The camera head: pose and field of view from the camera token."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from omnistream_jax.geometry.cameras import FIELDS_OF_VIEW
from omnistream_jax.models.dpt import OUTPUT_INIT


class CameraHead(nn.Module):
    """An MLP of two hidden layers on each frame's camera token.

    Depth Anything 3, Lin et al. 2025 (CameraDec), which OmniStream's L_camera (eq. 8) trains. Hidden kernels start
    LeCun-normal, the output layer's near zero and its biases so that the start is about the identity pose
    with 1 rad of view, where the ReLU passes gradients.
    Parameters are float32; the hidden layers run in `dtype`, the output layer in float32.

    Attributes:
        width: of the hidden layers (Depth Anything 3: the token's own).
        dtype: dtype of the hidden layers.
    """

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, camera: jax.Array) -> jax.Array:
        """Maps camera tokens [..., D] to the nine numbers of a camera, float32 [..., 9].

        Translation 3; quaternion 4 (x, y, z, w), not normalised; vertical and horizontal field of view 2, radians >= 0.
        """
        x = camera
        for name in ("hidden_0", "hidden_1"):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, name=name)(x))
        output = nn.Dense(
            9,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=OUTPUT_INIT,
            bias_init=_identity_pose,
            name="output",
        )
        pose = output(x)
        view = nn.relu(pose[..., FIELDS_OF_VIEW])
        return jnp.concatenate([pose[..., : FIELDS_OF_VIEW.start], view], axis=-1)


def _identity_pose(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """No translation, no rotation, 1 rad of view; the key is unused."""
    return jnp.array([0, 0, 0, 0, 0, 0, 1, 1, 1], dtype).reshape(shape)
