"""The evaluation job of streaming geometry as a whole: numbers, files, resuming, refusals."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_model
from benchmark_trees import (
    DRIVE,
    FRAMES,
    LONG_SIDE,
    SCENES,
    TUM,
    folder_of,
    opened,
    world_scenes,
    write_scannet,
    write_sintel,
    write_trees,
)
from PIL import Image

from omnistream_jax import config as config_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.benchmarks.preprocess import prepare_frames
from omnistream_jax.data.benchmarks.registry import OPENERS
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.depth_metrics import sequence_depth_metrics
from omnistream_jax.evals.geometry_stream import SequenceStreamer
from omnistream_jax.evals.geometry_table import geometry_table
from omnistream_jax.evals.pose_metrics import trajectory_metrics
from omnistream_jax.evaluate import evaluate
from omnistream_jax.geometry_model import build_geometry_model
from omnistream_jax.models.geometry import GeometryHeads, geometry_config
from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError

pytestmark = pytest.mark.usefixtures("quick_compilation")
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = str(REPOSITORY / "configs" / "evaluate_geometry.py")


@pytest.fixture(scope="module")
def clips():
    return world_scenes()


@pytest.fixture(scope="module")
def trees(clips, tmp_path_factory):
    return write_trees(tmp_path_factory.mktemp("benchmarks"), clips)


# The model as a predictor


@pytest.fixture(scope="module")
def model():
    """Two tiny blocks and small heads, every parameter random."""
    backbone = random_model()
    config = geometry_config(2, (0, 0, 1, 1), features=8, out_channels=(8, 8, 8, 8))
    heads = GeometryHeads(config, backbone.config.width, 16)
    hidden, camera = [np.zeros((1, 1, 7, 32), np.float32)] * 4, np.zeros((1, 1, 32), np.float32)
    init = functools.partial(heads.init, height=16, width=16)
    shapes = jax.eval_shape(init, jax.random.key(0), hidden, camera)["params"]
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        values = generator.normal(size=leaf.shape).astype(np.float32)
        if "kernel" in path[-1].key:
            return jnp.asarray(values * np.prod(leaf.shape[:-1]) ** -0.5)
        return jnp.asarray(0.1 * values + ("scale" in path[-1].key))

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return build_geometry_model(backbone, config, params)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model.save(directory)
    return directory


@pytest.mark.parametrize("pose_source", ["camera", "rays"])
def test_a_sequence_is_one_stream_that_equals_the_whole_clip(model, clips, pose_source):
    frames = prepare_frames(clips[0].images, LONG_SIDE)
    streamer = SequenceStreamer(model, time_unit=3.0, frames_per_step=2, pose_source=pose_source)
    whole = model.reconstruct(frames[None], time_unit=3.0)
    poses = whole.cam_to_world if pose_source == "camera" else whole.cameras_from_rays()[0]
    actual = streamer.cam_to_world(frames)
    assert actual.shape == (FRAMES, 4, 4)
    np.testing.assert_allclose(actual, poses[0], atol=2e-3)
    if pose_source == "camera":
        np.testing.assert_allclose(streamer.depth(frames), whole.depth[0], rtol=1e-3)
        other = SequenceStreamer(model, frames_per_step=2).depth(frames)
        assert np.abs(other - whole.depth[0]).max() > 1e-3  # by the model's own time unit


# The job


@pytest.fixture(scope="module")
def config_for(checkpoint, trees):
    def make(output, benchmarks=("sintel_depth", "tum_pose"), **changes):
        fields = {"checkpoint": str(checkpoint), "output": str(output), "long_side": LONG_SIDE, "frames_per_step": 2}
        chosen = {f"benchmarks.{name}": str(trees / folder_of(name)) for name in benchmarks}
        return config_lib.load(CONFIG, fields | chosen | {"allow_incomplete": True} | changes)

    return make


@pytest.fixture(scope="module")
def finished(config_for, tmp_path_factory):
    """The output of a run on all six, and what it said, through the command line."""
    output = tmp_path_factory.mktemp("evaluation")
    return output, command(config_for(output, tuple(OPENERS)))


def command(config):
    flat = {name: value for name, value in config.items() if name not in ("job", "name", "benchmarks")}
    flat |= {f"benchmarks.{name}": folder for name, folder in config.benchmarks.items()}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    return subprocess.run(
        [sys.executable, "-m", "omnistream_jax.main", f"--config={CONFIG}"]
        + [f"--config.{name}={value}" for name, value in flat.items()],
        cwd=REPOSITORY,
        env=os.environ | cache,
        capture_output=True,
        text=True,
        timeout=900,  # beside other work
    )


def summary(output):
    return json.loads((output / "geometry.json").read_text())


def test_the_config_names_every_benchmark():
    assert set(config_lib.load(CONFIG).benchmarks) == set(OPENERS)


def test_the_command_scores_all_benchmarks(finished, model, trees):
    output, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = summary(output)["benchmarks"]
    assert list(benchmarks) == list(OPENERS)
    assert list(benchmarks["bonn_depth"]["sequences"]) == ["balloon2", "crowd2"]
    assert benchmarks["kitti_depth"]["sequences"].keys() == {DRIVE}
    assert benchmarks["tum_pose"]["sequences"].keys() == {TUM}
    streamer = SequenceStreamer(model, frames_per_step=2)
    for name in ("sintel_depth", "scannet_pose"):
        benchmark = opened(name, trees / folder_of(name))
        for sequence in benchmark.sequences:
            scored = benchmarks[name]["sequences"][sequence.name]
            assert scored["frames"] == FRAMES
            frames = sequence.frames(benchmark.mode, LONG_SIDE)
            if name == "sintel_depth":
                truth = np.stack([sequence.depth(place) for place in range(FRAMES)])
                limits = {"max_depth": 70.0, "clip_prediction": 70.0}
                expected = sequence_depth_metrics(streamer.depth(frames), truth, align="scale", **limits)
                assert scored["metrics"]["abs_rel"] == pytest.approx(expected.abs_rel, rel=1e-6)
            else:
                expected = trajectory_metrics(streamer.cam_to_world(frames), sequence.cam_to_world)
                assert scored["metrics"]["ate"] == pytest.approx(expected.ate, rel=1e-6)
    means = [row["metrics"]["ate"] for row in benchmarks["scannet_pose"]["sequences"].values()]
    assert benchmarks["scannet_pose"]["aggregate"]["ate"] == pytest.approx(np.mean(means))


def test_the_summary_holds_every_setting(finished, config_for, checkpoint):
    content = summary(finished[0])
    assert content["config"] == config_lib.to_plain(config_for(finished[0], tuple(OPENERS)))
    assert content["config"]["checkpoint"] == str(checkpoint)
    assert content["settings"].items() >= {"align": "scale", "time_unit": 16.0, "compute_dtype": "float32"}.items()
    assert len(content["settings"]["model"]) == 64
    assert set(content["versions"]) >= {"omnistream_jax", "jax"}
    counts = content["benchmarks"]["kitti_depth"]["data"]["counts"]
    assert (counts["sequences"], counts["frames"], counts["complete"]) == (1, FRAMES, False)


def test_the_table_and_the_pictures(finished):
    output, done = finished
    content = summary(output)["benchmarks"]
    aggregate = content["bonn_depth"]["aggregate"]
    lines = [line.split() for line in done.stdout.splitlines()]
    numbers = [f"{aggregate['abs_rel']:.4f}", f"{100 * aggregate['delta_1']:.2f}"]
    assert ["bonn_depth", "2", "of", "5", "10", "of", "550", *numbers] in lines
    aggregate = content["tum_pose"]["aggregate"]
    numbers = [f"{aggregate[name]:.4f}" for name in ("ate", "rpe_translation", "rpe_rotation")]
    assert ["tum_pose", "1", "of", "8", "5", "of", "720", *numbers] in lines
    assert "kitti_depth: incomplete, not to be compared with published numbers" in done.stdout
    assert "CUT3R" not in done.stdout
    pictures = sorted(path.relative_to(output / "plots") for path in output.rglob("*.png"))
    assert pictures == sorted(
        Path(name) / f"{sequence}.png" for name, each in content.items() for sequence in each["sequences"]
    )
    for path in pictures:
        picture = Image.open(output / "plots" / path).convert("RGB")
        assert min(picture.size) > 150
        assert len(picture.reduce(4).getcolors(1 << 20)) > 20
    assert not list(output.rglob("*.tmp*"))


def test_published_numbers_stand_beside_complete_benchmarks_alone():
    counts = {"sequences": 5, "expected_sequences": 5, "frames": 550, "expected_frames": 550, "complete": True}
    content = {
        "data": {"task": "depth", "counts": counts},
        "aggregate": {"abs_rel": 0.1, "delta_1": 0.9},
        "problem": None,
    }
    assert "0.078      93.7" in geometry_table({"bonn_depth": content}, "scale")
    assert "CUT3R" not in geometry_table({"bonn_depth": content}, "metric")


def test_a_rerun_does_what_is_missing(finished, config_for, trees, tmp_path, monkeypatch):
    asked, depth = [], SequenceStreamer.depth

    def spy(self, frames):
        asked.append(len(frames))
        return depth(self, frames)

    config = config_for(tmp_path, ("sintel_depth",))
    for name in ("results", "plots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sintel_depth").symlink_to(finished[0] / name / "sintel_depth")
    monkeypatch.setattr(SequenceStreamer, "depth", spy)
    assert evaluate(config) == 0
    assert asked == []  # what stood there is taken
    assert summary(tmp_path)["benchmarks"]["sintel_depth"] == summary(finished[0])["benchmarks"]["sintel_depth"]

    config = config_for(tmp_path / "own", ("sintel_depth",))
    assert evaluate(config) == 0
    before = summary(tmp_path / "own")["benchmarks"]["sintel_depth"]["aggregate"]
    (tmp_path / "own/results/sintel_depth/alley_2.json").write_text('{"key"')
    (tmp_path / "own/plots/sintel_depth/ambush_4.png").unlink()
    asked.clear()
    assert evaluate(config) == 0
    assert asked == [FRAMES, FRAMES]
    (tmp_path / "own/results/sintel_depth/alley_2.json").unlink()
    assert evaluate(config) == 0
    assert evaluate(config) == 0
    assert asked == [FRAMES] * 3
    assert summary(tmp_path / "own")["benchmarks"]["sintel_depth"]["aggregate"] == before


def test_other_data_under_an_old_name_are_scored_anew(config_for, clips, tmp_path):
    write_sintel(tmp_path / "data", "alley_2", clips[0].images, clips[0].depth, clips[0].cam_to_world)
    fields = {"benchmarks.sintel_depth": str(tmp_path / "data"), "plots": False}
    assert evaluate(config_for(tmp_path / "out", (), **fields)) == 0
    assert not (tmp_path / "out" / "plots").exists()
    write_sintel(tmp_path / "data", "alley_2", clips[1].images, clips[1].depth, clips[1].cam_to_world)
    first = summary(tmp_path / "out")["benchmarks"]["sintel_depth"]["aggregate"]
    assert evaluate(config_for(tmp_path / "out", (), **fields)) == 0
    assert summary(tmp_path / "out")["benchmarks"]["sintel_depth"]["aggregate"] != first


def test_other_settings_and_another_model_are_refused(finished, config_for, model, tmp_path):
    before = (finished[0] / "geometry.json").read_bytes()
    with pytest.raises(ConfigError, match=r'other settings.*\n  align: "scale" -> "scale&shift"\n  window: 0 -> 4'):
        evaluate(config_for(finished[0], align="scale&shift", window=4))
    other = build_geometry_model(model.model, model.heads.config, jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    other.save(tmp_path)
    with pytest.raises(ConfigError, match=r"other settings.*\n  model: "):
        evaluate(config_for(finished[0], checkpoint=str(tmp_path)))
    assert (finished[0] / "geometry.json").read_bytes() == before


def test_a_missing_sequence_stops_before_anything_is_computed(config_for, tmp_path):
    done = command(config_for(tmp_path / "out", allow_incomplete=False, checkpoint="/nowhere"))
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "sintel_depth is not as published: 2 of 23 sequences, 10 of 1,064 frames (alley_1: 0 of 50" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_trajectory_that_cannot_be_scored_is_told_and_fails(config_for, clips, tmp_path, capsys):
    write_scannet(tmp_path, SCENES[0], clips[0].images, np.tile(np.eye(4), (FRAMES, 1, 1)))
    write_scannet(tmp_path, SCENES[1], clips[1].images, clips[1].cam_to_world)
    assert evaluate(config_for(tmp_path / "out", (), **{"benchmarks.scannet_pose": str(tmp_path)})) == 1
    content = summary(tmp_path / "out")["benchmarks"]["scannet_pose"]
    assert content["aggregate"] is None
    assert "degenerate" in content["sequences"][SCENES[0]]["problem"]
    assert content["sequences"][SCENES[1]]["metrics"]["ate"] > 0
    assert f"scannet_pose: 1 of 2 sequences have no score: {SCENES[0]}: degenerate" in capsys.readouterr().out


def test_a_second_run_into_one_directory_is_refused(config_for, tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(WorkdirLockedError):
        evaluate(config_for(tmp_path))


def test_plots_without_matplotlib_are_refused_by_what_to_install(config_for, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"plots: matplotlib is missing; pip install -e '\.\[eval\]'"):
        evaluate(config_for(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": ""}, ConfigError, "output: expected a directory"),
        ({"checkpoint": ""}, ConfigError, "checkpoint: expected a directory"),
        ({"checkpoint": "/nowhere/model"}, WeightsError, "/nowhere/model: no such directory"),
        ({"benchmarks": ()}, ConfigError, "benchmarks: none has a folder"),
        ({"benchmarks.bonn_depth": "/nowhere"}, DataError, "/nowhere: there is no such folder"),
        ({"align": "median"}, ConfigError, "align: expected one of scale, scale&shift, metric, got 'median'"),
        ({"align": "metric"}, ConfigError, "align: metric needs a model in metres"),
        ({"pose_source": "head"}, ConfigError, "pose_source: expected one of camera, rays, got 'head'"),
        ({"long_side": 15}, ConfigError, "long_side: expected a patch of 16 pixels or more, got 15"),
        ({"window": -1}, ConfigError, "window: .*-1"),
        ({"window": 1}, ConfigError, "window: 1 frames cannot hold 1 sinks"),
        ({"sinks": -1}, ConfigError, "sinks: .*-1"),
        ({"time_unit": -2.0}, ConfigError, "time_unit: expected a positive number of frames, got -2"),
        ({"frames_per_step": 0}, ConfigError, "frames_per_step: expected 1 or more, got 0"),
        ({"compute_dtype": "int8"}, ConfigError, "^compute_dtype: .*int8"),
    ],
)
def test_a_field_that_cannot_work_is_one_clear_error(config_for, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate(config_for(**{"output": tmp_path / "out"} | changes))
    assert not (tmp_path / "out").exists()
