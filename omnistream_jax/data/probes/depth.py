"""Frames with depth for linear probes: training batches with DINOv3's augmentations, and the plain view that is scored.

T: frames of a sample, 1 for photographs; all of them are cut and coloured alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from omnistream_jax.data.errors import DataError, require_field
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.probes.colours import DEVIATION, MEAN


class DepthSource(Protocol):
    """Frames with their depth, by number."""

    name: str

    def __len__(self) -> int:
        """How many samples there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the path of a sample."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [T, H, W, 3], and float32 [T, H, W] in metres, 0 where it is not known. Raises DataError."""

    def settings(self) -> dict[str, Any]:
        """JSON values: where the samples come from, how many, and "complete", as of `evals.probes.base`."""


@dataclasses.dataclass(frozen=True)
class DepthAugmentation:
    """What changes at random in training, in this order.

    Attributes:
      fixed_crop: (left, top, right, bottom) of a 640 x 480 picture, scaled to others and rounded down; () cuts nothing.
      rotation: largest angle, degrees either way; bilinear, the depth by the nearest pixel, black and unknown beyond.
      rotation_probability: of being rotated.
      flip_probability: of being mirrored.
      crop: (height, width) of a random crop; () keeps the whole picture.
      colour_probability: of the changes below.
      gamma: smallest and largest exponent of the values.
      gamma_scale: what white is when it is raised to gamma. At DINOv3's 255 gamma is above all a change of brightness.
      brightness: smallest and largest factor of all channels.
      colour: of each channel.

    Raises:
      DataError: a field does not fit; the message names it.
    """

    fixed_crop: tuple[int, ...]
    rotation: float
    rotation_probability: float
    flip_probability: float
    crop: tuple[int, ...]
    colour_probability: float
    gamma: tuple[float, float]
    gamma_scale: float
    brightness: tuple[float, float]
    colour: tuple[float, float]

    def __post_init__(self):
        for name in ("rotation_probability", "flip_probability", "colour_probability"):
            value = getattr(self, name)
            require_field(0 <= value <= 1, name, value, "a probability, 0 to 1")
        for name in ("gamma", "brightness", "colour"):
            value = getattr(self, name)
            require_field(len(value) == 2 and 0 < value[0] <= value[1], name, value, "(smallest, largest), above 0")
        require_field(self.rotation >= 0, "rotation", self.rotation, "degrees, 0 or more")
        require_field(self.gamma_scale > 0, "gamma_scale", self.gamma_scale, "a positive number")
        fits = len(self.crop) == 0 or (len(self.crop) == 2 and min(self.crop) >= 1)
        require_field(fits, "crop", self.crop, "(height, width), or () for none")
        box = self.fixed_crop
        fits = len(box) == 0 or (len(box) == 4 and 0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 480)
        require_field(fits, "fixed_crop", box, "(left, top, right, bottom) within 640 x 480, or () for none")

    def apply(
        self, rng: np.random.Generator, frames: np.ndarray, depth: np.ndarray, path: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """One random view.

        Args:
          rng: all randomness comes from it.
          frames: uint8 [T, H, W, 3].
          depth: float32 [T, H, W], 0 where it is not known.
          path: names the sample in messages.

        Returns:
          float32 [T, h, w, 3], normalised, and float32 [T, h, w].

        Raises:
          DataError: the frames are smaller than the crop.
        """
        frames, depth = self._cut(frames), self._cut(depth)
        pixels = frames.astype(np.float32) / 255
        if rng.random() < self.rotation_probability:
            angle = rng.uniform(-self.rotation, self.rotation)
            pixels = np.stack([rotate(frame, angle, cv2.INTER_LINEAR) for frame in pixels])
            depth = np.stack([rotate(frame, angle, cv2.INTER_NEAREST) for frame in depth])
        if rng.random() < self.flip_probability:
            pixels, depth = pixels[:, :, ::-1], depth[:, :, ::-1]
        if self.crop:
            height, width = self.crop
            room = depth.shape[1] - height, depth.shape[2] - width
            if min(room) < 0:
                size = f"{depth.shape[2]} x {depth.shape[1]}"
                raise DataError(f"{path}: {size} pixels to crop {width} x {height} of", reason="smaller than the crop")
            top, left = (int(rng.integers(each + 1)) for each in room)
            place = np.s_[:, top : top + height, left : left + width]
            pixels, depth = pixels[place], depth[place]
        if rng.random() < self.colour_probability:
            pixels = self._colour(rng, pixels)
        return (pixels - MEAN) / DEVIATION, np.ascontiguousarray(depth)

    def _cut(self, maps: np.ndarray) -> np.ndarray:
        if not self.fixed_crop:
            return maps
        left, top, right, bottom = self.fixed_crop
        rows = slice(*(int(row / 480 * maps.shape[1]) for row in (top, bottom)))
        return maps[:, rows, slice(*(int(column / 640 * maps.shape[2]) for column in (left, right)))]

    def _colour(self, rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
        """Values 0 to 1 to values 0 to 1."""
        raised = (pixels * self.gamma_scale) ** np.float32(rng.uniform(*self.gamma))
        factors = rng.uniform(*self.brightness) * rng.uniform(*self.colour, size=3)
        return np.clip(raised * factors.astype(np.float32) / self.gamma_scale, 0, 1)


def rotate(picture: np.ndarray, degrees: float, interpolation: int) -> np.ndarray:
    """Turns float32 [H, W] or [H, W, 3] about its centre, counter-clockwise; 0 where nothing was."""
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(picture, turn, (width, height), flags=interpolation, borderMode=cv2.BORDER_CONSTANT)


@dataclasses.dataclass(frozen=True)
class DepthData(MixtureData[DepthSource]):
    """Training batches: "frames" float32 [B, T, h, w, 3], normalised, and "depth" float32 [B, T, h, w], metres.

    Attributes:
      augmentation: of each sample.
    """

    augmentation: DepthAugmentation = dataclasses.field(kw_only=True)

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source = self.sources[place]
        frames, depth = source.read(index)
        frames, depth = self.augmentation.apply(rng, frames, depth, source.describe(index))
        return {"frames": frames, "depth": depth}


@dataclasses.dataclass(frozen=True)
class DepthView:
    """Whole frames, nothing random: what is scored; an `evals.probes.base.ValidationData`.

    Attributes:
      source: of the frames.
    """

    source: DepthSource

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """ "frames" uint8 [T, H, W, 3] and "depth" float32 [T, H, W] of one sample. Raises DataError."""
        frames, depth = self.source.read(index)
        return {"frames": frames, "depth": depth}

    def settings(self) -> dict[str, Any]:
        """JSON values: where the samples come from, and how many."""
        return self.source.settings()
