"""Camera-pose benchmarks: trees written by hand in the published layouts, read back."""

import struct

import numpy as np
import pytest
from benchmark_trees import (
    TUM,
    link_many,
    only_sequence,
    save_picture,
    tum_row,
    write_cam,
    write_scannet,
    write_scannet_unpacked,
    write_sintel,
    write_tum,
    write_tum_published,
)
from evo.tools import file_interface
from world_cases import camera_path

from omnistream_jax.data.benchmarks import scannet, sintel, tum
from omnistream_jax.data.benchmarks.registry import open_benchmark
from omnistream_jax.data.errors import DataError

SCENE = "scene0708_00"


def pictures(count, first=0):
    """[count, 6, 8, 3], each of one shade: its number."""
    shade = np.arange(first, first + count, dtype=np.uint8)
    return np.ascontiguousarray(np.broadcast_to(shade[:, None, None, None], (count, 6, 8, 3)))


def shades(sequence):
    """The shade of each frame, by which `pictures` tells them apart."""
    return [int(np.rint(sequence.frame(index).mean())) for index in range(len(sequence))]


def test_sintel_is_read_back_with_its_mean_position_as_origin(tmp_path):
    poses = camera_path(4)
    write_sintel(tmp_path, "ambush_4", pictures(4, 1), cam_to_world=poses)
    write_sintel(tmp_path, "alley_1", pictures(4), cam_to_world=poses)  # its camera stands still: none of the fourteen
    sequence = only_sequence("sintel_pose", tmp_path)
    assert sequence.name == "ambush_4"
    assert shades(sequence) == [1, 2, 3, 4]
    assert sequence.cam_to_world.dtype == np.float64
    np.testing.assert_array_equal(sequence.timestamps, [1, 2, 3, 4])
    np.testing.assert_allclose(sequence.cam_to_world[:, :3, :3], poses[:, :3, :3], atol=1e-12)
    np.testing.assert_allclose(sequence.cam_to_world[0, :3, 3], [-0.15, 0.045, -0.12], atol=1e-12)


def test_a_sintel_camera_typed_by_hand(tmp_path):
    numbers = [2.0, 0, 3, 0, 2, 4, 0, 0, 1, 1, 0, 0, -1, 0, 1, 0, -2, 0, 0, 1, -3]
    (tmp_path / "a.cam").write_bytes(b"PIEH" + struct.pack("<21d", *numbers))
    intrinsics, world_to_camera = sintel.read_cam(tmp_path / "a.cam")
    np.testing.assert_array_equal(intrinsics, [[2, 0, 3], [0, 2, 4], [0, 0, 1]])
    np.testing.assert_array_equal(np.linalg.inv(world_to_camera)[:3, 3], [1, 2, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"HEIP" + bytes(168), "its tag is .*, expected 202021.25"),
        (b"PIEH" + bytes(160), "it has 164 bytes, expected 172"),
    ],
)
def test_a_damaged_sintel_camera_is_named(tmp_path, content, message):
    write_sintel(tmp_path, "ambush_4", pictures(2), cam_to_world=camera_path(2))
    (tmp_path / "training/camdata_left/ambush_4/frame_0002.cam").write_bytes(content)
    with pytest.raises(DataError, match=rf"frame_0002\.cam: expected a Sintel camera .*{message}"):
        open_benchmark("sintel_pose", tmp_path, allow_incomplete=True)


def test_tum_is_matched_by_time_and_thinned(tmp_path):
    poses = camera_path(30)
    picture_times = 1341845948.7 + np.arange(10) / 10
    pose_times = picture_times[0] - 0.005 + np.arange(30) / 30
    write_tum_published(tmp_path / TUM, pictures(10), poses, picture_times, pose_times)
    sequence = only_sequence("tum_pose", tmp_path)
    assert sequence.name == TUM
    assert shades(sequence) == [0, 3, 6, 9]
    np.testing.assert_allclose(sequence.timestamps, pose_times[[0, 9, 18, 27]], atol=2e-6)
    np.testing.assert_allclose(sequence.cam_to_world, poses[[0, 9, 18, 27]], atol=1e-8)
    np.testing.assert_allclose(sequence.cam_to_world[1, :3, 3], [-0.1, -0.07, -0.78], atol=1e-8)
    read_by_evo = file_interface.read_tum_trajectory_file(tmp_path / TUM / "groundtruth.txt")
    np.testing.assert_allclose(sequence.cam_to_world, np.array(read_by_evo.poses_se3)[[0, 9, 18, 27]], atol=1e-12)


