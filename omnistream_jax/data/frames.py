"""Decoding an item from its first frame to its last, at a chosen frame rate and size, in bounded memory.

Unlike `data/video.py`, which seeks single frames for training, nothing is sought here: frames come in the order in
which they are shown. Damage is an error and never a concealed picture: the decoder stops at the first flaw
(`err_detect=explode`), and the end is held against the length that the container promises, where it promises one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.items import Item, image_files
from omnistream_jax.data.orientation import orientation_of
from omnistream_jax.data.video import MAX_PIXELS, PROBING

RESIZE_MODES = ("stretch", "crop")
SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same bits on any CPU


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """How items are decoded.

    Attributes:
      height: of the frames in pixels.
      width: of the frames in pixels.
      resize: "stretch" scales both sides on their own; "crop" keeps proportions and cuts the middle out.
      frame_rate: frames per second that are taken; 0 takes every frame. See `sample_frames`.
      image_rate: frames per second at which the pictures of a folder are taken to have been made.
      chunk: frames of a chunk; the last chunk of an item may be shorter.
    """

    height: int
    width: int
    resize: str = "stretch"
    frame_rate: float = 0.0
    image_rate: float = 30.0
    chunk: int = 16

    def check(self) -> None:
        """Raise DataError, naming the field, where a value cannot be used."""
        for name in ("height", "width", "chunk"):
            if not getattr(self, name) >= 1:
                raise DataError(f"{name}: expected a positive whole number, got {getattr(self, name)!r}")
        if self.resize not in RESIZE_MODES:
            raise DataError(f"resize: expected one of {', '.join(RESIZE_MODES)}, got {self.resize!r}")
        if not (np.isfinite(self.frame_rate) and self.frame_rate >= 0):
            raise DataError(f"frame_rate: expected frames per second, or 0 for every frame, got {self.frame_rate!r}")
        if not (np.isfinite(self.image_rate) and self.image_rate > 0):
            raise DataError(f"image_rate: expected frames per second, got {self.image_rate!r}")


@dataclasses.dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of an item.

    Attributes:
      frames: uint8 [n, height, width, 3], RGB.
      times: float64 [n], seconds since the item's start.
      source_size: (height, width) of the item's first frame before it was resized.
      progress: share of the item that has been read, 0 to 1, as its container promises.
    """

    frames: np.ndarray
    times: np.ndarray
    source_size: tuple[int, int]
    progress: float


@dataclasses.dataclass(frozen=True)
class TimedFrame:
    """A frame that has been reached and not yet turned into pixels."""

    time: Fraction  # seconds
    progress: float
    picture: Callable[[], av.VideoFrame]


def decode_item(item: Item, options: FrameOptions) -> Iterator[FrameChunk]:
    """The frames of an item, in chunks of `options.chunk`.

    Raises:
      DataError: the item is missing, is no video or picture, is damaged, or is truncated. It may come after chunks.
    """
    options.check()
    frames = _video_frames(item.path) if item.kind == "video" else _image_frames(item.path, options.image_rate)
    if options.frame_rate:
        frames = sample_frames(frames, exact_rate(options.frame_rate))
    resizer, source_size = FrameResizer(options), None
    while batch := list(itertools.islice(frames, options.chunk)):
        pictures = [timed.picture() for timed in batch]
        first = pictures[0]
        source_size = source_size or orientation_of(first, item.path).size(first.height, first.width)
        yield FrameChunk(
            frames=np.stack([resizer(picture, item.path) for picture in pictures]),
            times=np.array([float(timed.time) for timed in batch], np.float64),
            source_size=source_size,
            progress=batch[-1].progress,
        )


def exact_rate(rate: float) -> Fraction:
    """The decimal number that was written: 29.97 is 2997/100, and not the float next to it."""
    return Fraction(repr(float(rate)))


def sample_frames(frames: Iterable[TimedFrame], rate: Fraction) -> Iterator[TimedFrame]:
    """The frame nearest to each of the times start, start + 1 / rate, start + 2 / rate, ... of a stream.

    Of two that are as near, the earlier is taken. No frame is taken twice: a rate above the stream's own takes every
    frame. The stream ends as if one more frame were to come, as far behind the last as that is behind the one before.
    """
    target, before, last_gap = None, None, Fraction(0)  # before: the last frame, and whether it has been taken
    for frame in frames:
        if target is None:
            target, before = frame.time + 1 / rate, (frame, True)
            yield frame
            continue
        last_gap, taken = frame.time - before[0].time, False
        while target <= frame.time:
            if target - before[0].time <= frame.time - target:
                if not before[1]:
                    yield before[0]
                    before = (before[0], True)
            elif not taken:
                yield frame
                taken = True
            target += 1 / rate
        before = (frame, taken)
    if before is not None and not before[1] and target - before[0].time <= last_gap / 2:
        yield before[0]


