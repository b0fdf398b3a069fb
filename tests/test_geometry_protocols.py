"""The protocols of video depth and camera pose: what perfect and known wrong predictions score."""

import numpy as np
import pytest
from benchmark_trees import (
    FRAMES,
    LONG_SIDE,
    SCENES,
    SIZE,
    folder_of,
    opened,
    stored,
    world_scenes,
    write_bonn,
    write_scannet,
    write_sintel,
    write_trees,
)
from PIL import Image
from scipy.spatial.transform import Rotation

from omnistream_jax.data.benchmarks.preprocess import prepare_frames
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.camera_pose import aggregate_poses, evaluate_camera_pose
from omnistream_jax.evals.video_depth import aggregate_depth, evaluate_video_depth


@pytest.fixture(scope="module")
def clips():
    return world_scenes()


@pytest.fixture(scope="module")
def trees(clips, tmp_path_factory):
    return write_trees(tmp_path_factory.mktemp("benchmarks"), clips)


def in_turn(*predictions):
    """A predictor that gives one prediction a sequence, in their order."""
    left = iter(predictions)
    return lambda frames: next(left)


def rows_of(results):
    return {each.name: {"metrics": vars(each.metrics), "problem": each.problem} for each in results}


def pose_at(centres):
    poses = np.tile(np.eye(4), (len(centres), 1, 1))
    poses[:, :3, 3] = centres
    return poses


@pytest.mark.parametrize(("name", "scale"), [("sintel_depth", None), ("bonn_depth", 5000), ("kitti_depth", 256)])
def test_true_depth_has_no_error(trees, clips, name, scale):
    chosen = {"sintel_depth": clips[::-1], "bonn_depth": clips[::-1], "kitti_depth": clips[:1]}[name]
    truth = [clip.depth if scale is None else stored(clip.depth, scale) / scale for clip in chosen]
    for align in ("scale", "metric"):
        results = evaluate_video_depth(
            in_turn(*truth), opened(name, trees / folder_of(name)), align=align, long_side=LONG_SIDE
        )
        rows = rows_of(results)
        assert len(rows) == len(chosen)
        aggregate = aggregate_depth(rows)
        assert aggregate["abs_rel"] <= 1e-6
        assert aggregate["delta_1"] == 1
        holes = 10 * SIZE * FRAMES * len(chosen) if name == "bonn_depth" else 0
        assert aggregate["valid_pixels"] == FRAMES * SIZE * SIZE * len(chosen) - holes


@pytest.mark.parametrize("name", ["sintel_pose", "tum_pose", "scannet_pose"])
def test_true_poses_in_any_world_and_unit_have_no_error(trees, clips, name):
    chosen = {"sintel_pose": clips[::-1], "tum_pose": clips[:1], "scannet_pose": clips}[name]
    turn = Rotation.from_euler("xyz", [0.3, -1.2, 2.0]).as_matrix()
    predictions = [clip.cam_to_world.astype(np.float64) for clip in chosen]
    for poses in predictions:
        poses[:, :3, 3] = 2.5 * poses[:, :3, 3] @ turn.T + [1.0, -7.0, 3.0]
        poses[:, :3, :3] = turn @ poses[:, :3, :3]
    results = list(
        evaluate_camera_pose(in_turn(*predictions), opened(name, trees / folder_of(name)), long_side=LONG_SIDE)
    )
    aggregate = aggregate_poses(rows_of(results))
    assert aggregate["sequences"] == len(chosen)
    assert aggregate["ate"] <= 1e-6
    assert aggregate["rpe_translation"] <= 1e-6
    assert aggregate["rpe_rotation"] <= 1e-4
    np.testing.assert_allclose(results[0].aligned, results[0].reference[:, :3, 3], atol=1e-6)