def test_tum_is_read_back_as_prepared(tmp_path):
    poses, times = camera_path(3), np.array([1.0, 1.1, 1.2])
    write_tum(tmp_path / "tum" / TUM, pictures(3), poses, times)
    sequence = only_sequence("tum_pose", tmp_path)
    assert shades(sequence) == [0, 1, 2]
    np.testing.assert_allclose(sequence.cam_to_world, poses, atol=1e-8)
    np.testing.assert_array_equal(sequence.timestamps, times)


def test_the_closest_times_are_matched_first():
    """In the order of time 0.000 would take 0.011, and 0.010 go without."""
    assert tum.associate(np.array([0.0, 0.01]), np.array([0.011, 0.025])).tolist() == [[1, 0]]
    assert tum.associate(np.array([0.0, 1.0]), np.array([0.02, 1.01])).tolist() == [[1, 1]]  # closer than, not as far
    assert tum.associate(np.array([0.0]), np.array([])).shape == (0, 2)


@pytest.mark.parametrize("seed", range(3))
def test_matches_equal_those_over_all_pairs(seed):
    generator = np.random.default_rng(seed)
    first, second = (np.sort(generator.uniform(0, 2, size)) for size in (120, 150))
    pairs = sorted((abs(a - b), a, b) for a in first for b in second if abs(a - b) < 0.02)
    expected = []
    for _, a, b in pairs:
        if all(a != c and b != d for c, d in expected):
            expected.append((a, b))
    matches = tum.associate(first, second)
    assert [(first[i], second[j]) for i, j in matches] == sorted(expected)
    assert len(expected) > 60


def test_tum_pictures_that_no_pose_goes_with_are_refused(tmp_path):
    write_tum_published(tmp_path / TUM, pictures(2), camera_path(2), [1.0, 1.1], [5.0, 5.1])
    with pytest.raises(DataError, match=r"rgb\.txt: no picture within 0\.02 s of a pose"):
        open_benchmark("tum_pose", tmp_path, allow_incomplete=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1.0 0 0 0 0 0 0 0", "with unit quaternions"),
        ("1.0 0 0 0 0 0 1", "rows of 8 numbers"),
        ("1.0 0 inf 0 0 0 0 1", "a number is not finite"),
    ],
)
def test_a_broken_trajectory_is_named(tmp_path, row, message):
    write_tum_published(tmp_path / TUM, pictures(1), camera_path(1), [1.0], [1.0])
    (tmp_path / TUM / "groundtruth.txt").write_text(row + "\n")
    with pytest.raises(DataError, match=rf"groundtruth\.txt: expected .*{message}"):
        open_benchmark("tum_pose", tmp_path, allow_incomplete=True)


@pytest.mark.parametrize("below", ["", "scannetv2"])
def test_scannet_is_read_back_as_prepared(tmp_path, below):
    poses = camera_path(5)
    write_scannet(tmp_path / below, SCENE, pictures(5), poses)
    excluded = "scene0711_00"
    write_scannet(tmp_path / below, excluded, pictures(5), np.full((5, 4, 4), -np.inf))  # never read
    sequence = only_sequence("scannet_pose", tmp_path)
    assert sequence.name == SCENE
    assert shades(sequence) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(sequence.cam_to_world, poses, atol=1e-12)
    np.testing.assert_allclose(sequence.cam_to_world[4, :3, 3], [-0.6, 0.08, -1.18], atol=1e-12)


@pytest.mark.parametrize("below", ["", "scans", "scans_test"])
def test_scannet_as_unpacked_is_thinned_in_the_order_of_numbers(tmp_path, below):
    poses = camera_path(12)  # by name 10 and 11 would come before 2
    write_scannet_unpacked(tmp_path / below, SCENE, pictures(12), poses)
    sequence = only_sequence("scannet_pose", tmp_path)
    assert shades(sequence) == [0, 3, 6, 9]
    np.testing.assert_allclose(sequence.cam_to_world, poses[::3], atol=2e-6)
    rotations = sequence.cam_to_world[:, :3, :3]
    np.testing.assert_allclose(rotations @ rotations.swapaxes(1, 2), np.tile(np.eye(3), (4, 1, 1)), atol=1e-14)


