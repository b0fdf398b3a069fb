"""Online video depth on Sintel, Bonn and KITTI, as CUT3R's evaluator scores it (Wang et al. 2025)."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, DepthSequence
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.opencv import cv2
from omnistream_jax.evals.depth_metrics import (
    ALIGNMENTS,
    SequenceDepthMetrics,
    sequence_depth_metrics,
    weighted_mean,
)

# frames uint8 [T, h, w, 3] of one sequence, in order -> z-depth [T, any height, any width], in any unit
PredictDepth = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ShownFrame:
    """One frame of a sequence, for a picture.

    Attributes:
        index: its place in the sequence.
        picture: uint8 [h, w, 3], as the predictor saw it.
        target: float [H, W], true depth, NaN where it is not scored.
        aligned: float [H, W], the aligned prediction.
    """

    index: int
    picture: np.ndarray
    target: np.ndarray
    aligned: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class DepthResult:
    """The score of one sequence.

    Attributes:
        name: of the sequence.
        frames: how many it has.
        metrics: the numbers; None where there is a problem.
        problem: None, or why there are no numbers.
        shown: some of its frames, evenly spaced; none where there is a problem.
    """

    name: str
    frames: int
    metrics: SequenceDepthMetrics | None
    problem: str | None
    shown: tuple[ShownFrame, ...] = ()


def evaluate_video_depth(
    predict: PredictDepth,
    benchmark: Benchmark,
    *,
    align: str = "scale",
    long_side: int = 512,
    patch: int = 16,
    skip: Collection[str] = (),
    show: int = 0,
) -> Iterator[DepthResult]:
    """Scores the sequences of a depth benchmark one after the other; one is in memory at a time.

    Args:
        predict: called once a sequence, with all its frames sized as the protocol has it (data/benchmarks/preprocess).
        benchmark: of `open_benchmark`, with its rules: largest depth, clipping, sizing.
        align: "scale" (of the published tables), "scale&shift" or "metric"; see `sequence_depth_metrics`.
        long_side: pixels of the frames' longer side.
        patch: their sides are multiples of it.
        skip: names of sequences to pass over.
        show: how many frames of each sequence to keep for a picture.

    Yields:
        One result a sequence, in the benchmark's order. A prediction that is not finite and a truth that is corrupt
        are problems of their sequence.

    Raises:
        ValueError: no depth benchmark, an unknown alignment, or a prediction of another shape.
        DataError: a file of a sequence is damaged.
    """
    if benchmark.task != "depth":
        raise ValueError(f"benchmark: {benchmark.name} has no depth")
    if align not in ALIGNMENTS:
        raise ValueError(f"align: expected one of {', '.join(ALIGNMENTS)}, got {align!r}")
    for sequence in benchmark.sequences:
        if sequence.name not in skip:
            yield _score(predict, benchmark, sequence, align, (long_side, patch), show)


def aggregate_depth(sequences: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The data set's score: means over sequences weighted by their valid pixels.

    Args:
        sequences: name -> {"metrics": the fields of its SequenceDepthMetrics or None, "problem": text or None}.

    Raises:
        ValueError: sequences with a problem (all are named), or no valid pixel in any.
    """
    problems = [f"{name}: {row['problem']}" for name, row in sequences.items() if row["problem"] is not None]
    if problems:
        raise ValueError(f"{len(problems)} of {len(sequences)} sequences have no score: {'; '.join(problems)}")
    return dataclasses.asdict(weighted_mean(SequenceDepthMetrics(**row["metrics"]) for row in sequences.values()))


def _score(
    predict: PredictDepth,
    benchmark: Benchmark,
    sequence: DepthSequence,
    align: str,
    size: tuple[int, int],
    show: int,
) -> DepthResult:
    frames, target = sequence.frames(benchmark.mode, *size), _truth(sequence)
    prediction = np.asarray(predict(frames))
    if prediction.ndim != 3 or len(prediction) != len(frames):
        raise ValueError(f"{sequence.name}: expected depth [{len(frames)}, h, w], got shape {prediction.shape}")
    rules = {"max_depth": benchmark.max_depth, "clip_prediction": benchmark.clip_max}
    try:
        metrics = sequence_depth_metrics(prediction, target, align=align, **rules)
    except ValueError as error:  # numbers that are not finite: the shapes and the alignment are checked
        return DepthResult(sequence.name, len(frames), None, str(error))
    places = sorted({round(place) for place in np.linspace(0, len(frames) - 1, show)})
    shown = tuple(
        ShownFrame(
            place,
            frames[place],
            _scored(target[place], benchmark.max_depth),
            _aligned(prediction[place], target[place].shape, metrics, benchmark.clip_max),
        )
        for place in places
    )
    return DepthResult(sequence.name, len(frames), metrics, None, shown)


def _truth(sequence: DepthSequence) -> np.ndarray:
    """[T, H, W], all depth maps of a sequence."""
    maps = []
    for index, path in enumerate(sequence.depth_paths):
        depth = sequence.depth(index)
        if maps and depth.shape != maps[0].shape:
            height, width = maps[0].shape
            raise DataError(
                f"{path}: {depth.shape[1]} x {depth.shape[0]} pixels, the sequence began with {width} x {height}"
            )
        maps.append(depth)
    return np.stack(maps)


def _scored(target: np.ndarray, max_depth: float | None) -> np.ndarray:
    return np.where((target > 0) & (target < (np.inf if max_depth is None else max_depth)), target, np.nan)


def _aligned(
    prediction: np.ndarray, size: tuple[int, int], metrics: SequenceDepthMetrics, clip: float | None
) -> np.ndarray:
    """[h, w] -> [H, W], as `sequence_depth_metrics` aligns it; as it is where no pixel is valid."""
    resized = cv2.resize(np.ascontiguousarray(prediction, np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    scale, shift = (1.0, 0.0) if metrics.scale is None else (metrics.scale, metrics.shift)
    return np.minimum(scale * resized.astype(np.float64) + shift, np.inf if clip is None else clip)