def test_the_predictor_sees_the_frames_as_the_protocol_sizes_them(tmp_path, clips):
    wide = np.ascontiguousarray(clips[0].images[:, :25])
    write_sintel(tmp_path, "alley_2", wide, clips[0].depth[:, :25], clips[0].cam_to_world)
    seen = []

    def watch(frames):
        seen.append(frames)
        return np.ones((FRAMES, 2, 2)) if len(seen) == 1 else clips[0].cam_to_world

    list(evaluate_video_depth(watch, opened("sintel_depth", tmp_path), long_side=64))
    list(evaluate_camera_pose(watch, opened("sintel_pose", tmp_path), long_side=64))
    for frames, mode in zip(seen, ("resize", "crop"), strict=True):
        assert frames.shape == (FRAMES, 32, 64, 3)
        np.testing.assert_array_equal(frames, prepare_frames(wide, 64, 16, mode))
    assert (seen[0] != seen[1]).any()


@pytest.fixture
def flat(tmp_path):
    """Bonn with two sequences 2 m away: all of the first is known, and the upper half of the second."""
    images, depth = np.full((3, 24, 32, 3), 90, np.uint8), np.full((3, 24, 32), 10_000, np.uint16)
    write_bonn(tmp_path, "balloon2", images, depth)
    half = depth.copy()
    half[:, 12:] = 0
    write_bonn(tmp_path, "crowd2", images, half)
    return opened("bonn_depth", tmp_path)


def scaled_left(factor):
    """2 m, and `factor` times that on the left half."""
    depth = np.full((3, 24, 32), 2.0)
    depth[:, :, :16] *= factor
    return depth


def test_depth_off_on_half_of_the_pixels_scores_what_is_computed_by_hand(flat):
    predict = in_turn(scaled_left(1.1), scaled_left(1.3))
    results = list(evaluate_video_depth(predict, flat, align="metric", long_side=LONG_SIDE, show=2))
    # Half of the pixels are off by 0.1 (0.3); 1.3 is beyond 1.25. The second sequence has half of the weight.
    assert [round(each.metrics.abs_rel, 6) for each in results] == [0.05, 0.15]
    assert [each.metrics.delta_1 for each in results] == [1.0, 0.5]
    aggregate = aggregate_depth(rows_of(results))
    assert aggregate["abs_rel"] == pytest.approx((2 * 0.05 + 0.15) / 3, abs=1e-6)
    assert aggregate["delta_1"] == pytest.approx((2 * 1.0 + 0.5) / 3, abs=1e-12)
    assert [frame.index for frame in results[1].shown] == [0, 2]
    assert np.isnan(results[1].shown[0].target[12:]).all()
    np.testing.assert_allclose(results[1].shown[1].aligned, scaled_left(1.3)[0], atol=1e-6)


def test_the_scale_of_half_wrong_depth_is_that_of_ten_rounds_on_its_two_values(flat):
    scale = 2 / ((2 + 2.2) / 2)
    for _ in range(10):
        right, wrong = (1 / (abs(scale * value - 2) + 1e-8) for value in (2, 2.2))
        scale = (right * 2 * 2 + wrong * 2.2 * 2) / (right * 2 * 2 + wrong * 2.2 * 2.2)
    expected = (abs(scale * 2 - 2) / 2 + abs(scale * 2.2 - 2) / 2) / 2
    (result,) = evaluate_video_depth(in_turn(scaled_left(1.1)), flat, long_side=LONG_SIDE, skip={"crowd2"}, show=1)
    assert result.name == "balloon2"
    assert result.metrics.scale == pytest.approx(scale, abs=1e-6)
    assert result.metrics.abs_rel == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(result.shown[0].aligned, scale * scaled_left(1.1)[0], atol=1e-5)


SQUARE = np.array([[1.0, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]])
UP_AND_DOWN = np.array([1.0, -1, 1, -1])  # has no part in common with x or y, so no rotation helps


@pytest.fixture
def square(tmp_path):
    """ScanNet with two scenes whose cameras stand at the corners of a square."""
    for scene in SCENES:
        write_scannet(tmp_path, scene, np.full((4, 24, 32, 3), 90, np.uint8), pose_at(SQUARE))
    return opened("scannet_pose", tmp_path)


