"""The end of a process whose step does not: a hung data loader keeps the heartbeats of jax.distributed going."""

import faulthandler
import sys


class StepDeadline:
    """Prints the stacks of all threads and exits with status 1 when a step takes too long, even with the GIL held.

    Args:
        seconds: of a step, with the save and the pictures that belong to it; 0: no deadline.
        long_factor: a long step has so many times as long; the first is one, for it compiles.

    For `with`, one at a time in a process: the deadline of the first step runs from its entry, the later ones from
    `step_done`, and none after the exit.
    """

    def __init__(self, seconds: float, *, long_factor: float = 10.0):
        if seconds < 0:
            raise ValueError(f"expected a deadline of 0 seconds or more, got {seconds}")
        self._seconds, self._long = seconds, seconds * long_factor

    def __enter__(self) -> "StepDeadline":
        self._arm(self._long)
        return self

    def step_done(self, long: bool = False) -> None:
        """What follows has a step's time from now on, or that of a long one."""
        self._arm(self._long if long else self._seconds)

    def __exit__(self, *_) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, seconds: float) -> None:
        if self._seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
