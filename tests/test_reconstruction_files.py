"""What the reconstruction writes, read back by others' tools: plyfile, evo, Pillow, OpenCV, safetensors, json."""

import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from evo.tools.file_interface import read_tum_trajectory_file
from PIL import Image
from plyfile import PlyData
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.reconstruction import files
from omnistream_jax.reconstruction.files import (
    ReconstructionError,
    TrajectoryWriter,
    write_depth_png,
    write_depth_safetensors,
    write_intrinsics_json,
    write_ply,
    write_tum,
)
from omnistream_jax.reconstruction.recorder import PointOptions, ReconstructionRecorder

HEIGHT, WIDTH = 12, 16
INTRINSICS = np.array([[14.5, 0, 8.25], [0, 15.5, 5.75], [0, 0, 1]], np.float32)


def random_poses(rng, count):
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, rng=rng).as_matrix()
    poses[:, :3, 3] = rng.normal(0, 10, (count, 3))
    return poses


def frames_of(count, seed=0):
    """Arguments of `add` for frames 0 to count - 1."""
    rng = np.random.default_rng(seed)
    for index, pose in enumerate(random_poses(rng, count)):
        yield {
            "index": index,
            "time": 10 + index / 30,
            "image": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
            "depth": rng.uniform(0.5, 9, (HEIGHT, WIDTH)).astype(np.float32),
            "confidence": rng.uniform(1, 5, (HEIGHT, WIDTH)).astype(np.float32),
            "cam_to_world": pose.astype(np.float32),
            "intrinsics": INTRINSICS + np.float32(index) * np.eye(3, dtype=np.float32) * [[1], [1], [0]],
        }


def record(folder, frames, **options):
    with ReconstructionRecorder(folder, **options) as recorder:
        for frame in frames:
            recorder.add(**frame)
    return recorder


def read_ply(path):
    vertices = PlyData.read(path)["vertex"]
    points = np.stack([vertices[name] for name in "xyz"], -1)
    return points, np.stack([vertices[name] for name in ("red", "green", "blue")], -1)


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# The formats


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_plyfile_reads_the_points(tmp_path, count):
    rng = np.random.default_rng(count)
    points = rng.normal(0, 1e3, (count, 3)).astype(np.float32)
    colours = rng.integers(0, 256, (count, 3), dtype=np.uint8)
    write_ply(tmp_path / "points.ply", points, colours)
    data = PlyData.read(tmp_path / "points.ply")
    assert (data.text, data.byte_order) == (False, "<")
    found_points, found_colours = read_ply(tmp_path / "points.ply")
    assert (found_points.dtype, found_colours.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(found_points, points)
    np.testing.assert_array_equal(found_colours, colours)


def test_evo_reads_the_trajectory(tmp_path):
    rng = np.random.default_rng(0)
    poses, times = random_poses(rng, 50), 1.7e9 + np.cumsum(rng.uniform(0.01, 0.1, 50))
    write_tum(tmp_path / "all.txt", times, poses)
    writer = TrajectoryWriter(tmp_path / "grown.txt")
    for time, pose in zip(times, poses, strict=True):
        writer.add(time, pose)
    writer.close()
    assert (tmp_path / "grown.txt").read_bytes() == (tmp_path / "all.txt").read_bytes()
    trajectory = read_tum_trajectory_file(str(tmp_path / "all.txt"))
    assert trajectory.check()[0]
    np.testing.assert_array_equal(trajectory.timestamps, times)
    np.testing.assert_array_equal(trajectory.positions_xyz, poses[:, :3, 3])
    np.testing.assert_allclose(np.array(trajectory.poses_se3), poses, atol=1e-12)


def test_a_line_is_translation_then_quaternion_with_its_scalar_last(tmp_path):
    pose = np.eye(4)
    pose[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # a quarter turn about z
    pose[:3, 3] = 1, -2, 3.5
    write_tum(tmp_path / "one.txt", np.array([0.25]), pose[None])
    lines = (tmp_path / "one.txt").read_text().splitlines()
    assert lines[0] == "# timestamp tx ty tz qx qy qz qw"
    values = [float(value) for value in lines[1].split(" ")]
    np.testing.assert_allclose(values, [0.25, 1, -2, 3.5, 0, 0, 0.5**0.5, 0.5**0.5], atol=1e-15)


def test_pillow_and_opencv_read_depth_in_millimetres(tmp_path):
    depth = np.array([[0.001, 1.2344, 1.2346, 65.535], [np.nan, np.inf, -1.0, 0.0], [65.536, 1e30, 0.0004, 0.0006]])
    expected = np.array([[1, 1234, 1235, 65535], [0, 0, 0, 0], [0, 0, 0, 1]])
    write_depth_png(tmp_path / "depth.png", depth)
    with Image.open(tmp_path / "depth.png") as image:
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(image), expected)
    read = cv2.imread(str(tmp_path / "depth.png"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, expected)


def test_safetensors_reads_depth_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    depth = rng.normal(size=(4, 5, 3)).astype(np.float32)
    depth[0, 0, 0] = np.nan
    turned = np.transpose(depth, (2, 0, 1))  # not contiguous
    index, time = np.array([3, 5, 9]), np.array([0.1, 0.2, 0.3])
    write_depth_safetensors(tmp_path / "depth.safetensors", turned, index=index, time=time, confidence=turned + 1)
    tensors = load_file(tmp_path / "depth.safetensors")
    assert {name: values.dtype for name, values in tensors.items()} == {
        "depth": np.float32,
        "index": np.int64,
        "time": np.float64,
        "confidence": np.float32,
    }
    np.testing.assert_array_equal(tensors["depth"], turned)
    np.testing.assert_array_equal(tensors["confidence"], turned + 1)
    np.testing.assert_array_equal(tensors["index"], index)
    np.testing.assert_array_equal(tensors["time"], time)


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3), (7, 3, 3)])
def test_json_reads_intrinsics(tmp_path, shape):
    intrinsics = np.random.default_rng(0).uniform(1, 500, shape).astype(np.float32)
    write_intrinsics_json(tmp_path / "intrinsics.json", intrinsics, 480, 640)
    found = json.loads((tmp_path / "intrinsics.json").read_text())
    assert (found["height"], found["width"]) == (480, 640)
    np.testing.assert_array_equal(np.array(found["intrinsics"], np.float32), intrinsics)


