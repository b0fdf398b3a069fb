"""Results of an evaluation as files, one a sequence, so that a run that was stopped goes on where it was.

FOLDER/results/BENCHMARK/SEQUENCE.json      its numbers, and the key of what they were made of
FOLDER/plots/BENCHMARK/SEQUENCE.png         its picture
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from omnistream_jax.data.benchmarks.base import Benchmark, FrameSequence
from omnistream_jax.utils.files import write_json
from omnistream_jax.utils.versions import versions


def key_of(*parts: Any) -> str:
    """sha256 of JSON values: what numbers were made of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_row(path: Path, key: str) -> dict[str, Any] | None:
    """What `write_row` stored; None where there is nothing, or it was stored with another key."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # no JSON is not by us: made anew
        row = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(row, dict) and row.get("key") == key:
            return row
    return None


def write_row(path: Path, row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Stores a row of JSON values with its key, aside, then renamed; its folder is made. Returns what is stored."""
    stored = {**row, "key": key}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, stored)
    return stored


def made_by() -> dict[str, Any]:
    """What made numbers, for their files: {"versions": ..., "device": ...}."""
    return {"versions": versions(), "device": jax.devices()[0].device_kind}


@dataclasses.dataclass(frozen=True)
class ResultFiles:
    """The files of one folder.

    Attributes:
        folder: made where it is missing.
        settings: JSON values, all that the numbers depend on besides the data: the options and the model.
        plots: whether a sequence without its picture counts as unfinished.
    """

    folder: Path
    settings: Mapping[str, Any]
    plots: bool

    def read(self, benchmark: Benchmark, sequence: FrameSequence) -> dict[str, Any] | None:
        """What `write` stored of a sequence; None unless it has a score and was made of the same settings and data."""
        if self.plots and not self.plot_path(benchmark, sequence.name).exists():
            return None
        row = read_row(self._path(benchmark, sequence.name), self.key(benchmark, sequence))
        return row if row and row.get("problem") is None else None

    def write(self, benchmark: Benchmark, sequence: FrameSequence, row: Mapping[str, Any]) -> dict[str, Any]:
        """Stores the numbers of a sequence, JSON values with "problem": None or why it has no score.

        Returns:
            What is stored: the row and its "key".
        """
        return write_row(self._path(benchmark, sequence.name), row, self.key(benchmark, sequence))

    def plot_path(self, benchmark: Benchmark, sequence: str) -> Path:
        """Where the picture of a sequence belongs; its folder is made."""
        path = self.folder / "plots" / benchmark.name / f"{sequence}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def key(self, benchmark: Benchmark, sequence: FrameSequence) -> str:
        """sha256 of the settings, the benchmark's rules, names and sizes of the sequence's files, and its poses."""
        paths = (*sequence.frame_paths, *getattr(sequence, "depth_paths", ()))
        poses = hashlib.sha256(sequence.cam_to_world.tobytes()).hexdigest() if benchmark.task == "pose" else None
        rules = [benchmark.task, benchmark.max_depth, benchmark.clip_max, benchmark.mode]
        return key_of(dict(self.settings), rules, [[path.name, path.stat().st_size] for path in paths], poses)

    def _path(self, benchmark: Benchmark, sequence: str) -> Path:
        return self.folder / "results" / benchmark.name / f"{sequence}.json"
