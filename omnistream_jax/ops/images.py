"""Pixels to the model's input range."""

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalize_frames(frames: jax.Array) -> jax.Array:
    """uint8 RGB [..., 3] to float32 by the ImageNet mean and deviation; floats pass as they are, already normalised."""
    if frames.dtype == jnp.uint8:
        return (frames.astype(jnp.float32) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    return frames.astype(jnp.float32)


def patchify(frames: jax.Array, patch_size: int) -> jax.Array:
    """Frames [B, T, H, W, C] to flattened patches [B, T, H/p * W/p, p * p * C], row-major, channels last."""
    batch, time, height, width, channels = frames.shape
    rows, columns = height // patch_size, width // patch_size
    x = frames.reshape(batch, time, rows, patch_size, columns, patch_size, channels)
    x = x.swapaxes(3, 4)  # [B, T, rows, columns, p, p, C]
    return x.reshape(batch, time, rows * columns, patch_size * patch_size * channels)
