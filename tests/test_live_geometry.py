"""The live job with geometry: files that others' tools read, pictures, counts, and memory that stays as it is."""

import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from backbone_cases import random_model
from clip_cases import decode_plainly, real_frames, write_clip
from evo.tools.file_interface import read_tum_trajectory_file
from geometry_model_cases import random_geometry_model
from goldens import relative_error
from live_cases import CONFIG, assert_rerun_verifies, recorded, summary_of, video_frames
from PIL import Image
from plyfile import PlyData
from safetensors.numpy import load_file

import omnistream_jax
from omnistream_jax import config as config_lib
from omnistream_jax import live, live_view
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.picture import colour_depth
from omnistream_jax.live_rerun import CameraPath
from omnistream_jax.live_result import Geometry
from omnistream_jax.live_view import RunningLimits
from omnistream_jax.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")
HEIGHT, WIDTH, FRAMES = 32, 48, 10
METRES, VOXEL = 2.0, 0.1
SMALL = {
    **{"height": HEIGHT, "width": WIDTH, "resize": "stretch", "window": 16, "pca_frames": 3},
    "geometry.enabled": True,
    "geometry.metres_per_unit": METRES,
    "geometry.shard_frames": 4,
    "geometry.shown_every": 4,
    "geometry.shown_points": 50,
    "geometry.point_options.voxel": VOXEL,
}
WRITTEN = ["depth", "trajectory.txt", "intrinsics.json", "points.ply"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", real_frames(2, 40)[:FRAMES])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_geometry_model().save(directory)
    return directory


@pytest.fixture(scope="module")
def config_for(clip, checkpoint):
    def make(output, changes=None):
        fields = {"input": str(clip), "output": str(output), "checkpoint": str(checkpoint)}
        return config_lib.load(CONFIG, fields | SMALL | (changes or {}))

    return make


def run(config):
    """The results that a run showed, and its lines."""
    results, lines, show = [], [], live_view.Drawing.show
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "_say", lambda line: lines.extend(line.splitlines()))
        patch.setattr(live_view.Drawing, "show", lambda self, result: (results.append(result), show(self, result)))
        live.stream(config)
    return results, lines


@pytest.fixture(scope="module")
def shown(config_for, tmp_path_factory):
    """One undisturbed run: its directory, the results that it showed, and its lines."""
    output = tmp_path_factory.mktemp("shown")
    return output, *run(config_for(output))


@pytest.fixture(scope="module")
def expected(clip, checkpoint):
    """The stream's geometry in the model's units, by the model alone: frames, then fields [T, ...]."""
    frames, _ = decode_plainly(clip, HEIGHT, WIDTH)
    model, parts = omnistream_jax.load_geometry(checkpoint), []
    stream = model.open_stream(1, HEIGHT, WIDTH, window=16)
    for frame in frames:
        geometry, _, stream = model.step(stream, frame[None, None])
        parts.append(jax.device_get((geometry, geometry.cameras_from_rays())))
    return frames, *jax.tree.map(lambda *leaves: np.concatenate([leaf[0] for leaf in leaves]), *parts)


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# What is written


def test_the_geometry_is_the_models_own_in_metres(shown, expected):
    _, results, _ = shown
    frames, geometry, _ = expected
    assert len(results) == FRAMES
    np.testing.assert_array_equal(np.stack([result.frame.pixels for result in results]), frames)
    found = {
        name: np.stack([getattr(result.geometry, name) for result in results]) for name in vars(results[0].geometry)
    }
    assert relative_error(found["depth"], METRES * geometry.depth) <= 1e-5
    assert relative_error(found["confidence"], geometry.depth_confidence) <= 1e-5
    assert relative_error(found["intrinsics"], geometry.intrinsics) <= 1e-5
    assert relative_error(found["cam_to_world"][:, :3, 3], METRES * geometry.cam_to_world[:, :3, 3]) <= 1e-5
    assert relative_error(found["cam_to_world"][:, :3, :3], geometry.cam_to_world[:, :3, :3]) <= 1e-5


def test_every_file_is_there_and_nothing_is_left_aside(shown):
    output = shown[0]
    depth = [f"depth/{index:06d}.png" for index in range(FRAMES)]
    depth += [f"depth/{first:06d}-{last:06d}.safetensors" for first, last in ((0, 3), (4, 7), (8, 9))]
    others = ["trajectory.txt", "intrinsics.json", "points.ply", "stream.rrd", "features.mp4", "summary.json", ".lock"]
    assert names_in(output) == sorted([*depth, *others])