def test_centres_off_by_a_pattern_score_what_is_computed_by_hand(square):
    """Corners d up and d down in turn: the best scale is 2 / (2 + d²), at which ATE² = 2 d² / (2 + d²).

    From corner to corner the estimate steps 2 along an edge and 2 d up or down; after scaling by s it is off by
    2 (1 - s) and 2 d s.
    """
    turn = Rotation.from_euler("xyz", [0.5, 0.1, -0.8]).as_matrix()
    predictions = []
    for offset in (1.0, 0.5):
        poses = pose_at(3.0 * (SQUARE + np.outer(offset * UP_AND_DOWN, [0, 0, 1])) @ turn.T + 4)
        poses[:, :3, :3] = turn
        predictions.append(poses)
    rows = rows_of(evaluate_camera_pose(in_turn(*predictions), square, long_side=LONG_SIDE))
    ate = [np.sqrt(2 * d**2 / (2 + d**2)) for d in (1.0, 0.5)]
    scale = [2 / (2 + d**2) for d in (1.0, 0.5)]
    step = [np.hypot(2 * (1 - s), 2 * d * s) for s, d in zip(scale, (1.0, 0.5), strict=True)]
    metrics = [row["metrics"] for row in rows.values()]
    np.testing.assert_allclose([each["ate"] for each in metrics], ate, atol=1e-9)
    np.testing.assert_allclose([each["rpe_translation"] for each in metrics], step, atol=1e-9)
    np.testing.assert_allclose([each["scale"] for each in metrics], np.array(scale) / 3, atol=1e-9)
    aggregate = aggregate_poses(rows)
    assert aggregate["ate"] == pytest.approx(np.mean(ate), abs=1e-9)
    assert aggregate["rpe_rotation"] == pytest.approx(0, abs=1e-6)


def test_a_sequence_that_cannot_be_scored_fails_the_mean_by_name(square, flat):
    stuck = np.tile(np.eye(4), (4, 1, 1))
    results = list(evaluate_camera_pose(in_turn(stuck, pose_at(SQUARE)), square, long_side=LONG_SIDE))
    assert results[0].metrics is None
    assert results[0].aligned is None
    rows = {each.name: {"metrics": each.metrics and vars(each.metrics), "problem": each.problem} for each in results}
    with pytest.raises(ValueError, match=r"1 of 2 sequences have no score: scene0707_00: .*estimate are all at one"):
        aggregate_poses(rows)
    wrong = np.full((3, 2, 2), np.nan)
    results = list(evaluate_video_depth(in_turn(wrong, scaled_left(1)), flat, long_side=LONG_SIDE))
    rows = {each.name: {"metrics": each.metrics and vars(each.metrics), "problem": each.problem} for each in results}
    with pytest.raises(ValueError, match=r"1 of 2 sequences have no score: balloon2: .*finite"):
        aggregate_depth(rows)


def test_what_does_not_fit_is_refused(square, flat, clips):
    with pytest.raises(ValueError, match="bonn_depth has no poses"):
        next(evaluate_camera_pose(in_turn(), flat))
    with pytest.raises(ValueError, match="scannet_pose has no depth"):
        next(evaluate_video_depth(in_turn(), square))
    with pytest.raises(ValueError, match=r"align: expected one of scale, .*got 'median'"):
        next(evaluate_video_depth(in_turn(), flat, align="median"))
    with pytest.raises(ValueError, match=r"balloon2: expected depth \[3, h, w\], got shape \(2, 24, 32\)"):
        next(evaluate_video_depth(in_turn(scaled_left(1)[:2]), flat, long_side=LONG_SIDE))
    with pytest.raises(ValueError, match=r"scene0707_00: expected poses \[4, 4, 4\], got shape \(3, 4, 4\)"):
        next(evaluate_camera_pose(in_turn(pose_at(SQUARE[:3])), square, long_side=LONG_SIDE))
    path = flat.sequences[0].depth_paths[1]
    Image.fromarray(np.ones((3, 5), np.uint16)).save(path)
    with pytest.raises(DataError, match=rf"{path.name}: 5 x 3 pixels, the sequence began with 32 x 24"):
        next(evaluate_video_depth(in_turn(scaled_left(1)), flat, long_side=LONG_SIDE))
