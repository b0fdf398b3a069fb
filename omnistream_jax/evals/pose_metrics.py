"""Camera trajectories scored as the package evo does (Grupp), with the settings of CUT3R's evaluator."""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
from scipy.spatial.transform import Rotation

from omnistream_jax.geometry.alignment import apply_similarity, point_moments, umeyama

FEWEST_POSES = 3
ROUNDING_STEPS = 16
ROTATION_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class TrajectoryMetrics:
    """The errors of one trajectory after alignment; all None if it is degenerate.

    Attributes:
        ate: absolute trajectory error, root mean square over camera centres, in the reference's units.
        rpe_translation: relative pose error from frame to frame, root mean square of its translation, same units.
        rpe_rotation: root mean square of its rotation angle, degrees.
        scale: by which the estimate was multiplied.
        poses: the number of poses.
        degenerate: None, or why no alignment exists.
    """

    ate: float | None
    rpe_translation: float | None
    rpe_rotation: float | None
    scale: float | None
    poses: int
    degenerate: str | None = None


@dataclasses.dataclass(frozen=True)
class TrajectoryMean:
    """Plain means over sequences.

    Attributes:
        ate: as in `TrajectoryMetrics`.
        rpe_translation: as there.
        rpe_rotation: as there, degrees.
        sequences: how many were averaged.
        excluded: names of those that were left out.
    """

    ate: float
    rpe_translation: float
    rpe_rotation: float
    sequences: int
    excluded: tuple[str, ...]


class DegenerateTrajectoryError(ValueError):
    """A mean was asked for over sequences of which some have no numbers."""


def trajectory_metrics(estimate: np.ndarray, reference: np.ndarray) -> TrajectoryMetrics:
    """ATE and RPE of an estimated trajectory after Sim(3) alignment of its camera centres, all poses used.

    Equals evo's APE (translation part) and RPE (delta of 1 frame, all pairs; translation part and rotation angle),
    both with align and correct_scale. Degenerate, so without numbers, are: fewer than 3 poses, poses that are not
    finite, and centres at one point or on one line, where evo raises "Degenerate covariance rank" (on a slanted
    line it does so only by luck).

    Args:
        estimate: [N, 4, 4], camera to world, in any unit and world frame.
        reference: [N, 4, 4], camera to world, the truth at the same times.

    Returns:
        The metrics. Rotations are made orthonormal first: evo is handed unit quaternions.

    Raises:
        ValueError: shapes that do not fit, or a finite pose that is no rigid motion (rotation off by over 1e-3).
    """
    estimate, reference = np.asarray(estimate, np.float64), np.asarray(reference, np.float64)
    if estimate.ndim != 3 or estimate.shape[1:] != (4, 4) or estimate.shape != reference.shape:
        raise ValueError(
            f"estimate and reference: expected equal shapes [N, 4, 4], got {estimate.shape} and {reference.shape}"
        )
    problem = _degenerate(estimate, reference)
    if problem is not None:
        return TrajectoryMetrics(None, None, None, None, len(estimate), problem)
    estimate, reference = _rigid(estimate, "estimate"), _rigid(reference, "reference")
    similarity = umeyama(estimate[:, :3, 3], reference[:, :3, 3])
    aligned = estimate.copy()
    aligned[:, :3, :3] = similarity.rotation @ estimate[:, :3, :3]
    aligned[:, :3, 3] = apply_similarity(similarity, estimate[:, :3, 3])
    error = _relative(_steps(reference), _steps(aligned))
    return TrajectoryMetrics(
        ate=_root_mean_square(np.linalg.norm(aligned[:, :3, 3] - reference[:, :3, 3], axis=-1)),
        rpe_translation=_root_mean_square(np.linalg.norm(error[:, :3, 3], axis=-1)),
        rpe_rotation=_root_mean_square(np.rad2deg(Rotation.from_matrix(error[:, :3, :3]).magnitude())),
        scale=float(similarity.scale),
        poses=len(estimate),
    )


