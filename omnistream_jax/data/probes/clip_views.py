"""Which frames of a video a probe of actions sees, and how they are cut: V-JEPA 2's evaluations.

S: segments of a video, each a clip of T frames; V: spatial views of each.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from omnistream_jax.data.errors import require_field
from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.probes.colours import DEVIATION, MEAN
from omnistream_jax.data.probes.images import random_resized_box
from omnistream_jax.data.probes.rand_augment import RandAugment, apply_changes, erase_box

WINDOWS = ("random", "middle")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames of a video are taken.

    Attributes:
      segments: S, equal parts of the video, one clip from each.
      frames: T of a clip.
      stride: a clip spans T * stride frames of the video.
      window: where a clip lies in a part that is longer: "random" (V-JEPA 2's, at validation too) or "middle".

    Raises:
      DataError: a field is out of range.
    """

    segments: int
    frames: int
    stride: int
    window: str

    def __post_init__(self):
        for name in ("segments", "frames", "stride"):
            require_field(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require_field(self.window in WINDOWS, "window", self.window, " or ".join(WINDOWS))


def segment_indices(frame_count: int, sampling: Sampling, rng: np.random.Generator) -> np.ndarray:
    """The frames of a video that are taken, int64 [S, T].

    A part of more than T * stride frames has a window of that length, whose first frame is drawn; its T frames lie
    evenly from its start to its end, rounded down. Parts of shorter videos overlap: each is a clip of the whole span
    (or of the whole video, where that is shorter), filled up with its last frame but one, and they move on evenly.

    Args:
      frame_count: of the video, 1 or more.
      sampling: what to take.
      rng: places random windows.
    """
    span, part = sampling.frames * sampling.stride, frame_count // sampling.segments
    if part > span:
        return np.stack([number * part + _window(part, span, sampling, rng) for number in range(sampling.segments)])
    last = min(span, frame_count) - 1
    spread = np.linspace(0, last, num=last // sampling.stride)
    filled = np.concatenate([spread, np.full(sampling.frames - len(spread), last)])
    clip = np.clip(filled, 0, max(last - 1, 0)).astype(np.int64)
    step = max(frame_count - span, 0) // max(sampling.segments - 1, 1)
    return clip + step * np.arange(sampling.segments)[:, None]


def _window(part: int, span: int, sampling: Sampling, rng: np.random.Generator) -> np.ndarray:
    """The frames of a window of `span` frames in a part of more, int64 [T]."""
    # The last place is never drawn: the original's upper end is exclusive.
    start = int(rng.integers(part - span)) if sampling.window == "random" else (part - span) // 2
    places = np.linspace(start, start + span, num=sampling.frames)
    return np.clip(places, start, start + span - 1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class SpatialViews:
    """The square cuts by which a video is scored.

    Attributes:
      size: side of a view in pixels.
      views: V; one is the centre, more lie evenly along the longer side.
      short_side: frames are resized to it first. 0: V-JEPA 2's, the view's own side, or, for one view, 256 / 224 of it.

    Raises:
      DataError: a field is out of range.
    """

    size: int
    views: int
    short_side: int = 0

    def __post_init__(self):
        require_field(self.size >= 1, "size", self.size, "1 or more")
        require_field(self.views >= 1, "views", self.views, "1 or more")
        fits = self.short_side == 0 or self.short_side >= self.size
        require_field(fits, "short_side", self.short_side, f"0, or at least the views' side {self.size}")

    @property
    def resized_to(self) -> int:
        """The short side of the frames that are cut."""
        return self.short_side or (self.size if self.views > 1 else int(self.size * 256 / 224))

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> uint8 [V, T, size, size, 3]."""
        frames = resize_short_side(frames, self.resized_to)
        return np.stack(
            [frames[:, top : top + self.size, left : left + self.size] for top, left in self._corners(frames)]
        )

    def _corners(self, frames: np.ndarray) -> list[tuple[int, int]]:
        """(top, left) of each view."""
        room = [side - self.size for side in frames.shape[1:3]]
        centre = [round(free / 2) for free in room]
        if self.views == 1:
            return [(centre[0], centre[1])]
        longer = 0 if frames.shape[1] > frames.shape[2] else 1
        places = [number * (room[longer] // (self.views - 1)) for number in range(self.views)]
        return [(place, centre[1]) if longer == 0 else (centre[0], place) for place in places]


def resize_short_side(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Bilinear without smoothing, the long side rounded down: uint8 [T, H, W, 3] to [T, h, w, 3]."""
    height, width = frames.shape[1:3]
    if min(height, width) == short_side:
        return frames
    if width < height:
        size = (short_side, int(short_side * height / width))
    else:
        size = (int(short_side * width / height), short_side)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) for frame in frames])


@dataclasses.dataclass(frozen=True)
class TrainingView:
    """How a clip is changed at random for training; all of its frames alike.

    Attributes:
      size: side in pixels.
      rand_augment: colours and shapes; None leaves them.
      scale: smallest and largest share of the frame's area in the crop, whose width / height is 3/4 to 4/3.
      flip_probability: of mirroring; 0 in V-JEPA 2's evaluations, whose classes know left from right.
      erase_probability: of a box of noise.

    Raises:
      DataError: a field is out of range.
    """

    size: int
    rand_augment: RandAugment | None
    scale: tuple[float, float]
    flip_probability: float
    erase_probability: float

    def __post_init__(self):
        require_field(self.size >= 1, "size", self.size, "1 or more")
        fits = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1
        require_field(fits, "scale", self.scale, "(smallest, largest) within 0 to 1")
        for name in ("flip_probability", "erase_probability"):
            require_field(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")

    def draw(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random view of a clip.

        Args:
          frames: uint8 [T, H, W, 3].
          rng: all randomness comes from it.

        Returns:
          float16 [T, size, size, 3], normalised: finer than the pixels were, in half of float32's memory.
        """
        if self.rand_augment is not None:
            frames = apply_changes(frames, self.rand_augment.draw(rng))
        left, top, right, bottom = random_resized_box(rng, *frames.shape[1:3], self.scale)
        flip = rng.random() < self.flip_probability
        # Noise may leave the range of colours, so the pixels are normalised here and not where they are encoded.
        view = np.empty((len(frames), self.size, self.size, 3), np.float32)
        for number, frame in enumerate(frames):
            cut = frame[top:bottom, left:right].astype(np.float32)
            cut = cv2.resize(cut, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
            view[number] = (cut[:, ::-1] if flip else cut) / 255
        view = (view - MEAN) / DEVIATION
        if rng.random() < self.erase_probability:
            view = erase_box(view, rng)
        return view.astype(np.float16)
