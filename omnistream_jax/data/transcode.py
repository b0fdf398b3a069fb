"""A video in the form that is fast to train from: small H.264 with a key frame every few frames, without sound.

Which frames there are is what `video.VideoReader` counts and reads; each keeps its time, counted from the first one, so
that a variable frame rate stays. Frames are stored as players show them.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.video import VideoReader

CODEC = "libx264"

_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same bits on any CPU
# One thread alone is not enough: the faster forms of x264's macroblock tree give other bytes from run to run.
_SAME_BYTES = {"threads": "1", "x264-params": "cpu-independent=1"}
_RGB_SPACE = 0  # of frames that have no luminance to be kept
_USUAL_RATE = 25  # where the file tells none; it only guides the encoder


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How videos are stored.

    Attributes:
      short_side: larger videos are scaled down to it, in pixels, even; 0 keeps every size.
      crf: x264's constant rate factor: 0 is exact, 51 the worst.
      preset: x264's, how long it searches.
      key_frames: frames from one key frame to the next, at most: a clip is decoded from the key frame before it.
    """

    short_side: int = 256
    crf: int = 20
    preset: str = "veryfast"
    key_frames: int = 12

    def check(self) -> None:
        """Raises UsageError for values that make no sense, or where PyAV comes without the encoder."""
        if self.short_side < 0 or self.short_side % 2:
            raise UsageError(f"short_side: expected an even number of pixels, or 0 to keep it, got {self.short_side}")
        if not 0 <= self.crf <= 51:
            raise UsageError(f"crf: expected 0 to 51, got {self.crf}")
        if CODEC not in av.codecs_available:
            raise UsageError(f"this PyAV has no encoder {CODEC}: install the wheel of PyPI")


@dataclasses.dataclass(frozen=True)
class Transcoded:
    """A video that was transcoded.

    Attributes:
      data: an MP4 file; the same bytes for the same video and options.
      frames: how many there are.
      frame_rate: of the source, frames per second on average; 0: it tells none.
      size: (height, width) of the source in pixels, as players show it.
    """

    data: bytes
    frames: int
    frame_rate: float
    size: tuple[int, int]


def transcode(path: str | os.PathLike, options: VideoOptions, *, file: BinaryIO | None = None) -> Transcoded:
    """Reads a video whole and encodes it again.

    Args:
      path: where it lies; where `file` is given, only its name in messages.
      options: how it is stored. Sizes become even: of what is not scaled, the last row or column is cut off.
      file: the video itself; see `video.open_video`.

    Raises:
      DataError: it cannot be read to its end, or is turned by an angle that is no quarter turn.
    """
    with _Frames(path, file=file) as reader:
        try:
            encoder = _Encoder(reader, options)
            for frame in reader.frames():
                encoder.add(frame)
            data = encoder.finish()
        except (av.FFmpegError, MemoryError) as error:
            raise DataError(f"{reader.path}: cannot be transcoded ({error})", reason="cannot be transcoded") from error
        return Transcoded(data, reader.frame_count, reader.frame_rate, reader.size)


class _Frames(VideoReader):
    """Gives the frames as the decoder does: exactly those that `read` finds, with their times."""

    def frames(self) -> Iterator[av.VideoFrame]:
        """All frames in order."""
        for number, pts in enumerate(self._pts):
            frame = self._frame_at(pts)
            if frame is None:
                raise DataError(f"{self.path}: frame {number} of {self.frame_count} cannot be decoded")
            yield frame

    @property
    def rate(self) -> Fraction:
        """Frames per second, as exactly as the file tells it."""
        return self._stream.average_rate or self._stream.guessed_rate or Fraction(_USUAL_RATE)


class _Encoder:
    """Writes frames into an MP4 file in memory; what the first one tells of itself holds for all."""

    def __init__(self, reader: _Frames, options: VideoOptions):
        self._options, self._rate, self._orientation = options, reader.rate, reader.orientation
        self._scaled = _scaled_size(reader.size, options.short_side)
        self._reformatter = VideoReformatter()
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream = None

    def add(self, frame: av.VideoFrame) -> None:
        """Appends a frame."""
        if self._stream is None:
            self._begin(frame)
        picture = self._converted(frame)
        picture.pts, picture.time_base = frame.pts - self._first_pts, frame.time_base
        picture.duration = frame.duration
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> bytes:
        """Ends the file, and gives its bytes."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()

    def _begin(self, frame: av.VideoFrame) -> None:
        self._first_pts = frame.pts
        options = {"crf": str(self._options.crf), "preset": self._options.preset} | _SAME_BYTES
        stream = self._stream = self._container.add_stream(CODEC, rate=self._rate, options=options)
        stream.height, stream.width = (side - side % 2 for side in self._scaled)
        stream.pix_fmt, stream.gop_size = "yuv420p", self._options.key_frames
        stream.time_base = stream.codec_context.time_base = frame.time_base
        # The colours' meaning is told as the source tells it, if it does: readers would guess the same of both.
        self._space = int(Colorspace.ITU709) if frame.colorspace == _RGB_SPACE else frame.colorspace
        context = stream.codec_context
        context.colorspace, context.color_range = self._space, int(ColorRange.MPEG)
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        height, width = self._orientation.size(*self._scaled)
        small = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p",
            interpolation=_SCALING,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=self._space,
            threads=1,
        )
        height, width = height - height % 2, width - width % 2
        planes = []
        for plane, part in zip(small.planes, (1, 2, 2), strict=True):
            pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            planes.append(self._orientation.apply(pixels[: height // part, : width // part]))
        # A frame of its own: the decoded one says what it was to its codec, which x264 would take for orders.
        rows, columns = planes[0].shape
        joined = np.concatenate([plane.ravel() for plane in planes]).reshape(rows * 3 // 2, columns)
        return av.VideoFrame.from_ndarray(joined, format="yuv420p")


def _scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width), even where it is not the source's."""
    if not short_side or min(size) <= short_side:
        return size
    ratio = Fraction(short_side, min(size))
    height, width = (2 * round(side * ratio / 2) for side in size)
    return height, width