def test_poses_that_cannot_be_scored_are_named(tmp_path):
    write_scannet_unpacked(tmp_path / "a", SCENE, pictures(4), camera_path(4))
    np.savetxt(tmp_path / "a" / SCENE / "pose/3.txt", np.full((4, 4), -np.inf))
    with pytest.raises(DataError, match=r"pose/3\.txt: its pose is not finite"):
        open_benchmark("scannet_pose", tmp_path / "a", allow_incomplete=True)
    (tmp_path / "a" / SCENE / "pose/3.txt").unlink()
    with pytest.raises(DataError, match=r"pose/3\.txt: there is no such file; expected the pose of .*color/3\.jpg"):
        open_benchmark("scannet_pose", tmp_path / "a", allow_incomplete=True)
    poses = camera_path(2)
    poses[1, :3, :3] *= 2
    write_scannet(tmp_path / "b", SCENE, pictures(2), poses)
    with pytest.raises(DataError, match=r"pose_90\.txt, row 1: its pose is no rotation and translation"):
        open_benchmark("scannet_pose", tmp_path / "b", allow_incomplete=True)
    write_scannet(tmp_path / "c", SCENE, pictures(2), camera_path(2))
    save_picture(tmp_path / "c" / SCENE / "color_90/frame_0002.jpg", pictures(1)[0])
    with pytest.raises(DataError, match=r"color_90: 3 frames but 2 poses; expected one a frame"):
        open_benchmark("scannet_pose", tmp_path / "c", allow_incomplete=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sintel_pose", "training/final/SEQUENCE"),
        ("tum_pose", r"freiburg3_SEQUENCE/rgb_90 \(prepared\) or rgbd_dataset_freiburg3_SEQUENCE/rgb\.txt"),
        ("scannet_pose", r"SCENE/color_90 \(prepared\) or SCENE/color and SCENE/pose"),
    ],
)
def test_another_layout_is_refused_by_what_was_expected(tmp_path, name, expected):
    with pytest.raises(DataError, match=rf"{tmp_path}: holds no .*{expected}"):
        open_benchmark(name, tmp_path, allow_incomplete=True)


def write_complete(root, picture, poses):
    """All of the three benchmarks; every picture is one file."""
    write_cam(root / "a.cam", np.eye(4))
    short = {"ambush_4": 33, "ambush_6": 20, "market_6": 40}
    for name in sintel.MOVING:
        stems = [f"frame_{number:04d}" for number in range(1, short.get(name, 50) + 1)]
        link_many(picture, root / "training/final" / name, [f"{stem}.png" for stem in stems])
        link_many(root / "a.cam", root / "training/camdata_left" / name, [f"{stem}.cam" for stem in stems])
    times = 10.0 + np.arange(300) / 30
    rows = "\n".join(tum_row(time, pose) for time, pose in zip(times, poses, strict=True))
    for name in tum.SEQUENCES:
        link_many(picture, root / name / "rgb", [f"{time:.6f}.png" for time in times])
        (root / name / "rgb.txt").write_text("".join(f"{time:.6f} rgb/{time:.6f}.png\n" for time in times))
        (root / name / "groundtruth.txt").write_text(rows)
    matrices = "".join(" ".join(map(str, pose.ravel())) + "\n" for pose in poses[:90])
    for number in range(707, 807):
        scene = root / f"scene{number:04d}_00"
        link_many(picture, scene / "color_90", [f"frame_{frame:04d}.jpg" for frame in range(90)])
        (scene / "pose_90.txt").write_text(matrices)


def test_complete_benchmarks_are_accepted_and_a_missing_frame_is_not(tmp_path):
    save_picture(tmp_path / "picture.png", pictures(1)[0])
    write_complete(tmp_path, tmp_path / "picture.png", camera_path(300))
    counts = {name: open_benchmark(name, tmp_path).counts() for name in ("sintel_pose", "tum_pose", "scannet_pose")}
    assert {name: count.describe() for name, count in counts.items()} == {
        "sintel_pose": "14 of 14 sequences, 643 of 643 frames",
        "tum_pose": "8 of 8 sequences, 720 of 720 frames",
        "scannet_pose": "94 of 94 sequences, 8,460 of 8,460 frames",
    }
    assert not {f"scene0{number}_00" for number in (711, 737, 750, 761, 791, 796)} & set(scannet.SCENES)
    (tmp_path / "training/final/market_6/frame_0040.png").unlink()
    with pytest.raises(DataError, match=r"14 of 14 sequences, 642 of 643 frames \(market_6: 39 of 40 frames\)"):
        open_benchmark("sintel_pose", tmp_path)
    (tmp_path / tum.SEQUENCES[0]).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"7 of 8 .* \(rgbd_dataset_freiburg3_sitting_static: 0 of 90 frames\)"):
        open_benchmark("tum_pose", tmp_path)


def test_poses_are_sized_by_cropping(tmp_path):
    write_scannet(tmp_path, SCENE, pictures(1), camera_path(1))
    benchmark = open_benchmark("scannet_pose", tmp_path, allow_incomplete=True)
    assert (benchmark.task, benchmark.mode, benchmark.max_depth, benchmark.clip_max) == ("pose", "crop", None, None)
    save_picture(tmp_path / SCENE / "color_90/frame_0000.jpg", np.full((968, 1296, 3), 50, np.uint8))
    assert benchmark.sequences[0].frames(benchmark.mode).shape == (1, 368, 512, 3)
