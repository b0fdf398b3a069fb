"""Where the numbers of a run go: a line on the terminal, metrics.jsonl, TensorBoard."""

import errno
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from omnistream_jax.utils.board import Board
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.speed import Speed

_RATE_WRITES = 10  # the rate of steps is that of the latest writes, so that compilation is soon forgotten


class MetricsWriter:
    """Writes the numbers of a run to `workdir/metrics.jsonl`, `workdir/tensorboard` and the terminal.

    Args:
        workdir: an existing directory.
        total_steps: of the run, for the progress and the time left.
        restored_step: of the checkpoint from which the run goes on, 0 for a new one: what was written of later steps,
            which will be done again, is removed; for a new run all that is there.
        terminal_names: the values that the terminal shows, in this order; None shows all.
        terminal: a text stream, standard output by default.

    For one process of a run, and one thread.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        total_steps: int,
        *,
        restored_step: int = 0,
        terminal_names: Sequence[str] | None = None,
        terminal: TextIO | None = None,
    ):
        self._total_steps, self._terminal_names = total_steps, terminal_names
        self._terminal = terminal or sys.stdout
        self._times: deque[tuple[int, float]] = deque([(restored_step, time.monotonic())], maxlen=_RATE_WRITES)
        self._path = Path(workdir) / "metrics.jsonl"
        _keep_rows(self._path, lambda row: restored_step > 0 and row["step"] <= restored_step)
        self._lines = self._path.open("ab", buffering=0)
        self._board = Board(Path(workdir) / "tensorboard", purge_step=restored_step + 1 if restored_step else 0)

    def write(self, step: int, values: Mapping[str, float], speed: Speed | None = None) -> None:
        """One step's values, by name, and how fast the steps since the last line were.

        A value that is not finite stands as null in metrics.jsonl.
        """
        measured = {} if speed is None else speed.values()
        values = {name: float(value) for name, value in sorted({**values, **measured}.items())}
        self._write_line({"step": step} | {name: _json_number(value) for name, value in values.items()})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._terminal.write(self._progress(step, values, speed) + "\n")
        self._terminal.flush()

    def write_again(self, step: int, values: Mapping[str, float]) -> None:
        """As `write`, in place of what has the same step and names: the scores of a finished run that is run again."""
        names = {"step", *values}
        _keep_rows(self._path, lambda row: row["step"] != step or row.keys() != names)
        self._lines.close()
        self._lines = self._path.open("ab", buffering=0)
        self.write(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture for TensorBoard: uint8 [height, width, 3]. Raises ValueError for any other array."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"image {name!r} must be uint8 [height, width, 3], got {image.dtype} {image.shape}")
        self._board.add_image(name, image, step)

    def close(self) -> None:
        """Hands everything to the files; nothing can be written afterwards."""
        self._lines.close()
        self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write_line(self, values: Mapping[str, object]) -> None:
        """One system call for a line: a killed process leaves whole lines. On a full disk, none of it stays."""
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        size = os.fstat(self._lines.fileno()).st_size
        written = self._lines.write(line)
        if written != len(line):
            os.ftruncate(self._lines.fileno(), size)
            problem = f"{written} of {len(line)} bytes could be written: is the disk full?"
            raise OSError(errno.ENOSPC, problem, self._lines.name)

    def _progress(self, step: int, values: Mapping[str, float], speed: Speed | None) -> str:
        """ "step 40/200 20% | 1.52 steps/s | left 1:45 | 61 images/s | data 3%, device 97% | loss 3.214"."""
        first_step, first_time = self._times[0]
        self._times.append((step, time.monotonic()))
        rate = (step - first_step) / max(self._times[-1][1] - first_time, 1e-9)
        percent = 100 * step // max(self._total_steps, 1)
        parts = [f"step {step}/{self._total_steps} {percent}%"]
        if rate > 0:
            left = _duration((self._total_steps - step) / rate)
            parts += [f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s/step", f"left {left}"]
        if speed is not None:
            parts.append(str(speed))
        names = values if self._terminal_names is None else self._terminal_names
        return " | ".join(parts + [f"{name} {values[name]:.4g}" for name in names if name in values])


def read_metrics(path: str | os.PathLike) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl, oldest first: {"step": ..., name: value, ...}.

    A last line without its end, from a file that was cut, is left out. Raises ValueError, naming the line, where
    another one is not a JSON object with a step.
    """
    *lines, _unfinished = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"])} | row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step") from error
    return rows


def _keep_rows(path: Path, keep: Callable[[Mapping[str, float | None]], bool]) -> None:
    """Takes the other rows, and a last line that was cut, out of a metrics.jsonl; whole, or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if keep(row)]
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