def test_pillow_and_safetensors_read_the_depth(shown, expected):
    output, results, _ = shown
    shards = [load_file(path) for path in sorted((output / "depth").glob("*.safetensors"))]
    tensors = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    depth = METRES * expected[1].depth
    assert relative_error(tensors["depth"], depth) <= 1e-5
    assert relative_error(tensors["confidence"], expected[1].depth_confidence) <= 1e-5
    assert tensors["index"].tolist() == list(range(FRAMES))
    np.testing.assert_allclose(tensors["time"], [result.frame.time for result in results])
    for index in range(FRAMES):
        with Image.open(output / "depth" / f"{index:06d}.png") as picture:
            assert picture.mode == "I;16"
            assert np.abs(np.asarray(picture) - 1000 * depth[index]).max() <= 0.51


def test_evo_reads_the_trajectory_and_json_the_intrinsics(shown, expected):
    output, results, _ = shown
    trajectory, geometry = read_tum_trajectory_file(output / "trajectory.txt"), expected[1]
    np.testing.assert_allclose(trajectory.timestamps, [result.frame.time for result in results])
    poses = np.stack(trajectory.poses_se3)
    assert relative_error(poses[:, :3, 3], METRES * geometry.cam_to_world[:, :3, 3]) <= 1e-5
    assert relative_error(poses[:, :3, :3], geometry.cam_to_world[:, :3, :3]) <= 1e-5
    content = json.loads((output / "intrinsics.json").read_text())
    assert (content["height"], content["width"]) == (HEIGHT, WIDTH)
    assert relative_error(np.array(content["intrinsics"]), geometry.intrinsics) <= 1e-5


def points_of(geometry) -> np.ndarray:
    """Every second row and column of all frames, in metres, pixel by pixel from the definition."""
    v, u = np.meshgrid(np.arange(0, HEIGHT, 2) + 0.5, np.arange(0, WIDTH, 2) + 0.5, indexing="ij")
    points = []
    for depth, pose, matrix in zip(geometry.depth, geometry.cam_to_world, geometry.intrinsics, strict=True):
        z = depth[::2, ::2].astype(np.float64)
        x, y = (u - matrix[0, 2]) / matrix[0, 0] * z, (v - matrix[1, 2]) / matrix[1, 1] * z
        camera = np.stack([x, y, z], -1).reshape(-1, 3)
        points.append(camera @ pose[:3, :3].T.astype(np.float64) + pose[:3, 3])
    return METRES * np.concatenate(points)


def test_plyfile_reads_one_point_a_voxel(shown, expected):
    vertices = PlyData.read(shown[0] / "points.ply")["vertex"]
    found = np.stack([vertices[name] for name in "xyz"], -1)
    voxels = np.floor(points_of(expected[1]) / VOXEL)
    # A rounding may carry a point over to the next voxel.
    assert abs(len(found) - len(np.unique(voxels, axis=0))) <= 2
    assert len(found) == summary_of(shown[0])["geometry"]["points"] > 100
    own = {tuple(voxel) for voxel in voxels}
    assert np.mean([tuple(voxel) in own for voxel in np.floor(found / VOXEL)]) > 0.98
    colours = np.stack([vertices[name] for name in ("red", "green", "blue")], -1)
    pixels = expected[0][:, ::2, ::2].reshape(-1, 3)
    assert np.abs(colours.mean(0) - pixels.mean(0)).max() < 30
    assert (colours.min(0) >= pixels.min(0)).all()
    assert (colours.max(0) <= pixels.max(0)).all()


def test_the_summary_and_its_lines_tell_the_geometry(shown):
    output, _, lines = shown
    summary = summary_of(output)
    assert (summary["ended"], summary["frames"]) == ("end of the input", FRAMES)
    assert summary["files"] == [live_view.RECORDING, live_view.VIDEO, *WRITTEN]
    points = summary["geometry"]["points"]
    assert summary["geometry"] == {
        "units": "clip",
        "metres_per_unit": METRES,
        "points": points,
        "voxel": VOXEL,
        "unusable": 0,
        "too_far": 0,
    }
    assert f"geometry           {points:,} points in voxels of 0.1 m; a unit is taken as 2 m, the clip's own" in lines
    assert lines[-len(WRITTEN) - 1 :] == [str(output / name) for name in (*WRITTEN, live.SUMMARY)]


