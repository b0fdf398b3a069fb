"""SIGTERM, by which schedulers take a machine back: the run ends its step, saves and exits with a status of its own.

One process by itself takes the signal with a handler. Where `jax.distributed` is up, JAX's preemption service takes
it, tells every process, and names one step after which all of them save; a handler of ours would silently disable it.
"""

import os
import signal
import threading
import time
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from omnistream_jax.utils.agreement import any_process

# JAX's service looks once a second whether the signal has come, and tells the others at once.
_HEARD_WITHIN = 2.0
# Schedulers signal the processes of a job one after another: within so many seconds it is the same notice.
_SAME_NOTICE = 10.0
_NOTHING_TO_SAVE = "SIGTERM: the run ends here, with nothing left to save"


class PreemptedError(SystemExit):
    """The run has been asked to end and has nothing left to save; ends the program with `code`, the status to requeue.

    As KeyboardInterrupt it is no `Exception`, so that what handles failures does not take it for one.
    """


class Preemption:
    """Whether SIGTERM has asked the run to end; a context manager, for the main thread.

    At first there is nothing to save, and a SIGTERM raises PreemptedError at once. From the first call of `reached` on,
    that call alone tells of it. A second SIGTERM kills the process. With `jax.distributed`, a notice that comes before
    the first call of `reached` is kept for it, and "second" means 10 seconds after `reached` was true.

    Args:
        status: of the program, as `config.requeue_exit_code`.
    """

    def __init__(self, status: int):
        self._status = status
        self._deferred, self._asked = False, False
        self._reached_at = 0.0
        self._calls = 0  # JAX's service counts from 0 on, wherever a run goes on
        self._previous: object = None
        self._shared = jax.distributed.is_initialized()

    def __enter__(self) -> "Preemption":
        if not self._shared and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def reached(self) -> bool:
        """Whether to save now and `leave`. Every process calls it after every step."""
        self._deferred = True
        if not self._shared:
            return self._asked
        self._calls += 1
        reached = multihost_utils.reached_preemption_sync_point(self._calls)
        if reached:
            self._reached_at = time.monotonic()
            self._take_over()
        return reached

    def leave(self, message: str) -> NoReturn:
        """Says so on standard error, in process 0, and raises PreemptedError. For all processes together."""
        if jax.process_index() == 0:
            _tell(message)
        raise PreemptedError(self._status)

    def nothing_to_save(self) -> None:
        """From now on SIGTERM raises PreemptedError at once again, in the process that gets it, without the others.

        All processes call it together. With `jax.distributed` it takes 2 seconds, for a notice may be on its way.
        """
        if self._shared and self._heard_late():
            self._reached_at = time.monotonic()
            self.leave(_NOTHING_TO_SAVE)
        self._deferred = False
        if self._asked:
            self._leave_alone()

    def _heard_late(self) -> bool:
        """Whether a notice has come since the last call of `reached`: JAX's service has named the step after it."""
        self._deferred = True
        self._take_over()
        time.sleep(_HEARD_WITHIN)
        multihost_utils.sync_global_devices("notices of preemption have been heard")
        heard = multihost_utils.reached_preemption_sync_point(self._calls + 1)
        return any_process(heard or self._asked)

    def _leave_alone(self) -> NoReturn:
        _tell(_NOTHING_TO_SAVE)
        raise PreemptedError(self._status)

    def _take_over(self) -> None:
        """Takes SIGTERM from JAX's service, once that has done its work."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, self._handle)
            self._previous = previous if self._previous is None else self._previous

    def _handle(self, *_: object) -> None:
        if self._reached_at and self._deferred:
            if time.monotonic() - self._reached_at > _SAME_NOTICE:
                _die()
            return
        if self._asked:
            _die()
        self._asked = True
        if not self._deferred:
            self._leave_alone()
        _tell("SIGTERM: the run ends after this step; a second one kills it")


def _tell(message: str) -> None:
    """Past Python's buffers, in the midst of whose use a handler may run."""
    os.write(2, f"{message}\n".encode())


def _die() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
