"""Labels handed on from frame to frame by the likeness of features, without any training (Jabri et al. 2020).

Each patch of a frame takes the labels of the most similar patches near its own place, in the first frame and the last
few: DINO's eval_video_segmentation.py and DINOv3's segmentation_tracking.ipynb, whose differences are settings here.
h x w: patches of a frame, D: width of the features, C: labels, the background first.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from PIL import Image

from omnistream_jax.losses.normalize import l2_normalize

NEIGHBOURHOODS = ("square", "circle")
UPSAMPLINGS = ("bilinear", "nearest")
FLAT_CHANNELS = ("wins", "loses")


@dataclasses.dataclass(frozen=True)
class Propagation:
    """How labels are handed on and become masks.

    Attributes:
      context: frames before the present one that hand on their labels, besides the first.
      radius: patches around a patch's own place within which others are looked at; 0: all are.
      neighbourhood: "square" (DINO) or "circle" (DINOv3) of that radius.
      top: the most similar patches, over all context frames together, that hand on their labels; ties with the last
        one do too.
      temperature: weights are softmax(cosine / temperature).
      upsampling: "bilinear" (DINO): to the pixels of the model's input, and the mask to the nearest pixel of the
        original; "nearest" (DINOv3): to the pixels of the original.
      flat_channel: what a label that has the same weight everywhere, not 0, becomes when it is normalised: "wins"
        (DINO, whose division by zero then wins every comparison) or "loses" (DINOv3, which sets it to 0).

    Raises:
      ValueError: a field that does not fit, named.
    """

    context: int
    radius: int
    neighbourhood: str
    top: int
    temperature: float
    upsampling: str
    flat_channel: str

    def __post_init__(self):
        for name, low in (("context", 0), ("radius", 0), ("top", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        choices = {"neighbourhood": NEIGHBOURHOODS, "upsampling": UPSAMPLINGS, "flat_channel": FLAT_CHANNELS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@struct.dataclass
class Memory:
    """The frames that hand on their labels: the first in slot 0, the last ones in the others, in turn.

    Rows come first, so that the rows in reach of a patch lie together in memory.

    Attributes:
      features: float32 [h, 1 + context, w, D], of length 1.
      labels: float32 [h, 1 + context, w, C], as they were handed on, not normalised.
      count: int32, frames since the first.
    """

    features: jax.Array
    labels: jax.Array
    count: jax.Array


def first_labels(mask: np.ndarray, grid: tuple[int, int], objects: int) -> np.ndarray:
    """The labels of the first frame: its mask at the nearest pixel of each patch's centre, float32 [h, w, 1 + objects].

    Args:
      mask: uint8 [H, W], 0 to `objects`; whatever is larger is background.
      grid: h and w.
      objects: how many there are.
    """
    height, width = grid
    small = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    return np.eye(1 + objects, dtype=np.float32)[np.where(small <= objects, small, 0)]


def begin(settings: Propagation, features: jax.Array, labels: jax.Array | np.ndarray) -> Memory:
    """The memory after the first frame, from its features [h, w, D] and its labels [h, w, C]."""

    def slots(first: jax.Array) -> jax.Array:
        height, *rest = first.shape
        return jnp.zeros((height, 1 + settings.context, *rest), jnp.float32).at[:, 0].set(first)

    return Memory(slots(l2_normalize(features)), slots(jnp.asarray(labels, jnp.float32)), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def advance(settings: Propagation, memory: Memory, features: jax.Array) -> tuple[jax.Array, Memory]:
    """Hands the labels on to the next frame.

    Args:
      settings: is compiled in.
      memory: of `begin` or the last `advance`; consumed.
      features: [h, w, D] of the frame.

    Returns:
      Its labels, float32 [h, w, C], and the memory after it.
    """
    features = l2_normalize(features)
    labels = _handed_on(settings, features, memory)
    count = memory.count + 1
    if settings.context:
        slot = 1 + (count - 1) % settings.context
        memory = memory.replace(
            features=memory.features.at[:, slot].set(features), labels=memory.labels.at[:, slot].set(labels)
        )
    return labels, memory.replace(count=count)


def object_mask(settings: Propagation, labels: jax.Array, patch: int, size: tuple[int, int]) -> np.ndarray:
    """The mask that labels [h, w, C] say, uint8 [H, W] with size = (H, W).

    Every label is stretched to 0 to 1 over the frame, the largest wins, and the lower number where two are equal.
    patch is the side of one in pixels of the model's input.
    """
    wins = settings.flat_channel == "wins"
    if settings.upsampling == "bilinear":
        mask = np.asarray(_bilinear_mask(labels, patch, wins))
        return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    rows, columns = (_nearest(small, large) for small, large in zip(labels.shape, size, strict=False))
    return np.asarray(_nearest_mask(labels, rows, columns, wins))


def _handed_on(settings: Propagation, query: jax.Array, memory: Memory) -> jax.Array:
    """Row by row of patches, against the rows in reach, so that likenesses take little memory at any size."""
    height, width, dimension = query.shape
    slots, channels = memory.labels.shape[1], memory.labels.shape[-1]
    radius = settings.radius or height + width  # beyond the corners, in a circle too
    span = min(2 * radius + 1, height)
    filled = jnp.arange(slots) <= memory.count
    columns = jnp.arange(width)[:, None] - jnp.arange(width)  # [w, w]

    def one_row(row: jax.Array) -> jax.Array:
        start = jnp.clip(row - radius, 0, height - span)
        keys = jax.lax.dynamic_slice_in_dim(memory.features, start, span).reshape(-1, dimension)
        labels = jax.lax.dynamic_slice_in_dim(memory.labels, start, span).reshape(-1, channels)
        near = _near(settings.neighbourhood, radius, start + jnp.arange(span) - row, columns)  # [w, span, w]
        usable = (near[:, :, None] & filled[:, None]).reshape(width, -1)  # [w, span * slots * w]
        # In full precision: which patches are the most similar must not depend on the device.
        likeness = jnp.where(usable, jnp.matmul(query[row], keys.T, precision="highest"), -jnp.inf)
        best = jax.lax.top_k(likeness, min(settings.top, likeness.shape[1]))[0]
        weights = jnp.exp((likeness - best[:, :1]) / settings.temperature) * (likeness >= best[:, -1:])
        return jnp.matmul(weights / weights.sum(1, keepdims=True), labels, precision="highest")

    return jax.lax.map(one_row, jnp.arange(height))


def _near(neighbourhood: str, radius: int, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """bool [w, span, w] of differences in place, rows [span] and columns [w, w]."""
    rows, columns = jnp.abs(rows)[:, None], jnp.abs(columns)[:, None]
    if neighbourhood == "square":
        return (rows <= radius) & (columns <= radius)
    return rows**2 + columns**2 <= radius**2


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bilinear_mask(labels: jax.Array, patch: int, flat_wins: bool) -> jax.Array:
    height, width, channels = labels.shape
    large = jax.image.resize(labels, (height * patch, width * patch, channels), "bilinear", precision="highest")
    return _winner(large, flat_wins)


@functools.partial(jax.jit, static_argnums=3)
def _nearest_mask(labels: jax.Array, rows: np.ndarray, columns: np.ndarray, flat_wins: bool) -> jax.Array:
    return _winner(labels[rows][:, columns], flat_wins)


def _winner(labels: jax.Array, flat_wins: bool) -> jax.Array:
    low, high = labels.min((0, 1)), labels.max((0, 1))
    flat = jnp.where((high > 0) & flat_wins, jnp.inf, 0.0)
    stretched = jnp.where(high > low, (labels - low) / jnp.where(high > low, high - low, 1.0), flat)
    return jnp.argmax(stretched, axis=-1).astype(jnp.uint8)


def _nearest(small: int, large: int) -> np.ndarray:
    """int [large], the source of each pixel by PyTorch's mode "nearest": floor(i * small / large), in float32."""
    places = np.arange(large, dtype=np.float32) * (np.float32(small) / np.float32(large))
    return np.minimum(places.astype(np.int64), small - 1)
