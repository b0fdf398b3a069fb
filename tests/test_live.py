"""The live job: what is shown comes from the stream, latency stays bounded, files are whole however a run ends."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
from backbone_cases import random_model
from clip_cases import decode_plainly, real_frames, write_clip
from live_cases import (
    CONFIG,
    REPOSITORY,
    assert_rerun_verifies,
    command,
    environment,
    recorded,
    summary_of,
    video_frames,
)

import omnistream_jax
from omnistream_jax import config as config_lib
from omnistream_jax import live, live_view
from omnistream_jax import model as model_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.live_source import LiveOptions, find_source
from omnistream_jax.evals.pca import fit_colours
from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError

HEIGHT, WIDTH, FRAMES = 32, 48, 12
SMALL = {"height": HEIGHT, "width": WIDTH, "resize": "stretch", "window": 16, "pca_frames": 5}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", real_frames(0, 40)[:FRAMES])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_model().save(directory)
    return directory


@pytest.fixture(scope="module")
def config_for(clip, checkpoint):
    def make(output, **changes):
        fields = {"input": str(clip), "output": str(output), "checkpoint": str(checkpoint)}
        return config_lib.load(CONFIG, fields | SMALL | changes)

    return make


@pytest.fixture(scope="module")
def shown(config_for, tmp_path_factory):
    """One undisturbed run: its directory, and the results that it showed."""
    output, results = tmp_path_factory.mktemp("shown"), []
    with pytest.MonkeyPatch.context() as patch:
        show = live_view.Drawing.show
        patch.setattr(live_view.Drawing, "show", lambda self, result: (results.append(result), show(self, result)))
        live.stream(config_for(output))
    return output, results


@pytest.fixture
def slow_step(monkeypatch):
    """A model that takes 40 ms for a frame."""
    step = model_lib.Model.step

    def slow(self, stream, frames):
        time.sleep(0.04)
        return step(self, stream, frames)

    monkeypatch.setattr(model_lib.Model, "step", slow)


def options(**changes):
    return LiveOptions(**({"height": HEIGHT, "width": WIDTH, "resize": "stretch"} | changes))


# What is shown


def test_features_equal_those_of_encode_on_the_same_frames(shown, clip, checkpoint):
    _, results = shown
    frames, times = decode_plainly(clip, HEIGHT, WIDTH)
    assert len(results) == FRAMES
    np.testing.assert_array_equal(np.stack([result.frame.pixels for result in results]), frames)
    np.testing.assert_allclose([result.frame.time for result in results], times, atol=1e-6)
    expected = omnistream_jax.load(checkpoint).encode(frames[None], layers=()).patches[0]
    np.testing.assert_allclose(np.stack([result.patches for result in results]), expected, atol=2e-4)


def test_the_recording_holds_every_frame_with_the_colours_of_a_fixed_basis(shown):
    output, results = shown
    patches = np.stack([result.patches for result in results])
    colours = fit_colours(patches[: SMALL["pca_frames"]]).colours(patches)
    indices, times, pictures = recorded(output / live_view.RECORDING, "/features", "Image:buffer")
    assert indices == list(range(FRAMES))
    np.testing.assert_allclose(times, [result.frame.time for result in results], atol=1e-6)
    for picture, expected in zip(pictures, colours, strict=True):
        np.testing.assert_array_equal(np.array(picture, np.uint8).reshape(expected.shape), expected)

    _, _, images = recorded(output / live_view.RECORDING, "/image", "EncodedImage:blob")
    for image, result in zip(images, results, strict=True):
        with av.open(io.BytesIO(bytes(image)), format="mjpeg") as container:
            decoded = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
        assert np.abs(decoded - result.frame.pixels).mean() < 8
    _, _, steps = recorded(output / live_view.RECORDING, "/latency/step", "Scalars:scalars")
    np.testing.assert_allclose(steps, [1000 * result.step for result in results])
    assert recorded(output / live_view.RECORDING, "/dropped", "Scalars:scalars")[2] == [0.0] * FRAMES


def test_the_recording_passes_the_check_of_its_own_tool(shown):
    assert_rerun_verifies(shown[0] / live_view.RECORDING)


def test_the_video_shows_frames_and_colours_side_by_side(shown):
    output, results = shown
    frames, times = video_frames(output / live_view.VIDEO)
    assert frames.shape == (FRAMES, HEIGHT, 2 * WIDTH, 3)
    np.testing.assert_allclose(times, [result.frame.time for result in results], atol=1e-3)
    patches = np.stack([result.patches for result in results])
    colours = fit_colours(patches[: SMALL["pca_frames"]]).colours(patches)
    for frame, result, colour in zip(frames.astype(float), results, colours, strict=True):
        assert np.abs(frame[:, :WIDTH] - result.frame.pixels).mean() < 10
        # The middle of each patch: at its rim, video mixes the colours of neighbours.
        assert np.abs(frame[8::16, WIDTH + 8 :: 16] - colour).mean() < 20


def test_the_summary_tells_counts_latency_memory_and_compiling(shown):
    output, results = shown
    summary = summary_of(output)
    assert summary["ended"] == "end of the input"
    assert (summary["frames"], summary["dropped"], summary["damaged"]) == (FRAMES, 0, 0)
    steps = [1000 * result.step for result in results]
    assert summary["step_ms"]["p50"] == pytest.approx(np.median(steps))
    assert summary["step_ms"]["max"] == pytest.approx(max(steps))
    assert summary["capture_to_result_ms"]["p50"] is None, "nobody waits for a file that is read as fast as it goes"
    assert summary["frames_per_second"] == pytest.approx(FRAMES / summary["seconds"])
    assert summary["peak_memory_bytes"]["process"] > 2**26
    assert summary["compiled"]["programs"] > 0
    assert summary["files"] == [live_view.RECORDING, live_view.VIDEO]
    assert not list(output.glob("*.tmp*"))


def test_nothing_is_compiled_once_frames_come_and_each_line_says_how_it_goes(config_for, tmp_path, capsys):
    live.stream(config_for(tmp_path, window=3, log_seconds=1e-9, record=False, video=False, max_frames=7))
    first, *lines = capsys.readouterr().out.splitlines()
    before = re.match(r"compiled (\d+) programs? in [\d.]+ s \(\d+ from the cache\); reading .*a\.mp4", first)
    summary = summary_of(tmp_path)
    assert int(before[1]) == summary["compiled"]["programs"] > 0
    assert (summary["ended"], summary["frames"], summary["files"]) == ("max_frames", 7, [])
    assert (
        len([line for line in lines if re.search(r"frames \| [\d.,]+ frames/s \| p50 [\d.]+ ms \| dropped 0", line)])
        == 7
    )
    text = "\n".join(lines)
    assert re.search(r"step +p50 [\d.]+  p90 [\d.]+  p99 [\d.]+  max [\d.]+ ms", text)
    assert re.search(r"peak memory +process [\d,]+ MiB", text)


def test_a_stream_shorter_than_the_fit_of_its_colours_is_drawn_whole(config_for, tmp_path):
    live.stream(config_for(tmp_path, pca_frames=100, record=False))
    assert len(video_frames(tmp_path / live_view.VIDEO)[0]) == FRAMES
    assert not (tmp_path / live_view.RECORDING).exists()


def test_cache_and_activations_of_another_type(config_for, tmp_path, monkeypatch):
    streams, open_stream = [], model_lib.Model.open_stream

    def spy(self, *arguments, **named):
        streams.append(open_stream(self, *arguments, **named))
        return streams[-1]

    monkeypatch.setattr(model_lib.Model, "open_stream", spy)
    asked = {"cache_dtype": "int8", "compute_dtype": "bfloat16", "window": 4, "sinks": 2}
    live.stream(config_for(tmp_path, record=False, max_frames=2, **asked))
    found = streams[-1].options
    assert (found.cache_dtype, found.window, found.sinks, found.layers) == ("int8", 4, 2, ())
    assert live.build(config_for(tmp_path, **asked)).model.backbone.dtype == "bfloat16"


# Dropping


def test_frames_are_dropped_so_that_latency_stays_bounded(config_for, tmp_path, slow_step):
    playing = {"realtime": True, "video": False, "record": False}
    source = str(write_clip(tmp_path / "fast.mp4", real_frames(1, 40), rate=100))  # 0.4 s; the model needs 1.6
    live.stream(config_for(tmp_path / "drop", input=source, drop_frames=True, **playing))
    live.stream(config_for(tmp_path / "all", input=source, **playing))
    dropping, waiting = summary_of(tmp_path / "drop"), summary_of(tmp_path / "all")
    assert dropping["frames"] + dropping["dropped"] == 40
    assert 2 <= dropping["frames"] <= 30
    assert (waiting["frames"], waiting["dropped"]) == (40, 0)
    # A frame waits for one step at most, and then takes one: far less than a queue that grows.
    assert 40 <= dropping["capture_to_result_ms"]["p50"] < 4 * dropping["step_ms"]["p50"]
    assert dropping["capture_to_result_ms"]["p50"] < waiting["capture_to_result_ms"]["p50"]


# Endings


def test_a_file_damaged_in_the_middle_leaves_what_came_before(config_for, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", real_frames(2, 40)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.mp4: .*damaged or truncated after frame"):
        live.stream(config_for(tmp_path / "out", input=str(cut)))
    summary = summary_of(tmp_path / "out")
    assert re.search("damaged or truncated after frame", summary["ended"])
    assert 10 < summary["frames"] < 40
    assert len(video_frames(tmp_path / "out" / live_view.VIDEO)[0]) == summary["frames"]
    assert len(recorded(tmp_path / "out" / live_view.RECORDING, "/features", "Image:buffer")[0]) == summary["frames"]


def test_ctrl_c_ends_a_run_in_order(config_for, tmp_path):
    source = write_clip(tmp_path / "slow.mp4", real_frames(1, 40), rate=2)  # 20 s
    fields = {"input": str(source), "realtime": True, "log_seconds": 0.1, "compilation_cache": str(tmp_path / "cache")}
    arguments = command(config_for(tmp_path / "out", **fields))
    with subprocess.Popen(
        arguments, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        guard = threading.Timer(100, process.kill)
        guard.start()
        lines = [next(process.stdout) for _ in range(3)]  # of compiling, and of two frames
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest, errors = process.communicate()
        guard.cancel()
    assert process.returncode == 0, errors
    assert time.monotonic() - started < 10
    assert "Traceback" not in errors
    assert "frames/s" in lines[2]
    assert "stopped: " in rest
    summary = summary_of(tmp_path / "out")
    assert summary["ended"] == "stopped"
    assert 2 <= summary["frames"] < 40
    assert summary["capture_to_result_ms"]["p50"] >= summary["step_ms"]["p50"]
    assert len(video_frames(tmp_path / "out" / live_view.VIDEO)[0]) == summary["frames"]
    frames, _, latencies = recorded(
        tmp_path / "out" / live_view.RECORDING, "/latency/capture_to_result", "Scalars:scalars"
    )
    assert len(frames) == summary["frames"]
    assert np.median(latencies) == pytest.approx(summary["capture_to_result_ms"]["p50"])


def test_a_termination_signal_ends_a_run_in_order(config_for, tmp_path, monkeypatch):
    show, before = live_view.Drawing.show, signal.getsignal(signal.SIGTERM)

    def show_and_stop(self, result):
        show(self, result)
        if result.index == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(live_view.Drawing, "show", show_and_stop)
    live.stream(config_for(tmp_path))
    summary = summary_of(tmp_path)
    assert (summary["ended"], summary["frames"]) == ("stopped", 4)
    assert len(video_frames(tmp_path / live_view.VIDEO)[0]) == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_before_the_first_frame_leaves_a_summary(config_for, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "_warm_up", lambda job: os.kill(os.getpid(), signal.SIGINT))
    live.stream(config_for(tmp_path))
    summary = summary_of(tmp_path)
    assert (summary["ended"], summary["frames"], summary["frames_per_second"]) == ("stopped", 0, None)
    assert {path.name for path in tmp_path.iterdir()} == {live.SUMMARY, ".lock"}
    assert "stopped: 0 frames" in capsys.readouterr().out


def test_a_second_start_loads_its_programs_and_shows_the_same(config_for, tmp_path):
    found = []
    for name in ("first", "second"):
        config = config_for(tmp_path / name, compilation_cache=str(tmp_path / "cache"), video=False)
        done = subprocess.run(
            command(config), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        if "prefer-no-gather" in done.stderr:
            pytest.skip("XLA refuses its own cache on this kind of CPU: github.com/openxla/xla/issues/44565")
        assert re.match(r"compiled \d+ programs in [\d.]+ s \(\d+ from the cache\)", done.stdout)
        found.append(summary_of(tmp_path / name)["compiled"])
    first, second = found
    assert first["from_cache"] == 0
    assert second["from_cache"] == second["programs"] == first["programs"] > 0
    pictures = [
        recorded(tmp_path / name / live_view.RECORDING, "/features", "Image:buffer")[2] for name in ("first", "second")
    ]
    assert pictures[0] == pictures[1]


def test_features_that_are_not_finite_are_an_error_and_not_a_picture(config_for, checkpoint, tmp_path):
    model = omnistream_jax.load(checkpoint)
    model.params["patch_bias"] = model.params["patch_bias"] * np.nan
    model.save(tmp_path / "model")
    with pytest.raises(live.LiveError, match="features of frame 0 are not finite"):
        live.stream(config_for(tmp_path / "out", checkpoint=str(tmp_path / "model")))
    assert "not finite" in summary_of(tmp_path / "out")["ended"]


def test_a_second_run_into_one_directory_is_refused(config_for, tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(WorkdirLockedError):
        live.stream(config_for(tmp_path))


# What cannot work


def sound_file(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": "/nowhere.mp4"}, DataError, "'/nowhere.mp4': there is no such file"),
        ({"input": ""}, DataError, "input ''"),
        ({"input": str(REPOSITORY)}, DataError, "is a folder"),
        ({"input": CONFIG}, DataError, r"stream\.py: expected a video file"),
        ({"checkpoint": "/nowhere/model"}, WeightsError, "/nowhere/model: no such directory"),
        ({"checkpoint": ""}, ConfigError, "checkpoint: expected a directory"),
        ({"output": ""}, ConfigError, "output: expected a directory"),
        ({"resize": "pad"}, ConfigError, "resize: .*pad"),
        ({"height": 40}, ConfigError, "multiples of 16, got 40 x 48"),
        ({"height": 0}, ConfigError, "height: .*0"),
        ({"frame_rate": -1.0}, ConfigError, "frame_rate: .*-1"),
        ({"compute_dtype": "int8"}, ConfigError, "^compute_dtype: .*int8"),
        ({"cache_dtype": "int4"}, ConfigError, "cache_dtype: .*int4"),
        ({"window": 1}, ConfigError, "window"),
        ({"window": -4}, ConfigError, "window: .*-4"),
        ({"pca_frames": 0}, ConfigError, "pca_frames: .*0"),
        ({"max_frames": -1}, ConfigError, "max_frames: .*-1"),
        ({"log_seconds": 0.0}, ConfigError, "log_seconds: .*0"),
        ({"drop_frames": True}, ConfigError, "drop_frames: .*give realtime too"),
        ({"input": "0", "realtime": True}, ConfigError, "realtime: only for files"),
        ({"viewer": True}, ConfigError, "viewer: there is no display"),
    ],
)
def test_a_field_that_cannot_work_is_one_clear_error(config_for, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(error, match=message):
        live.stream(config_for(**({"output": tmp_path / "out"} | changes)))
    assert not (tmp_path / "out").exists()


def test_a_file_without_pictures_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.wav: has no video stream"):
        find_source(str(sound_file(tmp_path / "a.wav")))


@pytest.mark.parametrize("asked", [{"record": True}, {"record": False, "viewer": True}])
def test_rerun_is_needed_only_where_it_is_asked_for(config_for, tmp_path, monkeypatch, asked):
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[viz\]'"):
        live.stream(config_for(tmp_path / "out", **asked))
    live.build(config_for(tmp_path / "out", record=False))


def test_the_viewer_is_shown_what_is_recorded_and_may_be_closed(config_for, tmp_path, monkeypatch, capsys):
    rerun = pytest.importorskip("rerun")

    def close_viewer(self, **_):
        raise RuntimeError("the viewer has gone")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(rerun, "spawn", lambda **_: None)
    monkeypatch.setattr(rerun, "GrpcSink", lambda: rerun.FileSink(str(tmp_path / "viewer.rrd")))
    monkeypatch.setattr(rerun.RecordingStream, "flush", close_viewer)
    live.stream(config_for(tmp_path / "out", viewer=True, video=False))
    assert "viewer: the viewer has gone" in capsys.readouterr().out
    shown, kept = (recorded(path, "/dropped", "Scalars:scalars") for path in tmp_path.rglob("*.rrd"))
    assert shown == kept
    assert len(kept[0]) == FRAMES


def test_a_viewer_that_cannot_be_started_is_one_clear_error(config_for, tmp_path, monkeypatch):
    rerun = pytest.importorskip("rerun")

    def fail(**_):
        raise RuntimeError("no viewer in PATH\nand much advice")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(rerun, "spawn", fail)
    with pytest.raises(live.LiveError, match=r"^viewer: no viewer in PATH$"):
        live.stream(config_for(tmp_path, viewer=True))


def test_the_command_line_tells_an_error_in_one_message(config_for, tmp_path):
    (tmp_path / "file").write_text("")
    config = config_for(tmp_path / "out", input="/nowhere.mp4", compilation_cache=str(tmp_path / "file" / "cache"))
    done = subprocess.run(
        command(config), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "error: input '/nowhere.mp4'" in done.stderr
    assert "compilation_cache: going on without" in done.stderr
    assert "Traceback" not in done.stderr