# Errors


def not_a_rotation():
    poses = np.eye(4)[None].copy()
    poses[0, 2, 2] = -1  # a mirror
    return poses


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda path: write_ply(path, np.zeros((3, 2)), np.zeros((3, 3), np.uint8)), "points"),
        (lambda path: write_ply(path, np.zeros((3, 3)), np.zeros((3, 3))), "colours"),
        (lambda path: write_tum(path, np.zeros(2), np.eye(4)[None]), "timestamps"),
        (lambda path: write_tum(path, np.zeros(0), np.zeros((0, 4, 4))), "timestamps"),
        (lambda path: write_tum(path, np.array([np.nan]), np.eye(4)[None]), "not finite"),
        (lambda path: write_tum(path, np.zeros(1), not_a_rotation()), "rotation"),
        (lambda path: write_tum(path, np.zeros(1), 2 * np.eye(4)[None]), "rotation"),
        (lambda path: write_depth_png(path, np.zeros((1, 2, 3))), "depth"),
        (lambda path: write_depth_safetensors(path, np.zeros((2, 3))), "depth"),
        (lambda path: write_depth_safetensors(path, np.zeros((2, 3, 4)), time=np.zeros(3)), "time"),
        (lambda path: write_intrinsics_json(path, np.zeros((3, 4)), 2, 2), "intrinsics"),
        (lambda path: write_intrinsics_json(path, np.full((3, 3), np.nan), 2, 2), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_file_named(tmp_path, write, named):
    with pytest.raises(ReconstructionError, match=named) as caught:
        write(tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: ")
    assert names_in(tmp_path) == []


WRITES = {
    "ply": lambda path: write_ply(path, np.zeros((2, 3)), np.zeros((2, 3), np.uint8)),
    "tum": lambda path: write_tum(path, np.zeros(1), np.eye(4)[None]),
    "png": lambda path: write_depth_png(path, np.ones((2, 2))),
    "safetensors": lambda path: write_depth_safetensors(path, np.ones((1, 2, 2))),
    "json": lambda path: write_intrinsics_json(path, np.eye(3), 2, 2),
    "growing": lambda path: TrajectoryWriter(path).close(),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "out", tmp_path / "folder"):
        with pytest.raises(ReconstructionError) as caught:
            WRITES[name](path)
        assert str(caught.value).startswith(f"{path}: cannot be written (")


@pytest.mark.parametrize("name", sorted(set(WRITES) - {"growing"}))
def test_an_interrupted_write_leaves_the_file_that_was_there(tmp_path, name, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "out"
    path.write_text("earlier")
    monkeypatch.setattr(Path, "replace", interrupt)  # all is written but for the name
    with pytest.raises(KeyboardInterrupt):
        WRITES[name](path)
    assert path.read_text() == "earlier"
    assert names_in(tmp_path) == ["out"]


# The recorder


def test_a_recording_is_complete_and_exact(tmp_path):
    frames = list(frames_of(10))
    recorder = record(tmp_path, frames, shard_frames=4, point_options=PointOptions(voxel=1e-4, stride=1))
    assert recorder.frames == 10
    assert recorder.files == ["depth", "trajectory.txt", "intrinsics.json", "points.ply"]
    pictures = [f"depth/{index:06d}.png" for index in range(10)]
    shards = [f"depth/{name}.safetensors" for name in ("000000-000003", "000004-000007", "000008-000009")]
    assert names_in(tmp_path) == sorted([*pictures, *shards, "intrinsics.json", "points.ply", "trajectory.txt"])
    depth = np.stack([frame["depth"] for frame in frames])
    for picture, expected in zip(pictures, depth, strict=True):
        with Image.open(tmp_path / picture) as image:
            np.testing.assert_allclose(np.asarray(image) / 1000, expected, atol=0.5001e-3)
    tensors = [load_file(tmp_path / shard) for shard in shards]
    joined = {name: np.concatenate([each[name] for each in tensors]) for name in tensors[0]}
    np.testing.assert_array_equal(joined["depth"], depth)
    for name in ("confidence", "index", "time"):
        np.testing.assert_array_equal(joined[name], np.stack([frame[name] for frame in frames]))
    trajectory = read_tum_trajectory_file(str(tmp_path / "trajectory.txt"))
    np.testing.assert_array_equal(trajectory.timestamps, joined["time"])
    poses = np.stack([frame["cam_to_world"] for frame in frames])
    np.testing.assert_allclose(np.array(trajectory.poses_se3), poses, rtol=1e-6, atol=1e-6)
    stored = json.loads((tmp_path / "intrinsics.json").read_text())
    assert (stored["height"], stored["width"]) == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(stored["intrinsics"], np.stack([frame["intrinsics"] for frame in frames]))
    points, colours = read_ply(tmp_path / "points.ply")
    assert len(points) == 10 * HEIGHT * WIDTH  # voxels so small that no two points share one
    expected = np.concatenate([by_hand(frame) for frame in frames])
    order, expected_order = np.lexsort(points.round(3).T), np.lexsort(expected.round(3).T)
    pixels = np.concatenate([frame["image"].reshape(-1, 3) for frame in frames])
    np.testing.assert_allclose(points[order], expected[expected_order], atol=2e-3)
    assert (colours[order] == pixels[expected_order]).all(1).mean() > 0.99  # rounding may swap neighbours in order


def by_hand(frame):
    """Its points [H * W, 3] by the words of data/schema.py, with homogeneous coordinates."""
    rows, columns = np.indices((HEIGHT, WIDTH)).reshape(2, -1)
    pixels = np.stack([columns + 0.5, rows + 0.5, np.ones(HEIGHT * WIDTH)])
    camera = frame["depth"].reshape(-1) * np.linalg.solve(frame["intrinsics"].astype(float), pixels)
    return (frame["cam_to_world"].astype(float) @ np.vstack([camera, np.ones(HEIGHT * WIDTH)]))[:3].T


def test_metres_per_unit_scales_all_that_has_a_length(tmp_path):
    options = PointOptions(voxel=1e-4, stride=3)
    record(tmp_path / "units", frames_of(3), point_options=options)
    record(tmp_path / "metres", frames_of(3), metres_per_unit=2.0, point_options=options)
    folders = [tmp_path / name for name in ("units", "metres")]
    units, metres = (load_file(folder / "depth" / "000000-000002.safetensors") for folder in folders)
    np.testing.assert_array_equal(metres["depth"], 2 * units["depth"])
    np.testing.assert_array_equal(metres["confidence"], units["confidence"])
    read = [cv2.imread(str(folder / "depth" / "000001.png"), cv2.IMREAD_UNCHANGED) for folder in folders]
    np.testing.assert_array_equal(read[1], np.rint(2000.0 * units["depth"][1]))
    paths = [read_tum_trajectory_file(str(folder / "trajectory.txt")) for folder in folders]
    np.testing.assert_array_equal(paths[1].positions_xyz, 2 * paths[0].positions_xyz)
    np.testing.assert_array_equal(paths[1].orientations_quat_wxyz, paths[0].orientations_quat_wxyz)
    points = [np.sort(read_ply(folder / "points.ply")[0], axis=0) for folder in folders]
    np.testing.assert_allclose(points[1], 2 * points[0], rtol=1e-5, atol=1e-4)
    same = [(folder / "intrinsics.json").read_bytes() for folder in folders]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("switch", "missing"),
    [
        ("depth_png", "depth/000000.png"),
        ("depth_tensors", "depth/000000-000000.safetensors"),
        ("trajectory", "trajectory.txt"),
        ("intrinsics", "intrinsics.json"),
        ("points", "points.ply"),
    ],
)
def test_each_output_can_be_left_out(tmp_path, switch, missing):
    record(tmp_path / "all", frames_of(1))
    recorder = record(tmp_path / "some", frames_of(1), **{switch: False})
    assert set(names_in(tmp_path / "all")) - set(names_in(tmp_path / "some")) == {missing}
    assert (recorder.cloud is None) == (switch == "points")
    assert all((tmp_path / "some" / name).exists() for name in recorder.files)


def count_points(folder, frames, **options):
    options = {"voxel": 1e-4, "stride": 1} | options
    return len(record(folder, frames, depth_png=False, point_options=PointOptions(**options)).cloud)


def test_point_options_choose_pixels(tmp_path):
    frames = list(frames_of(5))
    whole = HEIGHT * WIDTH
    assert count_points(tmp_path, frames) == 5 * whole
    assert count_points(tmp_path, frames, every=2) == 3 * whole
    assert count_points(tmp_path, frames, stride=5) == 5 * 3 * 4
    assert count_points(tmp_path, frames, max_points=100) <= 100
    confidence = np.stack([frame["confidence"] for frame in frames])
    assert count_points(tmp_path, frames, min_confidence=3.0) == (confidence >= 3).sum()
    assert count_points(tmp_path, frames, confidence_quantile=0.25) == 5 * 0.75 * whole
    both = sum((one >= max(3.0, np.quantile(one, 0.25))).sum() for one in confidence)
    assert count_points(tmp_path, frames, min_confidence=3.0, confidence_quantile=0.25) == both


def test_unknown_depth_gives_no_points(tmp_path):
    frame = next(frames_of(1))
    frame["depth"][:3] = np.array([0, np.nan, -1])[:, None]
    frame["confidence"][3] = np.nan
    recorder = record(tmp_path, [frame], point_options=PointOptions(voxel=1e-4, stride=1))
    assert len(recorder.cloud) == (HEIGHT - 4) * WIDTH
    assert (cv2.imread(str(tmp_path / "depth/000000.png"), cv2.IMREAD_UNCHANGED)[:3] == 0).all()


def test_frames_without_confidence_are_recorded(tmp_path):
    frames = [frame | {"confidence": None} for frame in frames_of(2)]
    record(tmp_path, frames)
    assert set(load_file(tmp_path / "depth/000000-000001.safetensors")) == {"depth", "index", "time"}
    with pytest.raises(ReconstructionError, match="min_confidence, confidence_quantile"):
        record(tmp_path, frames, point_options=PointOptions(min_confidence=2.0))
    with pytest.raises(ReconstructionError, match="some frames only"):
        record(tmp_path, [frames[0], list(frames_of(2))[1]])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"index": 1}, "above the last one's, 1"),
        ({"depth": np.ones((HEIGHT, WIDTH + 1), np.float32)}, "depth"),
        ({"image": np.zeros((HEIGHT, WIDTH, 3))}, "uint8"),
        ({"image": np.zeros((HEIGHT, WIDTH, 4), np.uint8)}, "image"),
        ({"confidence": np.ones(WIDTH)}, "confidence"),
        ({"cam_to_world": np.eye(3)}, "cam_to_world"),
        ({"cam_to_world": np.full((4, 4), np.nan)}, "not finite"),
        ({"cam_to_world": np.diag([1, 1, -1, 1.0])}, "rotation"),
        ({"intrinsics": -np.eye(3)}, "focal"),
        ({"time": np.inf}, "not finite"),
    ],
)
def test_a_frame_that_does_not_fit_is_named_and_leaves_no_trace(tmp_path, change, named):
    frames = list(frames_of(3))
    with pytest.raises(ReconstructionError, match=named) as caught:
        record(tmp_path, [*frames[:2], frames[2] | change])
    assert str(caught.value).startswith(f"{tmp_path}, frame {change.get('index', 2)}: ")
    assert len(read_tum_trajectory_file(str(tmp_path / "trajectory.txt")).timestamps) == 2
    assert len(json.loads((tmp_path / "intrinsics.json").read_text())["intrinsics"]) == 2
    assert len(load_file(tmp_path / "depth/000000-000001.safetensors")["depth"]) == 2
    assert (tmp_path / "points.ply").exists()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"metres_per_unit": 0.0}, "metres_per_unit"),
        ({"metres_per_unit": np.nan}, "metres_per_unit"),
        ({"shard_frames": 0}, "shard_frames"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, options, field):
    with pytest.raises(DataError, match=f"^{field}"):
        ReconstructionRecorder(tmp_path, **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("voxel", 0),
        ("max_points", 7),
        ("min_confidence", -1),
        ("confidence_quantile", 1.0),
        ("every", 0),
        ("stride", 0),
    ],
)
def test_point_options_out_of_range_are_named(field, value):
    with pytest.raises(DataError, match=f"^{field}"):
        PointOptions(**{field: value})


