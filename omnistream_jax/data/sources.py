"""Random-access sources of photographs and videos, and how they are mixed.

A source lists its files when it is made and opens one only when a sample is drawn, so it pickles into data workers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from omnistream_jax.data.embedded import embedded_files
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.schema import Sample
from omnistream_jax.data.video import VideoReader, open_video

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LIST_SUFFIX = ".txt"


class Source(Protocol):
    """Records that samples are drawn from, by index."""

    name: str
    max_frames: ClassVar[int | None]  # of a clip; None: as many as a record has

    def __len__(self) -> int:
        """How many records there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the path of a record's file."""

    def sample(self, index: int, rng: np.random.Generator, frames: int, stride: tuple[int, int]) -> Sample:
        """Decodes a record; of a video, a random clip of `frames` frames (see `VideoSource.sample`)."""


class SampledVideos(Protocol):
    """How a source of videos takes its clips; see `VideoSource`."""

    short_side: int | None
    frame_rate: float | None


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Photographs, one record a file. Made by `image_source` or `embedded_source`."""

    name: str
    paths: tuple[str, ...]
    max_frames: ClassVar[int | None] = 1

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """The path of a record's file."""
        return self.paths[index]

    def sample(self, index: int, rng: np.random.Generator, frames: int = 1, stride: tuple[int, int] = (1, 1)) -> Sample:
        """Reads a photograph as a clip of one frame; `rng` and `stride` matter to videos only.

        Raises:
          DataError: the file cannot be read, or more than one frame is asked for.
        """
        path = self.paths[index]
        if frames != 1:
            raise DataError(f"{path}: a photograph has 1 frame, a clip of {frames} was asked for")
        return Sample(frames=read_image(path)[None], path=path)


@dataclasses.dataclass(frozen=True)
class VideoSource:
    """Videos, one record a file. Made by `video_source` or `embedded_source`.

    Attributes:
      name: how messages call it.
      paths: the files.
      short_side: frames are decoded to this short side, in pixels, and videos below it are left as they are;
        None keeps every video's size.
      frame_rate: a stride of 1 is 1 / frame_rate seconds, or one frame of a video that has fewer; None: one frame.
    """

    name: str
    paths: tuple[str, ...]
    short_side: int | None = None
    frame_rate: float | None = dataclasses.field(default=None, kw_only=True)
    max_frames: ClassVar[int | None] = None

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """The path of a record's file."""
        return self.paths[index]

    def sample(self, index: int, rng: np.random.Generator, frames: int, stride: tuple[int, int]) -> Sample:
        """Reads a random clip of a video: first a stride is drawn, then where the clip starts.

        Args:
          index: which record.
          rng: all randomness comes from it.
          frames: frames of the clip.
          stride: smallest and largest distance between two frames of the clip, in frames of the video (or of
            `frame_rate`); the largest is lowered for a video that is too short for it.

        Raises:
          DataError: the file cannot be read, or is too short for the smallest stride.
        """
        path = self.paths[index]
        with open_video(path) as video:
            return Sample(read_clip(video, rng, frames, stride, self, video.frame_rate), path)


def read_clip(
    video: VideoReader,
    rng: np.random.Generator,
    frames: int,
    stride: tuple[int, int],
    source: SampledVideos,
    frame_rate: float,
) -> np.ndarray:
    """A random clip uint8 [T, H, W, 3] of an open video, as its source's `short_side` and `frame_rate` ask for.

    `frame_rate` is the video's own. Raises DataError as `VideoSource.sample` does.
    """
    unit = max(1.0, frame_rate / source.frame_rate) if source.frame_rate else 1.0
    indices = clip_indices(rng, video.frame_count, frames, stride, video.path, unit)
    shrink = source.short_side is not None and source.short_side < min(video.size)
    return video.read(indices, source.short_side if shrink else None)


