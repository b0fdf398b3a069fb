"""What a run outlives, how often, and when it gives up: numbers that are not finite, saves that fail.

The counts stand in every checkpoint, so that a run that is started again goes on counting.
"""

import contextlib
import dataclasses
import errno
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from omnistream_jax.checkpoint import CheckpointError, Checkpoints, SaveFailedError
from omnistream_jax.utils.agreement import warn
from omnistream_jax.utils.files import write_json

_FAILED_SAVES = 3  # in a row; one more checkpoint interval would be lost with each


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite; the message names the last one's batch."""


@dataclasses.dataclass
class Counters:
    """What has gone wrong in a run so far, the times that it was started again included.

    Attributes:
        skipped_steps: steps without an update, because a loss or the gradient was not finite.
        skipped_in_a_row: those since the last update.
        failed_saves: checkpoints that could not be saved.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    failed_saves: int = 0

    def metrics(self) -> dict[str, int]:
        """What belongs among a step's numbers."""
        return {"skipped_steps": self.skipped_steps, "failed_saves": self.failed_saves}


class FiniteGuard:
    """Watches the losses and the gradient of every step. The step itself makes no update where one is not finite.

    Args:
        counters: updated.
        allowed_in_a_row: more than so many skipped steps in a row stop the run.
        workdir: where the batches of those steps are then named, in nonfinite_steps.json.
    """

    def __init__(self, counters: Counters, allowed_in_a_row: int, workdir: Path):
        self._counters, self._allowed, self._workdir = counters, allowed_in_a_row, workdir
        self._row: list[dict[str, Any]] = []

    def check(
        self,
        step: int,
        losses: Mapping[str, float],
        gradient_norm: float,
        batches: Callable[[], dict[str, dict[str, Any]]],
    ) -> None:
        """Counts the step if its update was skipped.

        Args:
            step: its number.
            losses: of each task, the same in every process.
            gradient_norm: likewise.
            batches: gives what this process's batches were made of, as JSON values: {task: {"records": numbers,
                "files": names}}.

        Raises NonFiniteError where there were too many in a row.
        """
        wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if not wrong and math.isfinite(gradient_norm):
            self._counters.skipped_in_a_row = 0
            self._row.clear()
            return
        self._counters.skipped_steps += 1
        self._counters.skipped_in_a_row += 1
        what = f"the loss of {' and '.join(wrong)}" if wrong else "the gradient"
        made_of = batches()
        self._row.append(
            {
                "step": step,
                "not finite": what,
                "losses": {name: _json_number(loss) for name, loss in losses.items()},
                "gradient_norm": _json_number(gradient_norm),
                "batches": made_of,
            }
        )
        in_a_row = self._counters.skipped_in_a_row
        counts = f"{in_a_row} in a row, {self._counters.skipped_steps} in all"
        if in_a_row <= self._allowed:
            warn("step %d: %s is not finite; the update was not made (%s)", step, what, counts)
            return
        lines = [f"  {name}: {', '.join(made_of[name]['files'])}" for name in wrong or made_of]
        told = f"step {step}: {what} is not finite; the update was not made ({counts}). The batch came from\n"
        raise NonFiniteError(told + "\n".join([*lines, self._name_batches()]))

    def _name_batches(self) -> str:
        index = jax.process_index()
        path = self._workdir / ("nonfinite_steps.json" if index == 0 else f"nonfinite_steps.process_{index}.json")
        try:
            write_json(path, self._row)
        except OSError as error:
            return f"The batches of these steps could not be named in {path}: {error.strerror}"
        return f"{path} names the batches of these steps"


class Saver:
    """Saves checkpoints, and goes on without where the disk would not take them: up to three times in a row.

    Args:
        checkpoints: where they are saved.
        counters: updated.
        say: tells a line.
        last_saved: step of the newest whole checkpoint, 0 for none.
    """

    def __init__(self, checkpoints: Checkpoints, counters: Counters, say: Callable[[str], None], last_saved: int):
        self.counters = counters
        self._checkpoints, self._say = checkpoints, say
        self._last_saved, self._in_a_row = last_saved, 0

    def save(self, step: int, state: object, metadata: Mapping[str, object]) -> None:
        """Begins to save; what became of the save before is told first.

        Raises CheckpointError where the state cannot be saved at all, or this is the third failure in a row.
        """
        self.finish()
        try:
            self._checkpoints.save(step, state, {**metadata, "counters": dataclasses.asdict(self.counters)})
        except SaveFailedError as error:
            self._failed(error)

    def finish(self) -> int:
        """Waits for the save that was begun; the step of the newest checkpoint that is on the disk, 0 for none."""
        try:
            saved = self._checkpoints.wait()
        except SaveFailedError as error:
            self._failed(error)
            saved = None
        if saved is not None:
            self._last_saved, self._in_a_row = saved, 0
            self._say(f"saved step {saved}")
        return self._last_saved

    def _failed(self, error: SaveFailedError) -> None:
        self.counters.failed_saves += 1
        self._in_a_row += 1
        last = f"step {self._last_saved} is the last one saved" if self._last_saved else "none has been saved yet"
        if self._in_a_row >= _FAILED_SAVES:
            raise CheckpointError(f"{error}. {self._in_a_row} saves in a row have failed; {last}") from error
        warn("%s. The run goes on; %s", error, last)


@contextlib.contextmanager
def unless_disk_full(problem: str) -> Iterator[None]:
    """Goes on with a warning where what is written in the block finds no place on the disk."""
    try:
        yield
    except OSError as error:
        if not disk_refused(error):
            raise
        logging.warning("%s: %s", problem, error)


def disk_refused(error: OSError) -> bool:
    """Whether a disk would not take what was written, which is no fault of the program."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def _json_number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