def mean_over_sequences(sequences: Mapping[str, TrajectoryMetrics], *, exclude: Collection[str] = ()) -> TrajectoryMean:
    """The data set's score: the plain mean over its sequences.

    Args:
        sequences: name -> metrics.
        exclude: names to leave out, degenerate or not (a benchmark's own list of excluded scenes).

    Raises:
        DegenerateTrajectoryError: sequences that are degenerate and not excluded; each is named, with the reason.
        ValueError: a name in `exclude` that is not in `sequences`, or nothing left to average.
    """
    unknown = sorted(set(exclude) - set(sequences))
    if unknown:
        raise ValueError(f"exclude: expected names of sequences, got {', '.join(unknown)}")
    kept = {name: metrics for name, metrics in sequences.items() if name not in exclude}
    if not kept:
        raise ValueError(f"sequences: none left to average, {len(sequences)} given and {len(exclude)} excluded")
    problems = [f"{name}: {metrics.degenerate}" for name, metrics in kept.items() if metrics.degenerate is not None]
    if problems:
        raise DegenerateTrajectoryError(
            f"{len(problems)} of {len(kept)} sequences are degenerate, exclude them by name: {'; '.join(problems)}"
        )
    means = [
        float(np.mean([getattr(metrics, name) for metrics in kept.values()]))
        for name in ("ate", "rpe_translation", "rpe_rotation")
    ]
    return TrajectoryMean(*means, sequences=len(kept), excluded=tuple(n for n in sequences if n in exclude))


def _degenerate(estimate: np.ndarray, reference: np.ndarray) -> str | None:
    """Why no alignment exists, or None."""
    if len(estimate) < FEWEST_POSES:
        return f"too few poses: {len(estimate)}, alignment needs {FEWEST_POSES}"
    for name, poses in (("estimate", estimate), ("reference", reference)):
        bad = np.flatnonzero(~np.isfinite(poses).all(axis=(1, 2)))
        if bad.size:
            return f"{name}: {bad.size} of {len(poses)} poses are not finite, the first is {bad[0]}"
    rank = _rank(estimate[:, :3, 3], reference[:, :3, 3])
    if rank < 2:
        return f"degenerate covariance rank: {rank}, {_layout(estimate, reference)}"
    return None


def _rank(estimate: np.ndarray, reference: np.ndarray) -> int:
    """The rank of the covariance between camera centres [N, 3]; alignment needs 2.

    evo compares with a fixed bound, so that rounding errors decide about a slanted line of some metres. Here
    whatever the rounding of the coordinates can explain counts as zero too, which makes the verdict stable.
    """
    moments = point_moments(estimate, reference)
    estimate_spread, reference_spread = np.sqrt(moments.source_variance), np.sqrt(reference.var(axis=0).sum())
    rounding = np.abs(estimate).max() * reference_spread + np.abs(reference).max() * estimate_spread
    bound = np.finfo(np.float64).eps * max(1.0, ROUNDING_STEPS * rounding)
    return int(np.count_nonzero(np.linalg.svd(moments.covariance, compute_uv=False) > bound))


def _layout(estimate: np.ndarray, reference: np.ndarray) -> str:
    """Says which trajectory's centres lie at a point or on a line."""
    for name, poses in (("estimate", estimate), ("reference", reference)):
        centres = poses[:, :3, 3]
        noise = 1e-12 * np.abs(centres).max() * np.sqrt(len(centres))
        spread = np.linalg.svd(centres - centres.mean(axis=0), compute_uv=False)
        dimensions = np.count_nonzero(spread > noise)
        if dimensions < 2:
            return f"the camera centres of the {name} are all {('at one point', 'on one line')[dimensions]}"
    return "the camera centres vary too little, or not together in two directions"


def _rigid(poses: np.ndarray, name: str) -> np.ndarray:
    """The poses with orthonormal rotations."""
    rotation = poses[:, :3, :3]
    error = np.abs(rotation.swapaxes(1, 2) @ rotation - np.eye(3)).max(axis=(1, 2))
    bottom = np.abs(poses[:, 3] - [0, 0, 0, 1]).max(axis=-1)
    bad = np.flatnonzero((error > ROTATION_TOLERANCE) | (np.linalg.det(rotation) < 0) | (bottom > ROTATION_TOLERANCE))
    if bad.size:
        raise ValueError(f"{name}: pose {bad[0]} is no rigid motion [R t; 0 0 0 1], got {poses[bad[0]].tolist()}")
    rigid = poses.copy()
    rigid[:, :3, :3] = Rotation.from_matrix(rotation).as_matrix()
    return rigid


def _steps(poses: np.ndarray) -> np.ndarray:
    """[N, 4, 4] -> [N - 1, 4, 4], each pose seen from the one before it."""
    return _relative(poses[:-1], poses[1:])


def _relative(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first^-1 second of rigid motions [N, 4, 4]."""
    inverse = first[:, :3, :3].swapaxes(1, 2)
    relative = np.zeros_like(second)
    relative[:, :3, :3] = inverse @ second[:, :3, :3]
    relative[:, :3, 3:] = inverse @ (second[:, :3, 3:] - first[:, :3, 3:])
    relative[:, 3, 3] = 1
    return relative


def _root_mean_square(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))
