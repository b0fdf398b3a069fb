"""Video depth as CUT3R's evaluator scores it (Wang et al. 2025): one alignment per sequence, then AbsRel and deltas.

NumPy float64 throughout; the evaluator itself computes in float32 and agrees to about five digits.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from omnistream_jax.data.opencv import cv2
from omnistream_jax.geometry.alignment import fit_scale

ALIGNMENTS = ("scale", "scale&shift", "metric")
SMALLEST_DEPTH = 1e-5
DELTA = 1.25


@dataclasses.dataclass(frozen=True)
class DepthMetrics:
    """The numbers of one sequence, or their mean over a data set.

    Attributes:
        abs_rel: mean of |p - g| / g.
        sq_rel: mean of (p - g)^2 / g, in the target's units.
        rmse: root of the mean of (p - g)^2, in the target's units.
        log_rmse: root of the mean of (log p - log g)^2.
        delta_1: share, 0 to 1, of pixels with max(p / g, g / p) < 1.25; tables print it x 100.
        delta_2: the same for 1.25^2.
        delta_3: the same for 1.25^3.
        valid_pixels: how many pixels they rest on; 0 makes every number 0.
    """

    abs_rel: float
    sq_rel: float
    rmse: float
    log_rmse: float
    delta_1: float
    delta_2: float
    delta_3: float
    valid_pixels: int


@dataclasses.dataclass(frozen=True)
class SequenceDepthMetrics(DepthMetrics):
    """One sequence, with its alignment: scale * prediction + shift. Both are None where no pixel is valid."""

    scale: float | None
    shift: float | None


def sequence_depth_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    *,
    align: str,
    max_depth: float | None,
    clip_prediction: float | None,
) -> SequenceDepthMetrics:
    """Scores the depth maps of one sequence.

    As the protocol has it: the prediction is resized with cv2's bicubic kernel, whose overshoots (even <= 0) stay;
    all valid pixels of the sequence share one alignment; the prediction is clipped from above where asked; AbsRel,
    SqRel and RMSE come before the prediction is raised to at least 1e-5, log RMSE and the deltas after it.
    Sintel has max_depth 70 and clip_prediction 70, Bonn max_depth 70 and no clip, KITTI neither.

    Args:
        prediction: [T, h, w], z-depth in any float dtype; read as float32, as the protocol stores it.
        target: [T, H, W], true z-depth; pixels <= 0 or NaN are not valid.
        align: "scale" (`geometry.alignment.fit_scale`), "scale&shift" (`fit_scale_and_shift_by_adam`; minutes for
            a long sequence) or "metric" (none).
        max_depth: only pixels with a target below it are valid; None has no limit.
        clip_prediction: largest depth of the aligned prediction; None clips nothing.

    Returns:
        The metrics; all 0, with valid_pixels 0, if no pixel is valid.

    Raises:
        ValueError: shapes that do not fit, an unknown alignment, a prediction that is not finite or that admits no
            scale, or a target so corrupt (0 < g < 1e-38, infinite) that a metric is not finite.
    """
    prediction, target = np.asarray(prediction), np.asarray(target)
    if align not in ALIGNMENTS:
        raise ValueError(f"align: expected one of {', '.join(ALIGNMENTS)}, got {align!r}")
    if prediction.ndim != 3 or target.ndim != 3 or len(prediction) != len(target) or 0 in prediction.shape:
        raise ValueError(
            "expected prediction [T, h, w] and target [T, H, W] of equally many frames, "
            f"got {prediction.shape} and {target.shape}"
        )
    predicted, true = _valid_pixels(prediction, target, max_depth)
    if true.size == 0:
        return SequenceDepthMetrics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, None, None)
    if not np.isfinite(predicted).all():
        raise ValueError("prediction: expected finite depth at the valid pixels, got NaN or infinity")
    scale, shift = _fit(predicted, true, align)
    if not np.isfinite([scale, shift]).all():
        raise ValueError(f"prediction: no {align} alignment exists, the scale is {scale} and the shift {shift}")
    aligned = scale * predicted + shift
    if clip_prediction is not None:
        aligned = np.minimum(aligned, clip_prediction)
    metrics = _metrics(aligned, true)
    if not np.isfinite(dataclasses.astuple(metrics)).all():
        raise ValueError(f"target: corrupt depth, the metrics are not finite: {metrics}")
    return SequenceDepthMetrics(**dataclasses.asdict(metrics), scale=scale, shift=shift)


def weighted_mean(sequences: Iterable[DepthMetrics]) -> DepthMetrics:
    """The data set's score: the mean over sequences, each weighted by its number of valid pixels.

    Args:
        sequences: the metrics of every sequence.

    Returns:
        The mean of each metric (the RMSEs too: means of roots), and the sum of the valid pixels.

    Raises:
        ValueError: no sequence, or none with a valid pixel.
    """
    names = [field.name for field in dataclasses.fields(DepthMetrics)]
    table = np.array([[getattr(sequence, name) for name in names] for sequence in sequences], np.float64)
    if table.size == 0 or table[:, -1].sum() == 0:
        raise ValueError(f"sequences: expected at least one with valid pixels, got {len(table)} without any")
    *means, _ = (float(mean) for mean in np.average(table, axis=0, weights=table[:, -1]))
    return DepthMetrics(*means, valid_pixels=int(table[:, -1].sum()))


def fit_scale_and_shift_by_adam(
    prediction: np.ndarray,
    target: np.ndarray,
    *,
    learning_rate: float = 1e-4,
    steps: int = 1000,
    tolerance: float = 1e-6,
) -> tuple[float, float]:
    """The protocol's "scale&shift": Adam on the sum of |s p + t - g|.

    Starts at s = median(g) / median(p), t = 0 and stops after `steps` or once the loss changes by less than
    `tolerance`; at this learning rate neither number moves by more than some 0.1, so the start matters. The median
    of an even number of values is the lower of the two in the middle, as in PyTorch.

    Args:
        prediction: [N], depth at the valid pixels, N >= 1.
        target: [N], true depth there.
        learning_rate: Adam's.
        steps: at most so many updates.
        tolerance: smallest change of the loss from step to step.

    Returns:
        (s, t); not finite if the median prediction is 0.
    """
    prediction, target = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        parameters = np.array([_lower_median(target) / _lower_median(prediction), 0.0])
    if not np.isfinite(parameters).all():
        return float(parameters[0]), 0.0
    mean, square, previous_loss = np.zeros(2), np.zeros(2), None
    for step in range(1, steps + 1):
        residual = parameters[0] * prediction + parameters[1] - target
        sign = np.sign(residual)
        gradient = np.array([sign @ prediction, sign.sum()])
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        spread = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        parameters = parameters - learning_rate * mean / (1 - 0.9**step) / spread
        loss = np.abs(residual, out=residual).sum()
        # The loss is the one before this update, and the update is kept.
        if previous_loss is not None and abs(previous_loss - loss) < tolerance:
            break
        previous_loss = loss
    return float(parameters[0]), float(parameters[1])


def _valid_pixels(prediction: np.ndarray, target: np.ndarray, max_depth: float | None) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] and [N]: the resized prediction and the target at the valid pixels of all frames."""
    size = target.shape[2], target.shape[1]
    predicted, true = [], []
    for predicted_frame, true_frame in zip(prediction, target, strict=True):
        mask = true_frame > 0
        if max_depth is not None:
            mask &= true_frame < max_depth
        if mask.any():  # cv2 refuses empty targets
            frame = np.ascontiguousarray(predicted_frame, np.float32)
            predicted.append(cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)[mask])
            true.append(true_frame[mask])
    if not true:
        return np.zeros(0), np.zeros(0)
    return np.concatenate(predicted).astype(np.float64), np.concatenate(true).astype(np.float64)