def test_nothing_is_compiled_once_frames_come(shown):
    output, _, lines = shown
    assert int(re.match(r"compiled (\d+) program", lines[0])[1]) == summary_of(output)["compiled"]["programs"] > 0


# What is shown


def test_the_recording_holds_depth_camera_path_and_points(shown, expected):
    output, results, _ = shown
    path = output / live_view.RECORDING
    every = list(range(FRAMES))
    indices, _, pictures = recorded(path, "/world/camera/depth", "DepthImage:buffer")
    assert indices == every
    for picture, depth in zip(pictures, METRES * expected[1].depth, strict=True):
        found = np.array(picture, np.uint8).view(np.float16).reshape(HEIGHT, WIDTH)
        assert relative_error(found, depth) <= 1e-3
    _, _, ranges = recorded(path, "/world/camera/depth", "DepthImage:depth_range")
    running = RunningLimits()
    assert np.allclose(ranges, [running.follow(result.geometry) for result in results])

    indices, _, places = recorded(path, "/world/camera", "Transform3D:translation")
    assert indices == every
    expected_places = np.stack([result.geometry.cam_to_world[:3, 3] for result in results])
    np.testing.assert_allclose(places, expected_places, rtol=1e-6)
    rotations = np.array(recorded(path, "/world/camera", "Transform3D:mat3x3")[2]).reshape(-1, 3, 3)
    for rotation, result in zip(rotations, results, strict=True):  # Rerun's columns come one after the other
        np.testing.assert_allclose(rotation.T, result.geometry.cam_to_world[:3, :3], rtol=1e-6)
    matrices = np.array(recorded(path, "/world/camera", "Pinhole:image_from_camera")[2]).reshape(-1, 3, 3)
    for matrix, result in zip(matrices, results, strict=True):
        np.testing.assert_allclose(matrix.T, result.geometry.intrinsics, rtol=1e-6)
    assert recorded(path, "/world/camera", "Pinhole:resolution")[2] == [[WIDTH, HEIGHT]] * FRAMES

    indices, _, strips = recorded(path, "/world/path", "LineStrips3D:strips")
    assert indices == every
    for index, strip in enumerate(strips):
        np.testing.assert_allclose(strip, expected_places[: index + 1], rtol=1e-6)


def test_the_recorded_points_grow_and_are_chosen_by_chance(shown):
    output, results, _ = shown
    chunks = pytest.importorskip("rerun.chunk").RrdReader(output / live_view.RECORDING).stream()
    rows = {}
    for chunk in chunks:
        if chunk.entity_path == "/world/points":
            batch = chunk.to_record_batch()
            columns = (batch.column(name).to_pylist() for name in ("frame", "Points3D:positions"))
            rows |= dict(zip(*columns, strict=True))
    assert sorted(rows) == [0, 4, 8, FRAMES - 1], "every fourth frame, and the last"
    assert [len(rows[index]) for index in sorted(rows)] == [50] * 4
    assert [result.index for result in results if result.points is not None] == [0, 4, 8]
    vertices = PlyData.read(output / "points.ply")["vertex"]
    final = {tuple(vertex) for vertex in np.stack([vertices[name] for name in "xyz"], -1).tolist()}
    assert {tuple(point) for point in rows[FRAMES - 1]} <= final
    assert not {tuple(point) for point in rows[0]} <= final


def test_the_recording_passes_the_check_of_its_own_tool(shown):
    assert_rerun_verifies(shown[0] / live_view.RECORDING)


