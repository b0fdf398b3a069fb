"""How well masks of objects follow the truth: region similarity J and boundary accuracy F, as DAVIS-2017 scores them.

Perazzi et al. 2016 define both; numbers equal davis2017-evaluation (semi-supervised). K: objects, T: frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from omnistream_jax.data.benchmarks.masked import VOID
from omnistream_jax.data.opencv import cv2

VOID_RULES = ("background", "excluded")
COUNTING_RULES = ("davis2017", "vos-benchmark")
_TOLERANCE = 0.008  # of the frame's diagonal


@dataclasses.dataclass(frozen=True)
class ObjectScores:
    """Of the objects of one sequence over its scored frames, the second to the last but one.

    Attributes:
      region: float64 [K, T - 2], J; NaN in frames that do not count.
      boundary: float64 [K, T - 2], F, likewise.
      numbers: int [K], which objects these are in the masks.
    """

    region: np.ndarray
    boundary: np.ndarray
    numbers: np.ndarray


@dataclasses.dataclass(frozen=True)
class MeanScores:
    """Means over all objects of all sequences, of each object's mean over its frames; 0 to 1.

    Attributes:
      region: J.
      boundary: F.
      both: J&F, the mean of the two.
      objects: how many there are.
    """

    region: float
    boundary: float
    both: float
    objects: int


def score_sequence(
    prediction: np.ndarray, truth: np.ndarray, void: str = "background", counting: str = "davis2017"
) -> ObjectScores:
    """J and F of every object and scored frame.

    An object that a mask lacks has an empty mask there.

    Args:
      prediction: uint8 [T, H, W], T >= 3; its first and last masks are not looked at.
      truth: the same; VOID where nobody knows.
      void: "background": void pixels are background, as davis2017-evaluation has them in its semi-supervised task;
        "excluded": they count for nothing, as in its unsupervised one.
      counting: "davis2017": the objects are 1 to the largest number in the first true mask, and each counts in every
        scored frame; what is larger in later masks is background, and in predictions an error. "vos-benchmark": the
        objects are those of the scored true masks, and each counts from the first frame in which the truth or the
        prediction shows it; others in predictions are background.

    Raises:
      ValueError: shapes that do not fit, fewer than 3 frames, masks without objects to score, or a prediction of an
        object that does not exist.
    """
    if void not in VOID_RULES:
        raise ValueError(f"void: expected one of {', '.join(VOID_RULES)}, got {void!r}")
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"masks: expected two of the same [T, H, W], got {prediction.shape} and {truth.shape}")
    if len(truth) < 3:
        raise ValueError(f"masks: {len(truth)} frames, but the first and the last are not scored: expected 3 or more")
    if counting not in COUNTING_RULES:
        raise ValueError(f"counting: expected one of {', '.join(COUNTING_RULES)}, got {counting!r}")
    numbers = _objects(prediction, truth, counting)
    prediction, truth = prediction[1:-1], truth[1:-1]
    region, boundary = np.full((2, len(numbers), len(truth)), np.nan)
    for row, number in enumerate(numbers):
        counts = counting == "davis2017"
        for frame, (predicted, true) in enumerate(zip(prediction == number, truth == number, strict=True)):
            counts = counts or predicted.any() or true.any()
            if counts:
                pair = (predicted, true, truth[frame] == VOID if void == "excluded" else None)
                region[row, frame], boundary[row, frame] = region_similarity(*pair), boundary_accuracy(*pair)
    return ObjectScores(region, boundary, numbers)


def _objects(prediction: np.ndarray, truth: np.ndarray, counting: str) -> np.ndarray:
    if counting == "vos-benchmark":
        numbers = np.unique(truth[1:-1])
        numbers = numbers[(numbers != 0) & (numbers != VOID)]
        if not numbers.size:
            raise ValueError("masks: no true mask between the first and the last shows an object")
        return numbers
    objects = int(truth[0][truth[0] != VOID].max(initial=0))
    if not objects:
        raise ValueError("masks: the first true mask shows no object")
    if prediction[1:-1].max() > objects:
        frame = int(np.argmax(prediction[1:-1].max((1, 2)) > objects)) + 1
        raise ValueError(
            f"masks: the prediction of frame {frame} has object {prediction[1:-1].max()}, there are {objects}"
        )
    return np.arange(1, objects + 1)


def mean_scores(sequences: Sequence[ObjectScores]) -> MeanScores:
    """Of one or more sequences; every object weighs the same, however long its sequence is. ValueError for none."""
    if not sequences:
        raise ValueError("sequences: expected one or more")
    region = float(np.mean([np.nanmean(row) for scores in sequences for row in scores.region]))
    boundary = float(np.mean([np.nanmean(row) for scores in sequences for row in scores.boundary]))
    return MeanScores(region, boundary, (region + boundary) / 2, sum(len(scores.region) for scores in sequences))


def region_similarity(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """J: intersection over union of two masks bool [H, W] outside of `void`; 1 where both are empty."""
    known = True if void is None else ~void
    union = np.count_nonzero((prediction | truth) & known)
    return float(np.count_nonzero(prediction & truth & known) / union) if union else 1.0


def boundary_accuracy(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """F: the harmonic mean of precision and recall of the boundary's pixels.

    Precision is the share of the prediction's boundary pixels with one of the truth in reach, recall the other way
    round. In reach is a disk of radius ceil(0.008 * diagonal) pixels. Where one mask has no boundary F is 0, where both
    have none it is 1.

    Args:
      prediction, truth: masks, bool [H, W].
      void: bool [H, W], pixels that belong to neither.
    """
    if void is not None:
        prediction, truth = prediction & ~void, truth & ~void
    predicted, true = _boundary(prediction), _boundary(truth)
    predicted_count, true_count = np.count_nonzero(predicted), np.count_nonzero(true)
    if not (predicted_count and true_count):
        return float(predicted_count == true_count)
    disk = _disk(int(np.ceil(_TOLERANCE * np.linalg.norm(truth.shape))))
    precision = np.count_nonzero(predicted & _dilated(true, disk)) / predicted_count
    recall = np.count_nonzero(true & _dilated(predicted, disk)) / true_count
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or both; nothing differs from what lies outside."""
    around = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ around[:-1, 1:]) | (mask ^ around[1:, :-1]) | (mask ^ around[1:, 1:])


def _disk(radius: int) -> np.ndarray:
    offset = np.arange(-radius, radius + 1)
    return (offset[:, None] ** 2 + offset**2 <= radius**2).astype(np.uint8)


def _dilated(mask: np.ndarray, disk: np.ndarray) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), disk).view(bool)
