"""Exact access to single frames of a video, through PyAV.

Seeking in video is full of traps; what is done here was found exact on all clips tried: one frame is decoded right
after opening, before the first seek; time stamps (pts) are listed by demuxing; a read seeks backward to a key frame,
decodes forward and picks frames by their pts; decoding uses one thread.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.heap import trim_now_and_then
from omnistream_jax.data.orientation import orientation_of

MAX_PIXELS = 64_000_000
"""Largest frame (height x width) that is decoded."""
PROBING = {"max_pixels": str(MAX_PIXELS)}
"""Options of `av.open`, which may decode a frame to learn what it is, of any size if nothing is said."""


_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same bits on any CPU


_PLAIN_CONTAINERS = {"format_whitelist": "mov,matroska,avi"}  # mp4 and webm are among them


def open_video(path: str | os.PathLike, *, file: BinaryIO | None = None) -> VideoReader:
    """Opens a video file for reading single frames.

    Args:
      path: where it lies; where `file` is given, only its name in messages.
      file: the video itself, open for reading and seeking: a member of an archive, or io.BytesIO. It must stay open
        as long as the reader, which does not close it.

    Raises:
      DataError: the file is missing, is no video, is truncated, or not one frame of it can be decoded.
    """
    return VideoReader(path, file=file)


class VideoReader:
    """One open video file; not safe to share between threads. Use `open_video`, and close it (or use `with`).

    Attributes:
      path: the file.
      frame_count: frames that can be read.
      frame_rate: average frames per second.
      size: (height, width) in pixels, as players show it.
      orientation: how stored frames become that; what the first one tells holds for all.
    """

    def __init__(self, path: str | os.PathLike, *, file: BinaryIO | None = None):
        self.path = os.fspath(path)
        try:
            # What lies in archives came from anywhere: a text that names other files to play is no video.
            source, options = (self.path, PROBING) if file is None else (file, PROBING | _PLAIN_CONTAINERS)
            self._container = av.open(source, options=options)
        except FileNotFoundError:
            raise DataError(f"{self.path}: there is no such video file", reason="file is missing") from None
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"{self.path}: expected a video file ({error.strerror})") from error
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if not self._container.streams.video:
            raise DataError(f"{self.path}: expected a video file, but it has no video stream")
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        context.thread_type = "NONE"
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_PIXELS)}
        if context.width * context.height > MAX_PIXELS:
            raise DataError(
                f"{self.path}: frames of {context.width} x {context.height} pixels, at most {MAX_PIXELS:,} are allowed"
            )
        first = next(self._decode(), None)  # before any seek: without it, later reads can give wrong frames
        if first is None:
            raise DataError(f"{self.path}: not one frame can be decoded; the file is damaged or truncated")
        if self._container.format.name == "avi" and context.has_b_frames:
            # AVI stores no presentation time; what FFmpeg guesses for B-frames picks wrong frames without a word.
            raise DataError(
                f"{self.path}: an AVI with B-frames, whose frames cannot be told apart; transcode it to mp4"
            )
        self.orientation = orientation_of(first, self.path)
        self.size = self.orientation.size(first.height, first.width)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.frame_rate = float(rate) if rate else 0.0
        self._index_frames()
        self._reformatter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] | None = None  # an ongoing decode, and the pts that it last gave
        self._last_pts: int | None = None

    def _index_frames(self) -> None:
        """Lists the pts of all frames and of the key frames, without decoding."""
        self._seek(self._stream.start_time or 0)
        pts, key_frames, packets = [], [], 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.size == 0:  # the empty packet that ends a stream
                    continue
                packets += 1
                if packet.is_discard:  # cut off by the container's edit list: the decoder drops it too
                    continue
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is None:
                    raise DataError(f"{self.path}: its packets have no time stamps; remux it into mp4 or mkv")
                pts.append(stamp)
                if packet.is_keyframe:
                    key_frames.append(stamp)
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: the file is damaged ({error.strerror})") from error
        counted = "mp4" in self._container.format.name  # other containers' headers only estimate
        promised = self._stream.frames if counted else 0
        if packets < promised:
            raise DataError(f"{self.path}: truncated, {packets} of {promised} frames are there")
        self._pts = sorted(set(pts))
        self._key_frames = sorted(key_frames)
        self.frame_count = len(self._pts)

    def read(self, indices: Sequence[int], short_side: int | None = None) -> np.ndarray:
        """Decodes the frames with the given 0-based indices, in any order, repeated or not.

        Args:
          indices: which frames, each in [0, frame_count).
          short_side: the frames' short side in the result, in pixels; None keeps their size.

        Returns:
          uint8 [n, H, W, 3], RGB.

        Raises:
          DataError: an index is out of range, or a frame cannot be decoded.
        """
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < self.frame_count:
                raise DataError(f"{self.path}: frame {index} was asked for, it has {self.frame_count} frames")
        height, width = self._scaled_size(short_side)
        decoded = {}
        for index in sorted(set(indices)):
            frame = self._frame_at(self._pts[index])
            if frame is None:
                raise DataError(f"{self.path}: frame {index} of {self.frame_count} cannot be decoded")
            decoded[index] = self._to_rgb(frame, height, width)
        if not indices:
            return np.zeros((0, height, width, 3), np.uint8)
        return np.stack([decoded[index] for index in indices])

    def close(self) -> None:
        """Closes the file."""
        self._frames = None
        self._container.close()
        trim_now_and_then()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _to_rgb(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        # One reformatter for all frames: a frame's own would set up its tables and threads anew.
        height, width = self.orientation.size(height, width)
        pixels = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=_SCALING, threads=1
        ).to_ndarray()
        return self.orientation.apply(pixels)

    def _scaled_size(self, short_side: int | None) -> tuple[int, int]:
        if short_side is None:
            return self.size
        ratio = short_side / min(self.size)
        return round(self.size[0] * ratio), round(self.size[1] * ratio)

    def _frame_at(self, pts: int) -> av.VideoFrame | None:
        """The frame with this pts, decoded onward from the last one or from the nearest key frame before it."""
        key = bisect.bisect_right(self._key_frames, pts) - 1
        onward = self._last_pts is not None and self._last_pts < pts
        near = onward and (key < 0 or self._key_frames[key] <= self._last_pts)
        if near and (frame := self._decode_until(pts)) is not None:
            return frame
        # A container may land after the frame that it was asked for: then start one key frame earlier.
        for start in range(key, -1, -1):
            self._seek(self._key_frames[start])
            if (frame := self._decode_until(pts)) is not None:
                return frame
        self._seek(self._stream.start_time or 0)
        return self._decode_until(pts)

    def _decode_until(self, pts: int) -> av.VideoFrame | None:
        if self._frames is None:
            self._frames = self._decode()
        for frame in self._frames:
            if frame.pts is None or (self._last_pts is not None and frame.pts <= self._last_pts):
                raise DataError(f"{self.path}: its time stamps are out of order; transcode it to mp4")
            self._last_pts = frame.pts
            if frame.pts >= pts:
                return frame if frame.pts == pts else None
        return None

    def _decode(self) -> Iterator[av.VideoFrame]:
        try:
            yield from self._container.decode(self._stream)
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: the file is damaged ({error.strerror})") from error

    def _seek(self, stamp: int) -> None:
        self._frames, self._last_pts = None, None
        try:
            self._container.seek(stamp, backward=True, stream=self._stream)
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: cannot be searched for single frames ({error.strerror})") from error
