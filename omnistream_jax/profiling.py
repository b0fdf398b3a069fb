"""A profile of a few steps, at steps that the config names or when the process is sent SIGUSR1."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SIGNAL = signal.SIGUSR1
_STEPS_OF_A_SIGNAL = 5


class Profiler:
    """Records steps with jax.profiler: each process its own, on this host and its devices.

    `kill -USR1 PID` records the next 5 steps of a running process (only where this object was made in its main thread,
    as Python asks of signals). Nothing is recorded, and nothing costs time, until a profile starts.

    Args:
        directory: gets plugins/profile/TIME/HOST.xplane.pb and HOST.trace.json.gz, and is made with the first profile.
            Of several processes each has a folder process_N there, for those of one host would write the same files.
        start, steps: record so many steps from this one on; 0 steps: only on the signal.
        say: prints a line.

    For `with`, around the steps: what is being recorded at its end ends there.
    """

    def __init__(self, directory: Path, *, start: int = 1, steps: int = 0, say: Callable[[str], None] = print):
        for name, value, least in (("start", start, 1), ("steps", steps, 0)):
            if value < least:
                raise ValueError(f"profile.{name}: expected {least} or more, got {value}")
        self._directory, self._say = directory, say
        self._own = directory / f"process_{jax.process_index()}" if jax.process_count() > 1 else directory
        self._start, self._steps = start, steps
        self._wanted = threading.Event()
        self._recorded = range(0)  # the steps of the profile that is running
        self._step = 0
        self._signals: Any = None

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            self._signals = signal.signal(SIGNAL, lambda *_: self._wanted.set())
        return self

    def before(self, step: int) -> None:
        """A step is about to begin, and the one before it has ended on the devices."""
        if self._recorded and step >= self._recorded.stop:
            self._finish()
        self._step = step
        if self._recorded:
            return
        if self._steps and step == self._start:
            self._begin(self._steps)
        elif self._wanted.is_set():
            self._begin(_STEPS_OF_A_SIGNAL)

    def __exit__(self, *_) -> None:
        if self._recorded:
            self._finish()
        if self._signals is not None:
            signal.signal(SIGNAL, self._signals)

    def _begin(self, steps: int) -> None:
        self._wanted.clear()
        try:
            jax.profiler.start_trace(str(self._own))
        except (RuntimeError, OSError) as error:  # as when another profile is running: the training goes on
            self._say(f"no profile: {error}")
            return
        self._recorded = range(self._step, self._step + steps)
        self._say(f"profiling steps {self._step} to {self._recorded.stop - 1}")

    def _finish(self) -> None:
        first, self._recorded = self._recorded.start, range(0)
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # as when the disk is full
            self._say(f"no profile: {error}")
            return
        self._say(
            f"profile of steps {first} to {self._step}: {self._directory} (pip install xprof; xprof --logdir "
            f"{self._directory}; or its .trace.json.gz in https://ui.perfetto.dev)"
        )