def _fit(prediction: np.ndarray, target: np.ndarray, align: str) -> tuple[float, float]:
    if align == "scale":
        return float(fit_scale(prediction, target, np.ones(target.shape, bool))), 0.0
    if align == "scale&shift":
        return fit_scale_and_shift_by_adam(prediction, target)
    return 1.0, 0.0


def _metrics(prediction: np.ndarray, target: np.ndarray) -> DepthMetrics:
    """The numbers of aligned depth [N] against the target [N] > 0."""
    with np.errstate(all="ignore"):  # the caller names what is not finite
        difference = prediction - target
        abs_rel = np.mean(np.abs(difference) / target)
        sq_rel = np.mean(difference**2 / target)
        rmse = np.sqrt(np.mean(difference**2))
        prediction = np.maximum(prediction, SMALLEST_DEPTH)
        log_rmse = np.sqrt(np.mean((np.log(prediction) - np.log(target)) ** 2))
        ratio = np.maximum(prediction / target, target / prediction)
        deltas = [np.mean(ratio < DELTA**power) for power in (1, 2, 3)]
    return DepthMetrics(*(float(number) for number in (abs_rel, sq_rel, rmse, log_rmse, *deltas)), target.size)


def _lower_median(values: np.ndarray) -> float:
    middle = (values.size - 1) // 2
    return np.partition(values, middle)[middle]
