"""The data of geometry: posed RGB-D sequences -> clips or walks of frames -> one crop for all -> batches."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError, because, require_field
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.multicrop import Box, DistortionRates, distort, draw_distortion
from omnistream_jax.data.readers.base import PosedSource
from omnistream_jax.data.schema import PosedFrame
from omnistream_jax.data.sources import clip_indices

# CUT3R's largest strides (src/dust3r/datasets), by the first word of a source's name without its punctuation.
LARGEST_STRIDES = {
    "pointodyssey": 4,
    "hypersim": 4,
    "mvssynth": 4,
    "scannetpp": 3,
    "vkitti": 5,
    "vkitti2": 5,
    "virtualkitti": 5,
    "virtualkitti2": 5,
    "arkitscenes": 8,
    "waymo": 8,
    "waymoopen": 8,
    "spring": 16,
    "dynamicreplica": 16,
    "tartanair": 20,
    "dl3dv": 20,
    "dl3dv10k": 20,
    "scannet": 30,
    "mapfree": 30,
}
LARGEST_STRIDE = 8  # of other sources
WALK_CHOICES = 5  # a walk goes on to one of so many frames that see most of what the last one sees
WALK_STARTS = 10
JITTER = DistortionRates(blur=0.0, solarise=0.0)


@dataclasses.dataclass(frozen=True)
class PosedData(MixtureData[PosedSource]):
    """Batches of posed RGB-D clips; see `schema.PosedBatch`. A record is a sequence, a pass takes one clip of each.

    Attributes:
      frames: T, frames of a clip.
      size: (height, width) of the frames in pixels.
      strides: of each source, the smallest and largest distance between a clip's frames; a largest stride that is too
        long for a sequence is lowered. None: 1 to CUT3R's, `default_stride`. Unordered sources take no heed of it:
        there a clip is a walk over frames that overlap.
      crop_scale: smallest and largest side of the crop, as shares of the largest box of `size`'s proportions.
      colour: whether brightness, contrast, saturation and hue change at random, alike in all frames of a clip.
    """

    frames: int = 16
    size: tuple[int, int] = (224, 224)
    strides: tuple[tuple[int, int], ...] | None = None
    crop_scale: tuple[float, float] = (0.8, 1.0)
    colour: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_field(self.frames >= 1, "frames", self.frames, "1 or more")
        require_field(len(self.size) == 2 and min(self.size) >= 1, "size", self.size, "(height, width), from 1 on")
        fits = len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        require_field(fits, "crop_scale", self.crop_scale, "(smallest, largest) within 0 to 1")
        if self.strides is not None and len(self.strides) != len(self.sources):
            raise DataError(f"strides: {len(self.strides)} are given for {len(self.sources)} sources")
        for pair in self.strides or ():
            fits = len(pair) == 2 and 1 <= pair[0] <= pair[1]
            require_field(fits, "strides", pair, "(smallest, largest), from 1 on")

    def stride(self, place: int) -> tuple[int, int]:
        """The smallest and largest stride of source number `place`."""
        return default_stride(self.sources[place].name) if self.strides is None else self.strides[place]

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source = self.sources[place]
        path, info = source.describe(index), source.info(index)
        with because("frames cannot be read"):
            numbers = draw_frames(source, index, rng, self.frames, self.stride(place))
            frames = source.read(index, numbers)
        check_frames(frames, path)
        crop = draw_crop(rng, self.crop_scale)
        cut = [cut_frame(frame, crop, self.size) for frame in frames]
        sample = {name: np.stack([each[name] for each in cut]) for name in cut[0]}
        has_depth = any(frame.depth is not None for frame in frames)
        if has_depth and not sample["valid"].any():
            raise DataError(f"{path}: no depth is valid in frames {numbers}", reason="depth is empty")
        if self.colour:
            sample["frames"] = distort(sample["frames"], draw_distortion(rng, JITTER))
        return {
            **sample,
            "has_pose": np.bool_(all(frame.cam_to_world is not None for frame in frames)),
            "has_depth": np.bool_(has_depth),
            "metric": np.bool_(info.metric),
            "dynamic": np.bool_(info.dynamic),
        }


def default_stride(name: str) -> tuple[int, int]:
    """(1, CUT3R's largest stride) of the data set that a source's name begins with: "scannet++ (train)", for one."""
    word = re.sub(r"[^a-z0-9]", "", name.split("(")[0].lower().replace("+", "p"))
    return 1, LARGEST_STRIDES.get(word, LARGEST_STRIDE)


def draw_frames(
    source: PosedSource, index: int, rng: np.random.Generator, frames: int, stride: tuple[int, int]
) -> list[int]:
    """The frame numbers of a random clip of an ordered sequence, or of a random walk through an unordered one.

    Raises:
      DataError: the sequence has too few frames, or too few that overlap.
    """
    count = source.frame_count(index)
    if source.info(index).ordered:
        with because("too few frames"):
            return list(clip_indices(rng, count, frames, stride, source.describe(index)))
    longest = 0
    for start in rng.permutation(count)[:WALK_STARTS]:
        walk = _walk(source, index, rng, int(start), frames)
        if len(walk) == frames:
            return walk
        longest = max(longest, len(walk))
    raise DataError(
        f"{source.describe(index)}: a walk over overlapping frames found {longest}, {frames} were asked for",
        reason="too few frames that overlap",
    )


def _walk(source: PosedSource, index: int, rng: np.random.Generator, start: int, frames: int) -> list[int]:
    """Frames that overlap, none twice, from `start` on; where the last one leads nowhere, on from an earlier one."""
    walk, around = [start], {}
    while len(walk) < frames:
        around[walk[-1]] = list(source.neighbours(index, walk[-1]))
        open_ends = ([frame for frame in around[back] if frame not in walk] for back in reversed(walk))
        choices = next(filter(None, open_ends), None)
        if choices is None:
            break
        walk.append(int(choices[rng.integers(min(len(choices), WALK_CHOICES))]))
    return walk


def check_frames(frames: list[PosedFrame], path: str) -> None:
    """Raises DataError for a camera that cannot be, whoever read the frames; `path` names the sequence."""
    for frame in frames:
        where = f"{path}, {frame.path}"
        focal = frame.intrinsics[0, 0], frame.intrinsics[1, 1]
        if not (np.isfinite(frame.intrinsics).all() and min(focal) > 0):
            raise DataError(
                f"{where}: focal lengths {focal[0]:g} and {focal[1]:g}, expected positive ones",
                reason="focal length is not positive",
            )
        if frame.cam_to_world is not None and not np.isfinite(frame.cam_to_world).all():
            raise DataError(f"{where}: its pose has numbers that are not finite", reason="pose is not finite")


@dataclasses.dataclass(frozen=True)
class Crop:
    """A box in shares, so that it means the same in frames of unlike size.

    Attributes:
      side: of the largest box of the wanted proportions that fits.
      across: where the box lies in the room that is left, from 0 at the left edge to 1 at the right.
      down: likewise, from the top edge.
    """

    side: float
    across: float
    down: float

    def box(self, height: int, width: int, size: tuple[int, int]) -> Box:
        """(left, top, right, bottom) in pixels of a frame, of the proportions of `size` (height, width)."""
        scale = self.side * min(height / size[0], width / size[1])
        box_height, box_width = size[0] * scale, size[1] * scale
        left, top = self.across * max(width - box_width, 0), self.down * max(height - box_height, 0)
        return left, top, min(left + box_width, width), min(top + box_height, height)


def draw_crop(rng: np.random.Generator, scale: tuple[float, float]) -> Crop:
    """A random crop whose side is a share of `scale`."""
    return Crop(float(rng.uniform(*scale)), float(rng.random()), float(rng.random()))


def cut_frame(frame: PosedFrame, crop: Crop, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Cuts a crop out of a frame and resizes it, its camera with it.

    The image is averaged (bilinear, antialiased); depth and masks are those of the nearest pixel, so that no depth
    lies between a thing and its background.

    Args:
      frame: of any size.
      crop: where to cut.
      size: (height, width) of the result.

    Returns:
      frames, depth, valid, sky, intrinsics and cam_to_world of one frame, as in `schema.PosedBatch`.
    """
    height, width = frame.image.shape[:2]
    box = left, top, right, bottom = crop.box(height, width, size)
    # Column j of the result shows the source at left + (j + 0.5) * (right - left) / W: pixel centres are at + 0.5.
    rows = _nearest(top, bottom, size[0], height)
    columns = _nearest(left, right, size[1], width)
    scale_x, scale_y = size[1] / (right - left), size[0] / (bottom - top)
    to_crop = np.array([[scale_x, 0, -left * scale_x], [0, scale_y, -top * scale_y], [0, 0, 1]])
    image = Image.fromarray(frame.image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    unknown, nowhere = np.zeros(size, np.float32), np.zeros(size, bool)
    pixels = np.ix_(rows, columns)
    return {
        "frames": np.asarray(image),
        "depth": unknown if frame.depth is None else frame.depth[pixels].astype(np.float32),
        "valid": nowhere if frame.valid is None else frame.valid[pixels],
        "sky": nowhere if frame.sky is None else frame.sky[pixels],
        "intrinsics": (to_crop @ frame.intrinsics.astype(np.float64)).astype(np.float32),
        "cam_to_world": (np.eye(4) if frame.cam_to_world is None else frame.cam_to_world).astype(np.float32),
    }


def _nearest(first: float, last: float, count: int, limit: int) -> np.ndarray:
    """The pixels below `limit` in which `count` pixel centres spread evenly over [first, last) lie."""
    centres = first + (np.arange(count) + 0.5) * (last - first) / count
    return np.clip(np.floor(centres), 0, limit - 1).astype(np.intp)
