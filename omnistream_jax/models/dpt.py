"""The dual DPT head: depth and ray maps from four levels of features.

Depth Anything 3, Lin et al. 2025 (the head that OmniStream trains with L_geo), after DPT, Ranftl et al. 2021.
Letters: B clips, T frames, N = B * T, H x W pixels, p patch side, h = H/p, w = W/p, D feature width, C channels.

    level  features   project + UV, resize, reassemble   fusion, upwards; once for depth, once for rays
    0      h x w      4h x 4w                            8h x 8w  -> the path's output layers
    1      h x w      2h x 2w                            4h x 4w
    2      h x w       h x w                             2h x 2w
    3      h x w      h/2 x w/2, rounded up               h x w
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from omnistream_jax.models.block import LayerNorm

LEVELS = 4
NORM_EPSILON = 1e-5
UV_BASE, UV_SCALE = 100.0, 0.1
HIDDEN_WIDTH = 32  # channels before each output layer
# About a hundredth of the deviation of what comes in: the outputs start near their biases, yet gradients flow.
OUTPUT_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")


@struct.dataclass
class GeometryMaps:
    """What the head says about each frame; all float32.

    Attributes:
        depth: [B, T, H, W], z-depth, > 0, in the unit of the clip.
        depth_confidence: [B, T, H, W], > 1.
        rays: [B, T, 8h, 8w, 6], origin and direction [o, d] in the first camera's frame.
        ray_confidence: [B, T, 8h, 8w], > 1.
    """

    depth: jax.Array
    depth_confidence: jax.Array
    rays: jax.Array
    ray_confidence: jax.Array


def check_channels(features: int, out_channels: Sequence[int]) -> None:
    """Raises ValueError, naming the field, for channels of a DualDPT that do not divide."""
    if features < 8 or features % 8:
        raise ValueError(f"features: expected a multiple of 8, got {features}")
    if len(out_channels) != LEVELS or any(channels < 4 or channels % 4 for channels in out_channels):
        raise ValueError(f"out_channels: expected {LEVELS} multiples of 4, got {out_channels}")


class DualDPT(nn.Module):
    """Depth and rays with confidences, by one reassembly and two chains of fusion.

    Frames do not see each other: a clip gives the numbers of its frames one by one.
    Depth Anything 3 makes output layers for every level of the ray chain and uses the last alone; only that one is
    here. Kernels start LeCun-normal (Flax's default; PyTorch's uniform has a third of the variance, and the chain of
    linear layers would fade), biases zero; the output layers start near zero, so that depth starts about 1,
    the confidences about 2, and the rays straight ahead from the first camera.
    Parameters are float32; the layers run in `dtype`; norms and everything after the output layers are float32.

    Attributes:
        patch_size: p, pixels per side of a patch.
        features: channels of the fusion, a multiple of 8.
        out_channels: channels of each level, multiples of 4.
        dtype: dtype of the computation.
    """

    patch_size: int
    features: int = 256
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], height: int, width: int) -> GeometryMaps:
        """Maps of T frames.

        Args:
            features: patch tokens after four blocks, the earliest first (see `default_layers`), each [B, T, h, w, D].
            height, width: H and W, the frames' pixels.

        Raises:
            ValueError: channels that do not divide, or features that do not fit the frames.
        """
        self._check(features, height, width)
        batch_time, aspect = features[0].shape[:2], width / height
        pyramid = self._reassemble([level.reshape(-1, *level.shape[2:]) for level in features], aspect)
        depth = self._depth(self._fuse(pyramid, "depth"), height, width)
        rays = self._rays(self._fuse(pyramid, "ray"), aspect)
        depth, rays = (maps.reshape(*batch_time, *maps.shape[1:]) for maps in (depth, rays))
        return GeometryMaps(
            depth=jnp.exp(depth[..., 0]),
            depth_confidence=jnp.exp(depth[..., 1]) + 1,
            rays=rays[..., :6],
            ray_confidence=jnp.exp(rays[..., 6]) + 1,
        )

    def _check(self, features: Sequence[jax.Array], height: int, width: int) -> None:
        try:
            check_channels(self.features, self.out_channels)
        except ValueError as error:
            raise ValueError(f"DualDPT.{error}") from error
        rows, columns = height // self.patch_size, width // self.patch_size
        if (rows * self.patch_size, columns * self.patch_size) != (height, width) or not rows * columns:
            raise ValueError(f"height and width: expected multiples of {self.patch_size}, got {height} and {width}")
        shapes = [level.shape for level in features]
        if len(shapes) != LEVELS or len(set(shapes)) != 1 or len(shapes[0]) != 5 or shapes[0][2:4] != (rows, columns):
            raise ValueError(f"features: expected {LEVELS} arrays [B, T, {rows}, {columns}, D], got shapes {shapes}")

    def _reassemble(self, features: Sequence[jax.Array], aspect: float) -> list[jax.Array]:
        """Four arrays [N, h, w, D] to the pyramid [N, 4h, 4w, C], [N, 2h, 2w, C], [N, h, w, C], [N, h/2, w/2, C]."""
        norm = LayerNorm(NORM_EPSILON, self.dtype, name="norm")  # one for all levels
        pyramid = []
        for level, (tokens, channels) in enumerate(zip(features, self.out_channels, strict=True)):
            x = nn.Dense(channels, dtype=self.dtype, name=f"project_{level}")(norm(tokens))
            x = add_uv_embedding(x, aspect)
            if level < 2:
                x = SplitCells(4 // 2**level, self.dtype, name=f"resize_{level}")(x)
            elif level == 3:
                x = _conv(channels, self.dtype, f"resize_{level}", strides=2)(x)
            pyramid.append(_conv(self.features, self.dtype, f"reassemble_{level}", use_bias=False)(x))
        return pyramid

    def _fuse(self, pyramid: Sequence[jax.Array], path: str) -> jax.Array:
        """From the coarsest level to the finest: [N, 8h, 8w, C]."""
        rows, columns = pyramid[0].shape[1:3]
        sizes = [(2 * rows, 2 * columns), *(level.shape[1:3] for level in pyramid[:-1])]
        x = None
        for level in reversed(range(LEVELS)):
            x = FusionBlock(sizes[level], self.dtype, name=f"{path}_fusion_{level}")(x, pyramid[level])
        return x

    def _depth(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """[N, 8h, 8w, C] to the logarithms of depth and of confidence - 1, float32 [N, H, W, 2]."""
        x = _conv(self.features // 2, self.dtype, "depth_neck")(x)
        x = add_uv_embedding(resize_linear(x, height, width), width / height)
        x = nn.relu(_conv(HIDDEN_WIDTH, self.dtype, "depth_hidden")(x))
        return self._output(2, "depth_output")(x)

    def _rays(self, x: jax.Array, aspect: float) -> jax.Array:
        """[N, 8h, 8w, C] to [o, d] and the logarithm of confidence - 1, float32 [N, 8h, 8w, 7]."""
        for i in range(5):
            x = _conv(self.features if i % 2 else self.features // 2, self.dtype, f"ray_neck_{i}")(x)
        x = _conv(HIDDEN_WIDTH, self.dtype, "ray_hidden")(add_uv_embedding(x, aspect))
        x = nn.relu(LayerNorm(NORM_EPSILON, self.dtype, name="ray_norm")(x))
        return self._output(7, "ray_output", _forward)(x)

    def _output(self, channels: int, name: str, bias_init: Initializer = nn.initializers.zeros) -> nn.Dense:
        """An output layer; its sums are kept in float32, where a bfloat16 result would round the depth."""
        return nn.Dense(
            channels,
            dtype=self.dtype,
            kernel_init=OUTPUT_INIT,
            bias_init=bias_init,
            dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            name=name,
        )


def _forward(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Rays that leave the first camera's centre straight ahead; the key is unused."""
    return jnp.array([0, 0, 0, 0, 0, 1, 0], dtype).reshape(shape)