def test_without_frames_nothing_is_written(tmp_path):
    recorder = record(tmp_path / "out", [])
    assert recorder.files == []
    assert not (tmp_path / "out").exists()
    with pytest.raises(ReconstructionError, match="closed"):
        recorder.add(**next(frames_of(1)))


def test_a_first_frame_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ReconstructionError, match=r"000000.png: cannot be written .*No space left"):
        record(tmp_path, frames_of(1))
    assert names_in(tmp_path) == []


def test_an_earlier_recording_is_replaced_and_other_files_are_left(tmp_path):
    record(tmp_path, frames_of(9), shard_frames=4)
    for name in ("depth/notes.txt", "depth/7.png", "features.mp4"):
        (tmp_path / name).write_text("a person's")
    record(tmp_path, frames_of(2), depth_tensors=False, points=False)
    expected = ["depth/000000.png", "depth/000001.png", "depth/7.png", "depth/notes.txt"]
    assert names_in(tmp_path) == [*expected, "features.mp4", "intrinsics.json", "trajectory.txt"]


def test_an_interrupted_close_leaves_no_half_file_and_closes_the_rest(tmp_path, monkeypatch):
    """The points cannot be written to the end; everything else is complete, and there is no points.ply."""

    class Interrupted(str):
        def format(self, **_):
            raise KeyboardInterrupt  # the file is open, nothing of it is written

    monkeypatch.setattr(files, "_PLY_HEADER", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, frames_of(3))
    shard = "depth/000000-000002.safetensors"
    pictures = [f"depth/{index:06d}.png" for index in range(3)]
    assert names_in(tmp_path) == sorted([*pictures, shard, "intrinsics.json", "trajectory.txt"])
    assert load_file(tmp_path / shard)["depth"].shape == (3, HEIGHT, WIDTH)
    assert len(read_tum_trajectory_file(str(tmp_path / "trajectory.txt")).timestamps) == 3


