"""TensorBoard's event files, written at once and given up where the disk would not take them.

tensorboardX's own SummaryWriter hands events to a thread through a queue: on a full disk the thread dies, the queue
fills, and the training waits for ever.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

_FLUSH_SECONDS = 10.0


class Board:
    """Event files in a folder.

    Where one cannot be written, that is told once, what was to be written is lost, and a minute later a new file is
    begun.

    Args:
        folder: made where it is missing.
        purge_step: events of this step and later ones, which an earlier run has left there, are not shown.
    """

    RETRY_SECONDS = 60.0

    def __init__(self, folder: Path, purge_step: int):
        self._folder, self._purge_step = folder, purge_step
        self._events: EventsWriter | None = None
        self._next_try, self._flushed = 0.0, 0.0
        self._files = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A number of a step."""
        self._write(Event(step=step, summary=scalar(name, value)))

    def add_image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture of a step: uint8 [height, width, 3]."""
        self._write(Event(step=step, summary=image(name, picture, dataformats="HWC")))

    def close(self) -> None:
        """Ends the file; nothing can be written afterwards."""
        events, self._events, self._next_try = self._events, None, math.inf
        if events is not None:
            with self._given_up_on_failure():
                events.close()

    def _write(self, event: Event) -> None:
        now = time.monotonic()
        if self._events is None and now < self._next_try:
            return
        event.wall_time = time.time()
        with self._given_up_on_failure():
            if self._events is None:
                self._begin()
            self._events.write_event(event)
            if now - self._flushed >= _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = now

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(self._folder / "events"), f".{self._files}")
        if self._files == 0:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=self._purge_step, session_log=start))
        self._files += 1

    @contextlib.contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logging.warning("TensorBoard's events cannot be written to %s: %s", self._folder, error.strerror or error)
            self._next_try = time.monotonic() + self.RETRY_SECONDS
            events, self._events = self._events, None
            if events is not None:
                with contextlib.suppress(OSError):
                    events.close()
