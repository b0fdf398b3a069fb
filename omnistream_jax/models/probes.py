"""Linear heads on frozen features: classes, depth by bins, segmentation; and how their maps become pixels.

DINOv3's protocols (Siméoni et al. 2025, its eval/ folder; OmniStream's Table 10). Parameters and the whole computation
are float32 at the highest matrix precision: the heads are small, and what they are compared by is small too.
Weights start normal with standard deviation 0.01, biases zero.

Legend: ... leading axes (clips, frames), h x w patches, D channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

BIN_FLOOR = 0.1  # every bin keeps so much weight before the weights are normalised
_Dense = partial(nn.Dense, kernel_init=nn.initializers.normal(0.01), precision=jax.lax.Precision.HIGHEST)


class LinearClassifier(nn.Module):
    """One linear layer.

    Attributes:
        classes: how many logits.
    """

    classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features [..., D] to logits, float32 [..., classes]."""
        return _Dense(self.classes, name="linear")(features.astype(jnp.float32))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    PyTorch keeps the unbiased variance of a batch in the running one and normalises by the biased one; Flax's layer
    keeps the biased one, which differs for small batches. Under jit the batch is the global one, whatever the mesh:
    that is what PyTorch calls SyncBatchNorm.

    Attributes:
        momentum: share of the new batch in the running statistics.
        epsilon: added to the variance.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x [..., D], float32; `train`: by its own statistics, which then enter the running ones.

        There the collection "batch_stats" must be mutable.
        """
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, (width,), jnp.float32)
        mean, variance = running_mean.value, running_variance.value
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axes)
            variance = jnp.mean(jnp.square(x - mean), axes)
            count = x.size // width
            if not self.is_initializing():
                running_mean.value = _blend(running_mean.value, mean, self.momentum)
                unbiased = variance * (count / max(count - 1, 1))
                running_variance.value = _blend(running_variance.value, unbiased, self.momentum)
        return (x - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias


def _blend(old: jax.Array, new: jax.Array, share: float) -> jax.Array:
    return (1 - share) * old + share * new


class LinearDepth(nn.Module):
    """Batch normalisation and one linear layer to weights of depth bins; the depth is their weighted mean.

    The weights are relu(x) + 0.1, normalised to sum 1 (AdaBins, Bhat et al. 2021, in DINOv3's form); the bins are
    spread evenly from min_depth to max_depth, both included.

    Attributes:
        bins: how many, 2 or more.
        min_depth: metres, > 0.
        max_depth: metres, > min_depth.
    """

    bins: int
    min_depth: float
    max_depth: float

    @nn.compact
    def __call__(self, patches: jax.Array, train: bool) -> jax.Array:
        """Maps patches [..., h, w, D] to depth in metres, float32 [..., h, w]; `train` as in `BatchNorm`."""
        x = BatchNorm(name="norm")(patches.astype(jnp.float32), train)
        weights = nn.relu(_Dense(self.bins, name="linear")(x)) + BIN_FLOOR
        centres = np.linspace(self.min_depth, self.max_depth, self.bins, dtype=np.float32)
        total = jnp.einsum("...k,k->...", weights, centres, precision=jax.lax.Precision.HIGHEST)
        return total / jnp.sum(weights, axis=-1)


class LinearSegmentation(nn.Module):
    """Dropout of whole channels, batch normalisation and one linear layer to classes.

    Attributes:
        classes: how many.
        dropout: share of an image's channels that are zeroed in training (PyTorch's Dropout2d).
    """

    classes: int
    dropout: float

    @nn.compact
    def __call__(self, patches: jax.Array, train: bool) -> jax.Array:
        """Maps patches [..., h, w, D] to logits, float32 [..., h, w, classes].

        `train` as in `BatchNorm`; it needs an rng "dropout".
        """
        x = patches.astype(jnp.float32)
        x = nn.Dropout(self.dropout, broadcast_dims=(-3, -2), deterministic=not train)(x)
        return _Dense(self.classes, name="linear")(BatchNorm(name="norm")(x, train))


def resize_bilinear(maps: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes maps as PyTorch's F.interpolate(mode="bilinear", align_corners=False) does, without antialiasing.

    Args:
        maps: [..., h, w].
        height: rows of the result, >= 1.
        width: columns of the result, >= 1.

    Returns:
        float32 [..., height, width].
    """
    if maps.shape[-2:] == (height, width):
        return maps.astype(jnp.float32)
    rows, columns = bilinear_matrix(maps.shape[-2], height), bilinear_matrix(maps.shape[-1], width)
    # y, x: new cell; h, w: old cell
    return jnp.einsum(
        "yh,xw,...hw->...yx", rows, columns, maps.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """The weights of `resize_bilinear` along one axis: float32 [new_size, size], rows sum to one."""
    position = ((np.arange(new_size) + 0.5) * (size / new_size) - 0.5).clip(0, size - 1)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(size)), 0).astype(np.float32)


def pad_to_patches(frames: jax.Array, patch_size: int) -> jax.Array:
    """Pads frames [..., H, W, 3] with zeros to whole patches, half of it before and half after (the larger) each side.

    Normalised frames: zero is the mean colour.
    """
    padding = [(0, 0)] * frames.ndim
    for axis in (-3, -2):
        missing = -frames.shape[axis] % patch_size
        padding[axis] = (missing // 2, missing - missing // 2)
    return jnp.pad(frames, padding)