class SplitCells(nn.Module):
    """A transposed convolution whose stride is its kernel: each cell becomes factor x factor cells.

    Attributes:
        factor: cells per side.
        dtype: dtype of the computation.
    """

    factor: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, h, w, C] -> [N, h * factor, w * factor, C]."""
        batch, rows, columns, channels = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2, 3))
        kernel = self.param("kernel", init, (channels, self.factor, self.factor, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # i, j: row and column inside the cell; c, d: channels
        x = jnp.einsum("nhwc,cijd->nhiwjd", x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return x.reshape(batch, rows * self.factor, columns * self.factor, channels)


class FusionBlock(nn.Module):
    """Merges what comes from the coarser level with this level's features, and resizes.

    Attributes:
        size: rows and columns of the result.
        dtype: dtype of the computation.
    """

    size: tuple[int, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, coarse: jax.Array | None, lateral: jax.Array) -> jax.Array:
        """coarse (None at the coarsest level) and lateral, both [N, h', w', C] -> [N, *size, C]."""
        x = lateral if coarse is None else coarse + ResidualUnit(self.dtype, name="lateral")(lateral)
        x = ResidualUnit(self.dtype, name="merged")(x)
        # A linear map per cell and the interpolation, whose weights add up to one, may change places: fewer cells.
        x = nn.Dense(x.shape[-1], dtype=self.dtype, name="output")(x)
        return resize_linear(x, *self.size)


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))).

    Attributes:
        dtype: dtype of the computation.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, h', w', C] -> the same shape."""
        hidden = x
        for name in ("conv1", "conv2"):
            hidden = _conv(x.shape[-1], self.dtype, name)(nn.relu(hidden))
        return x + hidden


