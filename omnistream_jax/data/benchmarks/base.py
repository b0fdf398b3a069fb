"""What the geometry benchmarks share: their sequences, their rules, and the count of what is there.

No reader decodes before it is asked to: opening lists files and reads poses. Orders, slices and exclusions are the
published evaluators' (CUT3R's eval/ and MonST3R's preparation scripts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omnistream_jax.data.benchmarks.preprocess import Mode, prepare_frames
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image

_NAMED = 12  # sequences that a message names at most


@dataclasses.dataclass(frozen=True, eq=False)
class FrameSequence:
    """The pictures of one sequence, in order.

    Attributes:
      name: as the data set calls it.
      frame_paths: N files.
    """

    name: str
    frame_paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.frame_paths)

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB of one frame as it is stored, upright. Raises DataError that names the file."""
        return read_image(self.frame_paths[index])

    def frames(self, mode: Mode, long_side: int = 512, patch: int = 16) -> np.ndarray:
        """All frames as the model sees them, uint8 [N, h, w, 3]; see `preprocess.prepare_frames`.

        Raises:
          DataError: a picture is damaged or has another size than the first; the message names it.
        """
        prepared, size = [], None
        for index, path in enumerate(self.frame_paths):
            image = self.frame(index)
            size = size or image.shape[:2]
            if image.shape[:2] != size:
                height, width = image.shape[:2]
                raise DataError(f"{path}: {width} x {height} pixels, the sequence began with {size[1]} x {size[0]}")
            prepared.append(prepare_frames(image, long_side, patch, mode))
        return np.stack(prepared)


@dataclasses.dataclass(frozen=True, eq=False)
class DepthSequence(FrameSequence):
    """A sequence with ground-truth depth.

    Attributes:
      depth_paths: N files, one a frame.
      read_depth: decodes one of them: float [H, W], metres; values that are not above 0 are not known.
    """

    depth_paths: tuple[Path, ...]
    read_depth: Callable[[Path], np.ndarray]

    def __post_init__(self):
        _require_one_a_frame(self, len(self.depth_paths), "depth maps")

    def depth(self, index: int) -> np.ndarray:
        """Float [H, W] in metres, z-depth, <= 0 where it is not known. Raises DataError that names the file."""
        return self.read_depth(self.depth_paths[index])


@dataclasses.dataclass(frozen=True, eq=False)
class PoseSequence(FrameSequence):
    """A sequence with ground-truth cameras.

    Attributes:
      cam_to_world: float64 [N, 4, 4], rigid, OpenCV's axes, in the data set's units.
      timestamps: float64 [N], those of the poses: seconds, or the number of the frame.
    """

    cam_to_world: np.ndarray
    timestamps: np.ndarray

    def __post_init__(self):
        _require_one_a_frame(self, len(self.cam_to_world), "poses")
        _require_one_a_frame(self, len(self.timestamps), "timestamps")


def _require_one_a_frame(sequence: FrameSequence, count: int, what: str) -> None:
    if count != len(sequence.frame_paths):
        where = sequence.frame_paths[0].parent if sequence.frame_paths else sequence.name
        raise DataError(f"{where}: {len(sequence.frame_paths)} frames but {count} {what}; expected one a frame")


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of a benchmark was found; a part of every result.

    Attributes:
      sequences: found, of `expected_sequences`.
      frames: found, of `expected_frames`.
      differences: each sequence whose frames are not as many as expected, for instance "alley_2: 0 of 50 frames".
      complete: there are none, so that the result may be compared with published ones.
    """

    sequences: int
    expected_sequences: int
    frames: int
    expected_frames: int
    differences: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every expected sequence has every expected frame, and no more."""
        return not self.differences

    def describe(self) -> str:
        """One line for a person."""
        frames = f"{self.frames:,} of {self.expected_frames:,} frames"
        found = f"{self.sequences} of {self.expected_sequences} sequences, {frames}"
        if self.complete:
            return found
        named = "; ".join(self.differences[:_NAMED])
        more = len(self.differences) - _NAMED
        return f"{found} ({named}{f'; and {more} more' if more > 0 else ''})"


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """A data set in the selection and with the rules of the published protocol.

    Attributes:
      name: of `registry.OPENERS`.
      task: "depth" (its sequences are DepthSequences) or "pose" (PoseSequences).
      root: where it was found.
      sequences: those that have frames, in the order of `expected`.
      expected: frames of each sequence that the published numbers are over.
      max_depth: ground truth is scored where it is > 0 and below this, in metres; None: no upper bound.
      clip_max: aligned predictions are clipped to this, in metres; None: they are not.
      mode: how frames are brought to whole patches: "resize" for depth, "crop" for poses.
    """

    name: str
    task: Literal["depth", "pose"]
    root: Path
    sequences: tuple[DepthSequence, ...] | tuple[PoseSequence, ...]
    expected: Mapping[str, int]
    max_depth: float | None
    clip_max: float | None
    mode: Mode

    def __len__(self) -> int:
        return len(self.sequences)

    def counts(self) -> Counts:
        """What was found of what the published numbers are over."""
        found = {sequence.name: len(sequence) for sequence in self.sequences}
        differences = [
            f"{name}: {found.get(name, 0)} of {frames} frames"
            for name, frames in self.expected.items()
            if found.get(name, 0) != frames
        ]
        total, expected_total = sum(found.values()), sum(self.expected.values())
        return Counts(len(found), len(self.expected), total, expected_total, tuple(differences))

    def settings(self) -> dict[str, Any]:
        """What a result must say of its data, as JSON stores it."""
        counts = self.counts()
        return {
            "benchmark": self.name,
            "task": self.task,
            "root": str(self.root),
            "sequences": [sequence.name for sequence in self.sequences],
            "max_depth": self.max_depth,
            "clip_max": self.clip_max,
            "frames_by": self.mode,
            "counts": {**dataclasses.asdict(counts), "complete": counts.complete},
        }


def depth_benchmark(
    name: str,
    root: Path,
    sequences: list[DepthSequence],
    expected: Mapping[str, int],
    *,
    max_depth: float | None,
    clip_max: float | None = None,
) -> Benchmark:
    """A Benchmark of depth; sequences without frames are left out, so that `counts` misses them."""
    kept = tuple(sequence for sequence in sequences if len(sequence))
    return Benchmark(name, "depth", root, kept, expected, max_depth, clip_max, "resize")


def pose_benchmark(name: str, root: Path, sequences: list[PoseSequence], expected: Mapping[str, int]) -> Benchmark:
    """A Benchmark of camera poses; sequences without frames are left out, so that `counts` misses them."""
    kept = tuple(sequence for sequence in sequences if len(sequence))
    return Benchmark(name, "pose", root, kept, expected, None, None, "crop")


def check_counts(benchmark: Benchmark, allow_incomplete: bool = False) -> Counts:
    """The counts of a benchmark, which must be complete unless `allow_incomplete`; `settings` then says that it is not.

    Raises:
      DataError: a sequence is missing or has fewer or more frames than the published numbers are over, or there is
        nothing at all; the message says which and how many.
    """
    counts = benchmark.counts()
    if not counts.sequences:
        raise DataError(f"{benchmark.root}: {benchmark.name} has no frames here: {counts.describe()}")
    if not (counts.complete or allow_incomplete):
        raise DataError(
            f"{benchmark.root}: {benchmark.name} is not as published: {counts.describe()}. "
            "With allow_incomplete=True what is there is evaluated, and the result says so",
            reason="benchmark is not complete",
        )
    return counts