def test_the_video_shows_frames_features_and_depth(shown):
    output, results, _ = shown
    frames, times = video_frames(output / live_view.VIDEO)
    assert frames.shape == (FRAMES, HEIGHT, 3 * WIDTH, 3)
    np.testing.assert_allclose(times, [result.frame.time for result in results], atol=1e-3)
    limits = RunningLimits()
    for frame, result in zip(frames.astype(float), results, strict=True):
        assert np.abs(frame[:, :WIDTH] - result.frame.pixels).mean() < 10
        colours = colour_depth(result.geometry.depth, limits.follow(result.geometry)).astype(float)
        seen = frame[:, 2 * WIDTH :]
        # Video halves the resolution of colours.
        blocks = [picture.reshape(HEIGHT // 8, 8, WIDTH // 8, 8, 3).mean((1, 3)) for picture in (seen, colours)]
        assert np.abs(blocks[0] - blocks[1]).mean() < 15
        assert np.corrcoef(blocks[0].ravel(), blocks[1].ravel())[0, 1] > 0.9


def geometry_of(depth):
    return Geometry(np.asarray(depth, np.float32), np.ones_like(depth), np.eye(4), np.eye(3))


def test_the_limits_of_depth_colours_follow_slowly_and_pass_over_what_is_not_known():
    limits, near = RunningLimits(), np.linspace(1, 2, 101).reshape(1, -1)
    assert limits.follow(geometry_of(np.full((1, 3), np.nan))) is None
    first = limits.follow(geometry_of(near))
    assert first == pytest.approx((1.02, 1.98), rel=1e-5)
    unknown = np.array([[np.inf, 0, -1, np.nan]])
    assert limits.follow(geometry_of(unknown)) == pytest.approx(first)
    second = limits.follow(geometry_of(10 * near))
    assert second == pytest.approx((1.02 * 10**0.05, 1.98 * 10**0.05), rel=1e-5)
    for _ in range(200):
        last = limits.follow(geometry_of(10 * near))
    assert last == pytest.approx((10.2, 19.8), rel=1e-3)


@pytest.mark.parametrize("longest", [2, 5, 8])
def test_the_drawn_path_has_both_ends_and_stays_short(longest):
    path, places = CameraPath(longest), np.arange(300).reshape(100, 3)
    for index, place in enumerate(places):
        drawn = path.add(place)
        assert len(drawn) <= longest
        assert drawn[0].tolist() == places[0].tolist()
        assert drawn[-1].tolist() == place.tolist()
        steps = np.diff(drawn[:, 0])[:-1]
        assert (steps == steps[:1]).all(), "evenly thinned"
        assert len(drawn) > index or len(drawn) >= longest // 2


# Choices


def test_cameras_solved_from_rays_and_files_left_out(config_for, expected, tmp_path):
    off = dict.fromkeys(("depth_png", "depth_tensors", "points"), False)
    changes = {f"geometry.{name}": value for name, value in (off | {"pose_source": "rays"}).items()}
    results, lines = run(config_for(tmp_path, changes | {"record": False, "video": False}))
    poses, intrinsics = expected[2]
    assert relative_error(np.stack([result.geometry.intrinsics for result in results]), intrinsics) <= 1e-5
    trajectory = read_tum_trajectory_file(tmp_path / "trajectory.txt")
    assert relative_error(trajectory.positions_xyz, METRES * poses[:, :3, 3]) <= 1e-5
    assert relative_error(poses, expected[1].cam_to_world) > 0.1
    assert names_in(tmp_path) == [".lock", "intrinsics.json", "summary.json", "trajectory.txt"]
    summary = summary_of(tmp_path)
    assert summary["files"] == ["trajectory.txt", "intrinsics.json"]
    assert summary["geometry"]["points"] is summary["geometry"]["voxel"] is None
    assert int(re.match(r"compiled (\d+) program", lines[0])[1]) == summary["compiled"]["programs"]


def test_the_point_options_and_the_bound_are_kept(config_for, tmp_path):
    options = {"voxel": 0.01, "max_points": 40, "every": 3, "stride": 4, "confidence_quantile": 0.5}
    changes = {f"geometry.point_options.{name}": value for name, value in options.items()}
    run(config_for(tmp_path, changes | {"record": False, "video": False, "geometry.depth_png": False}))
    found = summary_of(tmp_path)["geometry"]
    assert 8 <= found["points"] <= 40
    assert found["voxel"] in [0.01 * 2**power for power in range(2, 12)]
    assert len(PlyData.read(tmp_path / "points.ply")["vertex"]) == found["points"]


def test_a_checkpoint_with_geometry_streams_features_alone_where_nothing_else_is_asked_for(config_for, tmp_path):
    job = live.build(config_for(tmp_path, {"geometry.enabled": False}))
    assert type(job.model) is Model
    assert job.open_recording() is None
    assert job.open_stream().options.layers == ()


# Endings


def test_a_termination_signal_finishes_the_files(config_for, tmp_path, monkeypatch):
    show = live_view.Drawing.show

    def show_and_stop(self, result):
        show(self, result)
        if result.index == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(live_view.Drawing, "show", show_and_stop)
    live.stream(config_for(tmp_path))
    summary = summary_of(tmp_path)
    assert (summary["ended"], summary["frames"]) == ("stopped", 6)
    assert summary["files"] == [live_view.RECORDING, live_view.VIDEO, *WRITTEN]
    assert read_tum_trajectory_file(tmp_path / "trajectory.txt").num_poses == 6
    assert len(json.loads((tmp_path / "intrinsics.json").read_text())["intrinsics"]) == 6
    assert len(load_file(tmp_path / "depth" / "000004-000005.safetensors")["depth"]) == 2
    assert len(list((tmp_path / "depth").glob("*.png"))) == 6
    assert len(PlyData.read(tmp_path / "points.ply")["vertex"]) == summary["geometry"]["points"]
    assert len(video_frames(tmp_path / live_view.VIDEO)[0]) == 6
    assert not [name for name in names_in(tmp_path) if ".tmp" in name]


def test_a_stream_that_stops_before_its_first_frame_leaves_a_summary(config_for, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_warm_up", lambda job: os.kill(os.getpid(), signal.SIGINT))
    live.stream(config_for(tmp_path))
    summary = summary_of(tmp_path)
    assert (summary["frames"], summary["files"], summary["geometry"]["points"]) == (0, [], 0)
    assert names_in(tmp_path) == [".lock", "summary.json"]


def changed_checkpoint(directory, *names, value):
    """The model with one parameter set to a value everywhere."""
    model = random_geometry_model()
    node = model.params
    for name in names[:-1]:
        node = node[name]
    node[names[-1]] = np.broadcast_to(np.float32(value), node[names[-1]].shape)
    model.save(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("camera", "output", "bias"), [0, 0, 0, 0, 0, 0, 1, -90, -90], "frame 0: .*not finite"),
        (("dpt", "depth_output", "bias"), np.nan, "the depth of frame 0 is not a number"),
    ],
)
def test_a_camera_or_depth_that_is_none_is_one_clear_error(config_for, tmp_path, names, value, message):
    checkpoint = changed_checkpoint(tmp_path / "model", *names, value=value)
    with pytest.raises(live.LiveError, match=message):
        live.stream(config_for(tmp_path / "out", {"checkpoint": checkpoint}))
    summary = summary_of(tmp_path / "out")
    assert re.search(message, summary["ended"])
    assert (summary["frames"], summary["files"]) == (0, [])
    assert names_in(tmp_path / "out") == [".lock", "summary.json"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(config_for, tmp_path):
    (tmp_path / "depth").write_text("not a folder")
    with pytest.raises(live.LiveError, match=r"cannot be written"):
        live.stream(config_for(tmp_path))
    assert "cannot be written" in summary_of(tmp_path)["ended"]


# What cannot work


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pose_source", "gps"),
        ("metres_per_unit", 0.0),
        ("metres_per_unit", float("nan")),
        ("shard_frames", 0),
        ("shown_every", 0),
        ("shown_points", 0),
        ("point_options.voxel", -0.1),
        ("point_options.max_points", 7),
        ("point_options.min_confidence", -1.0),
        ("point_options.confidence_quantile", 1.0),
        ("point_options.every", 0),
        ("point_options.stride", 0),
    ],
)
def test_a_field_that_cannot_work_is_one_clear_error(config_for, tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"^geometry\.{field}: .*{re.escape(str(value))}"):
        live.stream(config_for(tmp_path / "out", {f"geometry.{field}": value}))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_geometry_heads_is_one_clear_error(config_for, tmp_path):
    random_model().save(tmp_path / "model")
    with pytest.raises(WeightsError, match=r"model: a backbone without geometry heads, expected geometry\.json in it"):
        live.stream(config_for(tmp_path / "out", {"checkpoint": str(tmp_path / "model")}))
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_leaves_the_geometry_of_what_came_before(config_for, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", real_frames(2, 40)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.mp4: .*damaged or truncated after frame"):
        live.stream(config_for(tmp_path / "out", {"input": str(cut)}))
    summary = summary_of(tmp_path / "out")
    assert 10 < summary["frames"] < 40
    assert read_tum_trajectory_file(tmp_path / "out" / "trajectory.txt").num_poses == summary["frames"]
    assert summary["files"][-4:] == WRITTEN
