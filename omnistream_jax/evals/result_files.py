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

from omnistream_jax.data.benchmarks.base import Benchmark, FrameSequence
from omnistream_jax.utils.files import write_json


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
        with contextlib.suppress(FileNotFoundError, ValueError):  # no JSON is not by us: made anew
            row = json.loads(self._path(benchmark, sequence.name).read_text(encoding="utf-8"))
            if isinstance(row, dict) and row.get("problem") is None and row.get("key") == self.key(benchmark, sequence):
                return row
        return None

    def write(self, benchmark: Benchmark, sequence: FrameSequence, row: Mapping[str, Any]) -> dict[str, Any]:
        """Stores the numbers of a sequence, JSON values with "problem": None or why it has no score.

        Returns:
            What is stored: the row and its "key".
        """
        stored = {**row, "key": self.key(benchmark, sequence)}
        path = self._path(benchmark, sequence.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, stored)
        return stored

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
        parts = [dict(self.settings), rules, [[path.name, path.stat().st_size] for path in paths], poses]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _path(self, benchmark: Benchmark, sequence: str) -> Path:
        return self.folder / "results" / benchmark.name / f"{sequence}.json"
