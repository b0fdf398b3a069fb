"""Online camera poses on Sintel, TUM-dynamics and ScanNet, as CUT3R's evaluator scores them (Wang et al. 2025)."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, PoseSequence
from omnistream_jax.evals.pose_metrics import TrajectoryMetrics, mean_over_sequences, trajectory_metrics
from omnistream_jax.geometry.alignment import apply_similarity, umeyama

# frames uint8 [T, h, w, 3] of one sequence, in order -> camera-to-world [T, 4, 4], in any unit and world frame
PredictPoses = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class PoseResult:
    """The score of one sequence.

    Attributes:
        name: of the sequence.
        frames: how many it has.
        metrics: the numbers; None where there is a problem.
        problem: None, or why there are no numbers.
        timestamps: [N], of the truth.
        reference: [N, 4, 4], the truth, camera to world.
        aligned: [N, 3], the estimated camera centres after the alignment; None where there is a problem.
    """

    name: str
    frames: int
    metrics: TrajectoryMetrics | None
    problem: str | None
    timestamps: np.ndarray
    reference: np.ndarray
    aligned: np.ndarray | None = None


def evaluate_camera_pose(
    predict: PredictPoses,
    benchmark: Benchmark,
    *,
    long_side: int = 512,
    patch: int = 16,
    skip: Collection[str] = (),
) -> Iterator[PoseResult]:
    """Scores the sequences of a pose benchmark one after the other; one is in memory at a time.

    Args:
        predict: called once a sequence, with all its frames sized as the protocol has it (data/benchmarks/preprocess).
        benchmark: of `open_benchmark`.
        long_side: pixels of the frames' longer side before the crop.
        patch: their sides are multiples of it.
        skip: names of sequences to pass over.

    Yields:
        One result a sequence, in the benchmark's order. An estimate that cannot be aligned is a problem of its
        sequence: the published evaluator passes over such sequences in silence.

    Raises:
        ValueError: no pose benchmark, or poses of another shape.
        DataError: a file of a sequence is damaged.
    """
    if benchmark.task != "pose":
        raise ValueError(f"benchmark: {benchmark.name} has no poses")
    for sequence in benchmark.sequences:
        if sequence.name not in skip:
            yield _score(predict, benchmark, sequence, (long_side, patch))


def aggregate_poses(sequences: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The data set's score: plain means over sequences.

    Args:
        sequences: name -> {"metrics": the fields of its TrajectoryMetrics or None, "problem": text or None}.

    Raises:
        ValueError: sequences with a problem (all are named), or no sequence.
    """
    problems = [f"{name}: {row['problem']}" for name, row in sequences.items() if row["problem"] is not None]
    if problems:
        raise ValueError(f"{len(problems)} of {len(sequences)} sequences have no score: {'; '.join(problems)}")
    metrics = {name: TrajectoryMetrics(**row["metrics"]) for name, row in sequences.items()}
    return dataclasses.asdict(mean_over_sequences(metrics))


def _score(predict: PredictPoses, benchmark: Benchmark, sequence: PoseSequence, size: tuple[int, int]) -> PoseResult:
    frames, reference = sequence.frames(benchmark.mode, *size), sequence.cam_to_world
    estimate = np.asarray(predict(frames), np.float64)
    if estimate.shape != reference.shape:
        raise ValueError(f"{sequence.name}: expected poses [{len(frames)}, 4, 4], got shape {estimate.shape}")
    try:
        metrics = trajectory_metrics(estimate, reference)
        problem = metrics.degenerate
    except ValueError as error:  # a pose that is no rigid motion: the shapes are checked
        problem = str(error)
    truth = sequence.timestamps, reference
    if problem is not None:
        return PoseResult(sequence.name, len(frames), None, problem, *truth)
    centres = estimate[:, :3, 3]
    aligned = apply_similarity(umeyama(centres, reference[:, :3, 3]), centres)
    return PoseResult(sequence.name, len(frames), metrics, None, *truth, aligned)