def test_a_killed_process_leaves_what_it_had(tmp_path):
    program = (
        "import os, signal, numpy as np\n"
        "from omnistream_jax.reconstruction.recorder import ReconstructionRecorder\n"
        f"recorder = ReconstructionRecorder({str(tmp_path)!r}, shard_frames=2)\n"
        "one = np.ones((4, 6), np.float32)\n"
        "for i in range(5):\n"
        "    recorder.add(i, i / 30, np.zeros((4, 6, 3), np.uint8), one, one, np.eye(4), np.eye(3))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pictures = [f"depth/{index:06d}.png" for index in range(5)]
    shards = ["depth/000000-000001.safetensors", "depth/000002-000003.safetensors"]
    assert names_in(tmp_path) == sorted([*pictures, *shards, "intrinsics.json.tmp", "trajectory.txt.tmp"])
    assert len(read_tum_trajectory_file(str(tmp_path / "trajectory.txt.tmp")).timestamps) == 5
    mended = json.loads((tmp_path / "intrinsics.json.tmp").read_text() + "]}")
    assert np.shape(mended["intrinsics"]) == (5, 3, 3)
    assert load_file(tmp_path / shards[1])["index"].tolist() == [2, 3]


def test_a_shard_is_all_that_is_held_of_depth(tmp_path):
    """Recording 40 frames holds no more than recording 8: shards of 4 frames, one is kept."""

    def peak(count):
        frame = next(frames_of(1))
        frame |= {name: np.ones((240, 320), np.float32) for name in ("depth", "confidence")}
        frame["image"] = np.zeros((240, 320, 3), np.uint8)
        tracemalloc.start()
        record(tmp_path, (frame | {"index": index} for index in range(count)), shard_frames=4)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(40) < 1.1 * peak(8)
