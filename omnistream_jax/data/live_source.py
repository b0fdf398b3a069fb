"""Frames as they come: of a video file, a webcam or a network stream, decoded and resized in a thread of their own.

PyAV gives up Python's lock while it decodes and scales, so that both go on beside the caller's computing. A file is
read as strictly as in data/frames.py: damage ends it. A live source is forgiven: what is lost on the way is passed over
and counted, and only silence ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.frames import FrameOptions, FrameResizer, decode_item
from omnistream_jax.data.items import Item
from omnistream_jax.data.video import MAX_PIXELS, PROBING

_AHEAD = 4  # frames that wait for the caller where none are dropped
_LARGEST_GAP = 10.0  # seconds between two stamps of a live source; beyond it, its clock is taken to have been set anew
_POLL = 0.05  # seconds after which a waiting thread looks whether it is to stop


@dataclasses.dataclass(frozen=True)
class Source:
    """Where frames come from.

    Attributes:
      address: as FFmpeg opens it.
      kind: "file" lies on a disk; "web" comes by http, and may be a file or a camera; "camera" sets its own pace.
      format: of FFmpeg, where the address does not tell it.
    """

    address: str
    kind: Literal["file", "web", "camera"]
    format: str | None = None


def find_source(text: str) -> Source:
    """The source that a person means by "0" or "/dev/video0" (a webcam), "rtsp://..." (any address), or a file's name.

    Raises:
      DataError: there is no such file, or it holds no video. Cameras and addresses are not tried here.
    """
    if re.fullmatch(r"\d+", text):
        return Source(f"/dev/video{text}", "camera", "v4l2")
    if text.startswith("/dev/video"):
        return Source(text, "camera", "v4l2")
    if match := re.match(r"(\w+)://", text):
        return Source(text, "web" if match[1] in ("http", "https") else "camera")
    path = Path(text)
    if not text or not path.is_file():
        what = "is a folder" if text and path.is_dir() else "there is no such file"
        raise DataError(f"input {text!r}: {what}; expected a video file, 0 or /dev/videoN for a webcam, or an address")
    with _open(Source(text, "file"), 0.0):
        return Source(text, "file")


@dataclasses.dataclass(frozen=True)
class LiveOptions:
    """How a source is read.

    Attributes:
      height: of the frames in pixels.
      width: of the frames in pixels.
      resize: "stretch" or "crop", as in FrameOptions.
      frame_rate: frames per second that are taken; 0 takes every frame.
      realtime: a file's frames come when they are due by their time stamps, and not as fast as they can be read.
      drop_frames: only the newest frame waits for the caller, in place of older ones; else the reading waits.
      timeout: seconds of silence after which a camera or address is given up.
    """

    height: int
    width: int
    resize: str = "crop"
    frame_rate: float = 0.0
    realtime: bool = False
    drop_frames: bool = False
    timeout: float = 10.0

    def frame_options(self) -> FrameOptions:
        """Those of data/frames.py. Raises DataError, naming the field, where a value cannot be used."""
        options = FrameOptions(self.height, self.width, self.resize, self.frame_rate, chunk=1)
        options.check()
        return options

    def check(self, source: Source) -> None:
        """Raise DataError, naming the field, where a value cannot be used with the source."""
        self.frame_options()
        if self.realtime and source.kind == "camera":
            raise DataError("realtime: only for files; a camera comes at its own pace")
        if self.drop_frames and source.kind == "file" and not self.realtime:
            raise DataError(
                "drop_frames: a file is read as fast as it can be; give realtime too, to play it like a camera"
            )


@dataclasses.dataclass(frozen=True)
class LiveFrame:
    """One frame.

    Attributes:
      pixels: uint8 [height, width, 3], RGB, upright.
      time: seconds since the source's first frame, by its own clock (a file: since its start).
      captured: time.monotonic() when the frame was there: decoded; with `realtime`, due. None for a file that is read
        as fast as it is taken: nobody waits for its frames.
    """

    pixels: np.ndarray
    time: float
    captured: float | None


class LiveReader:
    """Reads a source in a thread; iterate over it once, and close it (or use `with`).

    The iteration ends with the source, or soon after `stop` is set. A DataError, after the frames before it, tells that
    the source cannot be opened, is damaged (a file) or has fallen silent.

    Args:
      source: of `find_source`.
      options: how it is read.
      stop: ends everything once it is set; a signal handler may set it.

    Attributes:
      dropped: frames that newer ones have replaced before the caller took them.
      damaged: packets of a camera that could not be decoded, and frames that were marked as damaged.
    """

    def __init__(self, source: Source, options: LiveOptions, stop: threading.Event | None = None):
        options.check(source)
        self._source, self._options = source, options
        self._stop = stop or threading.Event()
        self._waiting: deque[LiveFrame] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._ended = False
        self.dropped = self.damaged = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[LiveFrame]:
        while (frame := self._take()) is not None:
            yield frame

    def close(self) -> None:
        """Ends the reading. A camera that says nothing at this moment is left to its timeout."""
        self._stop.set()
        self._thread.join(1.0)

    def __enter__(self) -> LiveReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _take(self) -> LiveFrame | None:
        with self._changed:
            while not self._waiting and not self._ended and not self._stop.is_set():
                self._changed.wait(_POLL)
            if self._stop.is_set():
                return None
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    # What runs in the thread

    def _read(self) -> None:
        try:
            with contextlib.closing(self._frames()) as frames:
                for frame in frames:
                    self._put(frame)
                    if self._stop.is_set():
                        break
        except av.FFmpegError as error:  # of scaling, say: errors of opening and decoding are told where they arise
            self._failure = DataError(f"{self._source.address}: {_reason(error)}")
        except BaseException as failure:  # it is raised where the frames are taken
            self._failure = failure
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, frame: LiveFrame) -> None:
        with self._changed:
            if self._options.drop_frames:
                self.dropped += len(self._waiting)
                self._waiting.clear()
            while len(self._waiting) >= _AHEAD and not self._stop.is_set():
                self._changed.wait(_POLL)
            self._waiting.append(frame)
            self._changed.notify_all()

    def _frames(self) -> Iterator[LiveFrame]:
        frames = self._file_frames() if self._source.kind == "file" else self._live_frames()
        return self._paced(frames) if self._options.realtime else frames

    def _paced(self, frames: Iterator[LiveFrame]) -> Iterator[LiveFrame]:
        started = None
        for frame in frames:
            if started is None:
                started = time.monotonic() - frame.time
            due = started + frame.time
            if self._stop.wait(max(due - time.monotonic(), 0.0)):
                return
            yield dataclasses.replace(frame, captured=due)

    def _file_frames(self) -> Iterator[LiveFrame]:
        item = Item(self._source.address, self._source.address, "video")
        for chunk in decode_item(item, self._options.frame_options()):
            yield LiveFrame(chunk.frames[0], float(chunk.times[0]), captured=None)

    def _live_frames(self) -> Iterator[LiveFrame]:
        resizer, clock = FrameResizer(self._options.frame_options()), _Clock()
        sampler = _Sampler(self._options.frame_rate)
        with _open(self._source, self._options.timeout) as container:
            stream = container.streams.video[0]
            for picture in self._decode(container, stream):
                captured = time.monotonic()
                seconds = clock(None if picture.pts is None else float(picture.pts * stream.time_base), captured)
                if sampler.takes(seconds):
                    yield LiveFrame(resizer(picture, self._source.address), seconds, captured)

    def _decode(self, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
        address, timeout = self._source.address, self._options.timeout
        stream.codec_context.thread_type = "SLICE"  # unlike frame threads, these hold no frame back
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        last = time.monotonic()
        try:
            for packet in container.demux(stream):
                if self._stop.is_set():
                    return
                try:
                    pictures = packet.decode()
                except av.InvalidDataError:
                    pictures = []
                    self.damaged += 1
                for picture in pictures:
                    if picture.is_corrupt:
                        self.damaged += 1
                    else:
                        yield picture
                        last = time.monotonic()  # what the caller took its time for is no silence
                if time.monotonic() - last > timeout:
                    raise DataError(f"{address}: it sends data, but no whole frame in {timeout:g} seconds")
        except av.FFmpegError as error:
            raise DataError(f"{address}: {_reason(error, last, timeout)}") from error
        if time.monotonic() - last >= timeout:  # FFmpeg takes some silences for the end
            raise DataError(f"{address}: {_silence(timeout)}")


@contextlib.contextmanager
def _open(source: Source, timeout: float) -> Iterator[Any]:
    """The source as a container of PyAV that has a video stream; DataError if it is none."""
    started = time.monotonic()
    options = PROBING | ({"rtsp_transport": "tcp"} if source.address.startswith("rtsp") else {})
    if source.kind == "camera":
        options |= {"fflags": "nobuffer", "flags": "low_delay"}
    try:
        container = av.open(source.address, format=source.format, options=options, timeout=timeout or None)
    except (av.FFmpegError, OSError, ValueError) as error:
        expected = "expected a video file" if source.kind == "file" else "cannot be opened"
        raise DataError(f"{source.address}: {expected} ({_reason(error, started, timeout)})") from error
    with container:
        if not container.streams.video:
            raise DataError(f"{source.address}: has no video stream")
        yield container


def _reason(error: Exception, since: float = math.inf, timeout: float = 0.0) -> str:
    """Why, for a reader; an error so long after the last sign of life is a silence, whatever FFmpeg makes of it."""
    if isinstance(error, av.error.ExitError) or (timeout and time.monotonic() - since >= timeout):
        return _silence(timeout)
    return getattr(error, "strerror", None) or str(error)


def _silence(timeout: float) -> str:
    return f"no answer in {timeout:g} seconds"


class _Clock:
    """Seconds since the first frame, by stamps that a camera may lack, or set anew in the middle."""

    def __init__(self):
        self._origin: float | None = None
        self._seconds = self._arrived = 0.0

    def __call__(self, stamp: float | None, arrived: float) -> float:
        seconds = None if stamp is None or self._origin is None else stamp - self._origin
        if seconds is None or not 0 <= seconds - self._seconds <= _LARGEST_GAP:
            # The first frame, or no usable stamp: goes on by the time that has passed here.
            seconds = self._seconds + (arrived - self._arrived if self._arrived else 0.0)
            self._origin = None if stamp is None else stamp - seconds
        self._seconds, self._arrived = seconds, arrived
        return seconds


class _Sampler:
    """Takes the frames nearest to each 1 / rate seconds without waiting for the next one, as `sample_frames` would.

    It supposes that the next frame comes as soon after this one as this one after the last; rate 0 takes every frame.
    """

    def __init__(self, rate: float):
        self._period = 1 / rate if rate else 0.0
        self._target, self._last = 0.0, 0.0

    def takes(self, seconds: float) -> bool:
        gap, self._last = seconds - self._last, seconds
        if seconds < self._target - gap / 2:
            return False
        while self._period and self._target <= seconds + gap / 2:
            self._target += self._period
        return True