def _conv(channels: int, dtype: DTypeLike, name: str, strides: int = 1, use_bias: bool = True) -> nn.Conv:
    """3 x 3, one cell of zeros around the map (with a stride of 2 that is not "SAME")."""
    return nn.Conv(channels, (3, 3), strides, padding=1, use_bias=use_bias, dtype=dtype, name=name)


def add_uv_embedding(x: jax.Array, aspect: float) -> jax.Array:
    """Adds a tenth of the cells' sine-cosine embedding to x [N, h', w', C]; aspect is the image's width / height.

    Rows and columns are added apart: a table of all cells would be a constant of 128 MiB in a program for 512 pixels.
    """
    rows, columns = uv_tables(*x.shape[1:], aspect)
    return x + (UV_SCALE * columns).astype(x.dtype) + (UV_SCALE * rows[:, None]).astype(x.dtype)


def uv_tables(rows: int, columns: int, channels: int, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """The embedding of cell centres: float32 [rows, C] and [columns, C]; a cell's is the sum of its row's and column's.

    Channels are [sin u, cos u, sin v, cos v], C / 4 wave lengths each, a geometric series from 1 up to UV_BASE; (u, v)
    are the cell's centre, from the image's centre, over half the diagonal. Each table is zero in half its channels.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    u, v = _centres(columns) * aspect / diagonal, _centres(rows) / diagonal
    frequencies = UV_BASE ** -(np.arange(channels // 4) / (channels // 4))
    waves_u, waves_v = (
        np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
        for angle in (position[:, None] * frequencies for position in (u, v))
    )
    row_table = np.concatenate([np.zeros_like(waves_v), waves_v], axis=-1)
    column_table = np.concatenate([waves_u, np.zeros_like(waves_u)], axis=-1)
    return row_table.astype(np.float32), column_table.astype(np.float32)


def _centres(cells: int) -> np.ndarray:
    """Centres of equal cells of [-1, 1]."""
    return (2 * np.arange(cells) + 1) / cells - 1


def resize_linear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes maps bilinearly, corner cells staying corner cells (PyTorch's align_corners=True).

    Weights and sums are float32. No forward-mode derivatives.

    Args:
        x: [N, h', w', C], any float dtype.
        height: rows of the result, >= 1.
        width: columns of the result, >= 1.

    Returns:
        [N, height, width, C] in the dtype of x.
    """
    for axis, new_size in ((1, height), (2, width)):
        if x.shape[axis] != new_size:
            x = _resize_axis(x, axis, x.shape[axis], new_size)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _resize_axis(x: jax.Array, axis: int, size: int, new_size: int) -> jax.Array:
    return _apply_sparse(linear_matrix(size, new_size), x, axis)


def _resize_axis_backward(axis: int, size: int, new_size: int, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    """The transposed matrix, again by taps: left to itself, JAX would scatter, twenty times as slow on a CPU."""
    return (_apply_sparse(linear_matrix(size, new_size).T, cotangent, axis),)


_resize_axis.defvjp(lambda x, *sizes: (_resize_axis(x, *sizes), None), _resize_axis_backward)


def _apply_sparse(matrix: np.ndarray, x: jax.Array, axis: int) -> jax.Array:
    """A constant matrix [new, old] along an axis of x, for rows with few entries: XLA fuses the taps into one pass."""
    count = int(np.count_nonzero(matrix, axis=1).max())
    taps = np.argsort(matrix == 0, axis=1, kind="stable")[:, :count]  # each row's entries, then zeros
    weights = np.take_along_axis(matrix, taps, axis=1)
    along = [-1 if i == axis else 1 for i in range(x.ndim)]
    # "clip": the indices are in range, and the default would compare each with the bounds.
    total = sum(
        jnp.take(x, taps[:, i], axis=axis, mode="clip").astype(jnp.float32) * weights[:, i].reshape(along)
        for i in range(count)
    )
    return total.astype(x.dtype)


def linear_matrix(size: int, new_size: int) -> np.ndarray:
    """The weights of `resize_linear` along one axis: float32 [new_size, size], rows sum to one."""
    position = np.linspace(0, size - 1, new_size)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(size)), 0).astype(np.float32)


def default_layers(depth: int) -> tuple[int, int, int, int]:
    """The blocks, counted from 0, whose outputs feed the head of a backbone of `depth` blocks.

    From the end of the first half to the last block in equal steps (rounded), or the last four blocks
    where the second half is shorter: 24 -> 11, 15, 19, 23 and 12 -> 5, 7, 9, 11, as in Depth Anything 3.

    Raises:
        ValueError: fewer than four blocks.
    """
    if depth < LEVELS:
        raise ValueError(f"depth: the head needs {LEVELS} blocks, got {depth}")
    first = min(depth // 2 - 1, depth - LEVELS)
    span = depth - 1 - first
    return tuple(first + round(i * span / (LEVELS - 1)) for i in range(LEVELS))