def clip_indices(
    rng: np.random.Generator, frame_count: int, frames: int, stride: tuple[int, int], path: str, unit: float = 1.0
) -> list[int]:
    """The frame indices of a random clip, as `VideoSource.sample` draws it.

    Args:
      rng: all randomness comes from it.
      frame_count: frames of the video.
      frames: frames of the clip.
      stride: smallest and largest distance between two frames of the clip, in units.
      path: names the video in messages.
      unit: frames of the video in a unit, 1 or more and not always a whole number.

    Raises:
      DataError: the video is too short for the smallest stride.
    """
    smallest, largest = stride
    needed = round((frames - 1) * smallest * unit) + 1
    if frame_count < needed:
        raise DataError(
            f"{path}: has {frame_count} frames, a clip of {frames} frames at stride {smallest} needs {needed}",
            reason="too few frames",
        )
    if frames > 1:
        largest = max(smallest, min(largest, int((frame_count - 1) / ((frames - 1) * unit))))
    step = int(rng.integers(smallest, largest + 1)) * unit
    start = int(rng.integers(frame_count - round((frames - 1) * step)))
    return [start + round(index * step) for index in range(frames)]


def image_source(path: str | os.PathLike, name: str | None = None) -> ImageSource:
    """Photographs of a folder tree, of a text list (one path a line, relative to the list's folder), or one file.

    Raises:
      DataError: nothing is there, or nothing that is a photograph by its suffix.
    """
    return ImageSource(name or os.fspath(path), _list_files(path, IMAGE_SUFFIXES, "image"))


def video_source(
    path: str | os.PathLike, name: str | None = None, short_side: int | None = None, frame_rate: float | None = None
) -> VideoSource:
    """Videos of a folder tree, of a text list (one path a line, relative to the list's folder), or one file.

    Raises:
      DataError: nothing is there, or nothing that is a video by its suffix.
    """
    return VideoSource(
        name or os.fspath(path), _list_files(path, VIDEO_SUFFIXES, "video"), short_side, frame_rate=frame_rate
    )


def embedded_source(kind: str, split: str) -> ImageSource | VideoSource:
    """The real photographs ("images") or videos ("videos") that come with the package; split "train" or "heldout"."""
    paths = tuple(str(path) for path in embedded_files(kind, split))
    name = f"embedded {kind} ({split})"
    return ImageSource(name, paths) if kind == "images" else VideoSource(name, paths)


def mixture_weights(sources: Sequence[Source], weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Shares of the sources in a mixture, summing to 1: by default in proportion to the square root of their size.

    Raises:
      DataError: there are not as many weights as sources, or one is not positive.
    """
    if weights is None:
        weights = [len(source) ** 0.5 for source in sources]
    if len(weights) != len(sources):
        raise DataError(f"weights: {len(weights)} are given for {len(sources)} sources")
    for source, weight in zip(sources, weights, strict=True):
        if not (weight > 0 and np.isfinite(weight)):
            raise DataError(f"weights: {weight} for source {source.name}, expected a positive number")
    return tuple(float(weight) / float(sum(weights)) for weight in weights)


def _list_files(path: str | os.PathLike, suffixes: tuple[str, ...], kind: str) -> tuple[str, ...]:
    path = Path(path)
    expected = f"expected a folder with {kind} files ({' '.join(suffixes)}), a {LIST_SUFFIX} list of them, or one"
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; {expected}")
    if path.is_dir():
        files = _walk(path, suffixes)
    elif path.suffix.lower() == LIST_SUFFIX:
        files = _read_list(path, suffixes, expected)
    elif path.suffix.lower() in suffixes:
        files = (str(path),)
    else:
        raise DataError(f"{path}: its suffix is {path.suffix or 'empty'}; {expected}")
    if not files:
        raise DataError(f"{path}: holds no {kind} file; {expected}")
    return files


def _walk(folder: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    found = []
    for parent, _, names in os.walk(folder, followlinks=True, onerror=stop):
        found.extend(os.path.join(parent, name) for name in names if name.lower().endswith(suffixes))
    return tuple(sorted(found))


def _read_list(path: Path, suffixes: tuple[str, ...], expected: str) -> tuple[str, ...]:
    """Paths of a text list. The files are not looked for here: a list may name millions on a slow disk."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a text list ({error}); {expected}") from error
    files = []
    for number, line in enumerate(lines, start=1):
        if not (entry := line.strip()):
            continue
        if not entry.lower().endswith(suffixes):
            raise DataError(f"{path}, line {number}: {entry!r} has an unknown suffix; {expected}")
        files.append(os.path.join(path.parent, entry))
    return tuple(files)