def _image_frames(folder: str, rate: float) -> Iterator[TimedFrame]:
    files = image_files(folder)
    for index, file in enumerate(files):

        def picture(file=file) -> av.VideoFrame:
            return av.VideoFrame.from_ndarray(np.ascontiguousarray(read_image(file)))

        yield TimedFrame(index / exact_rate(rate), (index + 1) / len(files), picture)


def _video_frames(path: str) -> Iterator[TimedFrame]:
    try:
        container = av.open(path, options=PROBING)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such video file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path}: expected a video file ({_reason(error)})") from error
    with container:
        yield from _decode(container, path)


def _decode(container: Any, path: str) -> Iterator[TimedFrame]:
    if not container.streams.video:
        raise DataError(f"{path}: expected a video file, but it has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    start = Fraction(container.start_time or 0, av.time_base)
    seconds = (container.duration or 0) / av.time_base
    avi = container.format.name == "avi"
    stamps: deque[int] = deque()  # of AVI's packets, which are in the order in which frames are shown
    packets, count, last, gap = 0, 0, None, Fraction(0)
    try:
        for packet in container.demux(stream):
            if packet.pts is not None or packet.dts is not None:
                packets += 1
                if avi and packet.size:
                    stamps.append(packet.dts)
            for frame in packet.decode():
                # AVI has no presentation times, and those that FFmpeg makes up for B-frames are wrong.
                stamp = stamps.popleft() if avi and stamps else frame.pts
                if frame.is_corrupt or stamp is None:
                    what = "is damaged" if frame.is_corrupt else "has no time stamp; remux the video into mp4 or mkv"
                    raise DataError(f"{path}: frame {count} {what}")
                time = stamp * stream.time_base - start
                if last is not None and time <= last:
                    raise DataError(f"{path}: the time stamp of frame {count} does not follow the one before")
                gap = max(gap, time - last if last is not None else (frame.duration or 0) * stream.time_base)
                last, count = time, count + 1
                progress = min(max(float(time) / seconds, 0.0), 1.0) if seconds else 0.0
                yield TimedFrame(time, progress, lambda frame=frame: frame)
    except av.FFmpegError as error:
        raise DataError(f"{path}: damaged or truncated after frame {count} ({_reason(error)})") from error
    _check_end(container, stream, path, packets, last, gap)


def _check_end(container: Any, stream: Any, path: str, packets: int, last: Fraction | None, gap: Fraction) -> None:
    """Hold what was read against what the container promises: a count in mp4 and AVI, an end in Matroska.

    Other containers, such as transport streams, promise nothing: a cut between two frames cannot be told there.
    """
    if last is None:
        raise DataError(f"{path}: not one frame can be decoded; the file is damaged or truncated")
    kind = container.format.name
    if ("mp4" in kind or kind == "avi") and packets < stream.frames:
        raise DataError(f"{path}: truncated, {packets} of {stream.frames} frames are there")
    if "matroska" in kind and (promised := _tagged_seconds(stream.metadata.get("DURATION", ""))) > last + 1.5 * gap:
        raise DataError(f"{path}: truncated, {float(last + gap):.2f} of {float(promised):.2f} seconds are there")


def _tagged_seconds(tag: str) -> Fraction:
    """Matroska's "00:01:02.500000000" in seconds, 0 for anything else."""
    try:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    except ValueError:
        return Fraction(0)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class FrameResizer:
    """Turns decoded frames into upright RGB pixels of one size."""

    def __init__(self, options: FrameOptions):
        self._size, self._crop = (options.height, options.width), options.resize == "crop"
        self._reformatter = VideoReformatter()  # one for all: a frame's own would set up its tables and threads anew

    def __call__(self, frame: av.VideoFrame, path: str) -> np.ndarray:
        """uint8 [height, width, 3]. Raises DataError, naming `path`, for a frame too large to be meant."""
        if frame.width * frame.height > MAX_PIXELS:
            raise DataError(f"{path}: frames of {frame.width} x {frame.height} pixels, at most {MAX_PIXELS:,} allowed")
        orientation = orientation_of(frame, path)
        height, width = orientation.size(*self._scaled(*orientation.size(frame.height, frame.width)))
        pixels = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=SCALING, threads=1
        ).to_ndarray()
        pixels = orientation.apply(pixels)
        top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape, self._size, strict=False))
        return pixels[top : top + self._size[0], left : left + self._size[1]]

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if not self._crop:
            return self._size
        scale = max(self._size[0] / height, self._size[1] / width)
        return max(round(height * scale), self._size[0]), max(round(width * scale), self._size[1])
