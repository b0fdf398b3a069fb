"""Trajectory errors are those of the package evo, and what evo refuses is reported, not averaged."""

import copy
import re

import evo.main_ape
import evo.main_rpe
import numpy as np
import pytest
from evo.core.geometry import GeometryException
from evo.core.metrics import PoseRelation, Unit
from evo.core.trajectory import PosePath3D
from scipy.spatial.transform import Rotation

from omnistream_jax.evals.pose_metrics import (
    DegenerateTrajectoryError,
    TrajectoryMetrics,
    mean_over_sequences,
    trajectory_metrics,
)

KINDS = ("walk", "smooth", "planar", "unrelated", "mirrored")


def poses_of(rotation, centres):
    poses = np.tile(np.eye(4), (len(centres), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotation.as_matrix(), centres
    return poses


def turned(rotation, angle, generator):
    return Rotation.from_rotvec(generator.normal(scale=angle, size=(len(rotation), 3))) * rotation


def trajectories(kind, seed):
    """An estimate and a reference [N, 4, 4]: a noisy copy in another frame and scale, but for "unrelated"."""
    generator = np.random.default_rng([KINDS.index(kind), seed])
    count = int(generator.integers(3, 60))
    time = np.linspace(0, 3, count)[:, None]
    centres = {
        "walk": lambda: np.cumsum(generator.normal(size=(count, 3)), axis=0),
        "smooth": lambda: 50 + np.concatenate([np.cos(time), np.sin(2 * time), time**2], axis=1),
        "planar": lambda: generator.normal(size=(count, 3)) * [1, 1, 0],
        "unrelated": lambda: generator.normal(size=(count, 3)),
        "mirrored": lambda: generator.normal(size=(count, 3)),
    }[kind]()
    rotation = Rotation.random(count, rng=generator)
    if kind == "smooth":
        rotation = Rotation.from_euler("yx", np.concatenate([20 * time, 5 * np.sin(time)], axis=1), degrees=True)
    reference = poses_of(rotation, centres)
    if kind == "unrelated":
        return poses_of(Rotation.random(count, rng=generator), generator.normal(size=(count, 3))), reference
    frame, scale = Rotation.random(rng=generator), generator.uniform(0.1, 10)
    moved = scale * frame.apply(centres * ([1, 1, -1] if kind == "mirrored" else 1)) + generator.normal(size=3)
    moved += 0.05 * scale * generator.normal(size=moved.shape) * (kind != "planar")
    return poses_of(turned(frame * rotation, 0.05, generator), moved), reference


def evo_numbers(estimate, reference):
    """evo aligns the estimate in place, so each call gets its own copy."""

    def paths():
        return PosePath3D(poses_se3=list(copy.deepcopy(reference))), PosePath3D(poses_se3=list(copy.deepcopy(estimate)))

    alignment = {"align": True, "correct_scale": True}
    ape = evo.main_ape.ape(*paths(), pose_relation=PoseRelation.translation_part, **alignment)
    relative = [
        evo.main_rpe.rpe(
            *paths(), pose_relation=relation, delta=1, delta_unit=Unit.frames, all_pairs=True, **alignment
        ).stats["rmse"]
        for relation in (PoseRelation.translation_part, PoseRelation.rotation_angle_deg)
    ]
    similarity = ape.np_arrays["alignment_transformation_sim3"]
    return [ape.stats["rmse"], *relative, np.cbrt(np.linalg.det(similarity[:3, :3]))]


def numbers(metrics):
    return [metrics.ate, metrics.rpe_translation, metrics.rpe_rotation, metrics.scale]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_equals_evo(kind, seed):
    estimate, reference = trajectories(kind, seed)
    before = estimate.copy(), reference.copy()
    found = trajectory_metrics(estimate, reference)
    assert found.degenerate is None
    assert found.poses == len(reference)
    np.testing.assert_allclose(numbers(found), evo_numbers(estimate, reference), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal((estimate, reference), before)  # nothing is aligned in place


def test_a_float32_estimate_equals_evo():
    estimate, reference = trajectories("smooth", 0)
    estimate = estimate.astype(np.float32)
    found = numbers(trajectory_metrics(estimate, reference))
    np.testing.assert_allclose(found, evo_numbers(estimate.astype(np.float64), reference), rtol=1e-5)


def test_an_estimate_in_another_frame_and_scale_has_no_error():
    _, reference = trajectories("walk", 0)
    frame = Rotation.from_euler("xyz", [10, 20, 30], degrees=True)
    estimate = reference.copy()
    estimate[:, :3, :3] = frame.as_matrix() @ reference[:, :3, :3]
    estimate[:, :3, 3] = 0.25 * frame.apply(reference[:, :3, 3]) + [1, 2, 3]
    np.testing.assert_allclose(numbers(trajectory_metrics(estimate, reference)), [0, 0, 0, 4], atol=1e-5)


def test_a_known_turn_is_counted_in_degrees():
    _, reference = trajectories("walk", 1)
    reference[:, :3, :3] = np.eye(3)
    estimate = reference.copy()
    # Camera k is turned by 2 k degrees: each step by 2 more.
    turns = Rotation.from_rotvec(np.arange(len(reference))[:, None] * [0, 0, 2.0], degrees=True)
    estimate[:, :3, :3] = turns.as_matrix()
    found = trajectory_metrics(estimate, reference)
    assert found.rpe_rotation == pytest.approx(2, abs=1e-9)
    assert found.ate == pytest.approx(0, abs=1e-9)


def line(generator, count, direction):
    return generator.normal(size=(count, 1)) * np.asarray(direction, np.float64)


DEGENERATE = {
    "static reference": (lambda g: g.normal(size=(9, 3)), lambda g: np.full((9, 3), 0.3), "reference are all at one"),
    "static estimate": (lambda g: np.full((9, 3), 0.3), lambda g: g.normal(size=(9, 3)), "estimate are all at one"),
    "reference on a line": (lambda g: g.normal(size=(9, 3)), lambda g: line(g, 9, [1, 0, 0]), "reference .* one line"),
    "estimate on a line": (lambda g: line(g, 9, [0, 2, 0]), lambda g: g.normal(size=(9, 3)), "estimate .* one line"),
    "both on a line": (lambda g: line(g, 9, [0, 2, 0]), lambda g: line(g, 9, [1, 0, 0]), "estimate .* one line"),
    "unlike planes": (
        lambda g: np.array([[1, 1, 0], [-1, -1, 0], [1, -1, 0], [-1, 1, 0.0]]),
        lambda g: np.array([[1, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 0, 1.0]]),
        "not together in two directions",
    ),
    "too small": (
        lambda g: 1e-9 * g.normal(size=(9, 3)),
        lambda g: 1e-9 * g.normal(size=(9, 3)),
        "vary too little",
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("seed", range(3))
def test_what_evo_refuses_is_degenerate(name, seed):
    generator = np.random.default_rng(seed)
    estimate_centres, reference_centres, reason = DEGENERATE[name]
    estimate, reference = (
        poses_of(Rotation.random(len(centres), rng=generator), centres)
        for centres in (estimate_centres(generator), reference_centres(generator))
    )
    with pytest.raises(GeometryException, match="Degenerate covariance rank"):
        evo_numbers(estimate, reference)
    found = trajectory_metrics(estimate, reference)
    assert numbers(found) == [None] * 4
    assert found.degenerate.startswith("degenerate covariance rank")
    assert re.search(reason, found.degenerate)


@pytest.mark.parametrize("size", [1, 30])
@pytest.mark.parametrize("seed", range(10))
def test_a_slanted_line_is_degenerate_whatever_its_rounding_errors(size, seed):
    """evo's fixed bound lets most lines of some metres pass."""
    generator = np.random.default_rng(seed)
    reference = poses_of(Rotation.random(20, rng=generator), line(generator, 20, [size, size / 3, size / 7]) + 40)
    estimate = poses_of(Rotation.random(20, rng=generator), generator.normal(size=(20, 3)))
    assert "reference are all on one line" in trajectory_metrics(estimate, reference).degenerate


def test_a_nearly_straight_trajectory_is_not_degenerate():
    generator = np.random.default_rng(0)
    centres = line(generator, 20, [10, 3, 1]) + 1e-3 * generator.normal(size=(20, 3))
    reference = poses_of(Rotation.random(20, rng=generator), centres)
    estimate = poses_of(Rotation.random(20, rng=generator), centres + 1e-4 * generator.normal(size=(20, 3)))
    np.testing.assert_allclose(
        numbers(trajectory_metrics(estimate, reference)), evo_numbers(estimate, reference), rtol=1e-6
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_poses_are_degenerate(count):
    estimate, reference = (poses[:count] for poses in trajectories("walk", 0))
    assert trajectory_metrics(estimate, reference).degenerate == f"too few poses: {count}, alignment needs 3"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poses_that_are_not_finite_are_degenerate(value):
    estimate, reference = trajectories("walk", 0)
    broken = reference.copy()
    broken[[2, 4], 0, 3] = value
    found = trajectory_metrics(estimate, broken)
    assert found.degenerate == f"reference: 2 of {len(reference)} poses are not finite, the first is 2"
    assert numbers(found) == [None] * 4
    assert trajectory_metrics(broken, reference).degenerate.startswith("estimate: 2 of")


def test_what_is_no_trajectory_is_an_error():
    estimate, reference = trajectories("walk", 0)
    with pytest.raises(ValueError, match=r"expected equal shapes \[N, 4, 4\]"):
        trajectory_metrics(estimate[1:], reference)
    with pytest.raises(ValueError, match=r"expected equal shapes \[N, 4, 4\]"):
        trajectory_metrics(estimate[:, :3], reference[:, :3])
    for index, factor in (((1, slice(3), slice(3)), 1.01), ((1, slice(3), 0), -1), ((1, 3, 3), 2)):
        broken = estimate.copy()
        broken[index] *= factor
        with pytest.raises(ValueError, match="estimate: pose 1 is no rigid motion"):
            trajectory_metrics(broken, reference)


def test_the_mean_is_plain_over_sequences():
    sequences = {
        "short": TrajectoryMetrics(0.1, 0.2, 1.0, 2.0, 10),
        "long": TrajectoryMetrics(0.3, 0.4, 5.0, 7.0, 1000),
    }
    mean = mean_over_sequences(sequences)
    assert (mean.ate, mean.rpe_translation, mean.rpe_rotation) == pytest.approx((0.2, 0.3, 3.0))
    assert (mean.sequences, mean.excluded) == (2, ())


def test_the_mean_refuses_degenerate_sequences_unless_they_are_excluded():
    good = TrajectoryMetrics(0.1, 0.2, 1.0, 2.0, 10)
    sequences = {"alley_1": TrajectoryMetrics(None, None, None, None, 50, "static"), "alley_2": good}
    with pytest.raises(DegenerateTrajectoryError, match=r"1 of 2 sequences are degenerate.*: alley_1: static"):
        mean_over_sequences(sequences)
    mean = mean_over_sequences(sequences, exclude=["alley_1"])
    assert (mean.ate, mean.sequences, mean.excluded) == (0.1, 1, ("alley_1",))
    with pytest.raises(ValueError, match="exclude: expected names of sequences, got alley_3"):
        mean_over_sequences(sequences, exclude=["alley_1", "alley_3"])
    with pytest.raises(ValueError, match="none left to average, 2 given and 2 excluded"):
        mean_over_sequences(sequences, exclude=list(sequences))
