"""Batch extraction as a whole: features, damaged videos, killing, resuming, sharing, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from backbone_cases import random_model, stream_through
from clip_cases import decode_plainly, real_frames, write_clip, write_twenty
from safetensors.numpy import load_file

import omnistream_jax
from omnistream_jax import config as config_lib
from omnistream_jax import extract as extract_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert import files
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.extract import extract, safe_name
from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = str(REPOSITORY / "configs" / "extract.py")
DAMAGED = ("damaged/truncated.mp4", "garbage.mkv")
SMALL = {
    "height": 32,
    "width": 48,
    "resize": "stretch",
    "window": 0,
    "dtype": "float32",
    "chunk": 4,
    "layers": (1, 0),
    "tokens": ("cls", "registers", "patches", "camera"),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return folder, write_twenty(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_model().save(directory)
    return directory


@pytest.fixture(scope="module")
def config_for(clips, checkpoint):
    def make(output, **changes):
        fields = {"input": str(clips[0]), "output": str(output), "checkpoint": str(checkpoint)}
        return config_lib.load(CONFIG, fields | SMALL | changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(config_for, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    return output, extract(config_for(output))


def environment(**changes: str) -> dict[str, str]:
    """Of a subprocess: programs that this session has compiled are not compiled again."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return os.environ | cache | changes


def command(config) -> list[str]:
    fields = {name: value for name, value in config.items() if name not in ("job", "name")}
    return [
        sys.executable,
        *("-m", "omnistream_jax.main", f"--config={CONFIG}"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def contents(output: Path) -> dict[str, bytes]:
    """What a user sees of an output directory: not the locks and scratch, whose names begin with a dot."""
    files = {path.relative_to(output): path for path in output.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if not name.parts[0].startswith(".")}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eighteen_of_twenty_clips_are_finished_and_two_recorded(clips, undisturbed):
    (folder, paths), (output, status) = clips, undisturbed
    assert status == 1
    files = sorted(name for name in contents(output) if name.endswith(".safetensors"))
    assert files == sorted(f"{name}.safetensors" for name in paths if name not in DAMAGED)
    assert len(files) == 18
    failed = rows(output / "failed.jsonl")
    assert [row["item"] for row in failed] == list(DAMAGED)
    assert all(str(folder / row["item"]) in row["reason"] for row in failed)
    index = rows(output / "index.jsonl")
    assert [row["file"] for row in index] == files
    assert set(contents(output)) == {*files, "index.jsonl", "failed.jsonl", "settings.json"}
    assert not list(output.glob(".process-0/item-*"))
    one = next(row for row in index if row["item"] == "group 1/clip_1.avi")
    assert {name: one[name] for name in ("frames", "size", "seconds")} == {
        "frames": 7,
        "size": [90, 160],
        "seconds": pytest.approx(6 / 30, abs=1e-6),
    }
    assert one["bytes"] == (output / one["file"]).stat().st_size


def test_features_equal_those_of_encode_on_the_same_frames(clips, undisturbed, checkpoint):
    model = omnistream_jax.load(checkpoint)
    for name, path in clips[1].items():
        if name in DAMAGED:
            continue
        frames, times = decode_plainly(path, 32, 48)
        tensors = load_file(undisturbed[0] / f"{name}.safetensors")
        # Filled up to one length, for one compilation: later frames do not change earlier ones.
        count = len(frames)
        frames = np.pad(frames, [(0, 16 - count), (0, 0), (0, 0), (0, 0)])
        out = model.encode(frames[None], layers=(0, 1), camera_token=True)
        expected = {token: getattr(out, token)[0] for token in ("patches", "cls", "registers", "camera")}
        for layer, hidden in enumerate(out.hidden):
            expected |= {
                f"layer_{layer}.cls": hidden[0, :, 0],
                f"layer_{layer}.camera": hidden[0, :, 1],
                f"layer_{layer}.registers": hidden[0, :, 2:6],
                f"layer_{layer}.patches": hidden[0, :, 6:].reshape(-1, 2, 3, 32),
            }
        assert set(tensors) == {*expected, "times"}
        for key, value in expected.items():
            np.testing.assert_allclose(tensors[key], np.asarray(value)[:count], atol=2e-4, err_msg=f"{name} {key}")
        np.testing.assert_allclose(np.diff(tensors["times"]), np.diff(times), atol=1e-6)
        assert tensors["times"].dtype == np.float64


def test_windows_rates_and_types_as_asked(clips, config_for, checkpoint, tmp_path):
    source = clips[1]["group 2/clip_2.webm"]
    frames, times = decode_plainly(source, 32, 48)
    taken = [0, 2, 5, 7, 10, 12, 14]  # of 12 frames a second, those nearest to 5 a second
    streamed = np.pad(frames[taken], [(0, 1), (0, 0), (0, 0), (0, 0)])[None]
    out = stream_through(omnistream_jax.load(checkpoint), streamed, [4, 4], window=3, layers=(1,))
    expected = {"cls": out.cls[0, :7], "layer_1.cls": out.hidden[0][0, :7, 0]}
    asked = {"input": str(source), "frame_rate": 5.0, "window": 3, "layers": (1,), "tokens": ("cls",)}
    for dtype, kind, tolerance in (("float16", np.float16, 2e-3), ("bfloat16", ml_dtypes.bfloat16, 1e-2)):
        assert extract(config_for(tmp_path / dtype, dtype=dtype, **asked)) == 0
        tensors = load_file(tmp_path / dtype / "clip_2.webm.safetensors")
        assert set(tensors) == {"times", *expected}
        np.testing.assert_allclose(tensors["times"], times[taken], atol=1e-6)
        for name, values in expected.items():
            assert tensors[name].dtype == kind
            np.testing.assert_allclose(tensors[name].astype(np.float32), values, rtol=tolerance, atol=tolerance)
    assert extract(config_for(tmp_path / "hidden", final=False, **asked)) == 0
    assert set(load_file(tmp_path / "hidden" / "clip_2.webm.safetensors")) == {"times", "layer_1.cls"}


def test_the_camera_token_is_told_the_aspect_ratio_of_the_source(clips, config_for, checkpoint, tmp_path):
    source = clips[1]["group 1/clip_10.mkv"]  # one frame of 64 x 64
    config = config_for(tmp_path / "out", input=str(source), layers=(), tokens=("camera",), aspect_ratio=True)
    assert extract(config) == 0
    frames, _ = decode_plainly(source, 32, 48)
    model = omnistream_jax.load(checkpoint)
    stored = load_file(tmp_path / "out" / "clip_10.mkv.safetensors")["camera"]
    for ratio, equal in ((1.0, True), (32 / 48, False)):
        out = model.encode(frames[None], layers=(), camera_token=True, aspect_ratio=[ratio])
        assert np.allclose(stored, out.camera[0], atol=2e-4) == equal


def finished(output) -> int:
    """How many feature files there are; unlike rglob, it may look while the run makes and removes folders."""
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(output) for name in names)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_run_ended_half_way_goes_on_to_the_same_bytes(config_for, undisturbed, tmp_path, number, status):
    output = tmp_path / "out"
    with subprocess.Popen(
        command(config_for(output)), cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while finished(output) < 6 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
    done = finished(output)
    assert process.returncode == status
    assert 6 <= done < 18
    assert not (output / "index.jsonl").exists()

    again = subprocess.run(
        command(config_for(output)), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 1, again.stderr
    assert contents(output) == contents(undisturbed[0])
    assert not list(output.glob(".process-0/item-*"))
    assert "20 items, " in again.stdout
    assert "frames/s" in again.stdout
    assert "18 of 20 items finished" in again.stdout
    assert "2 failed" in again.stdout
    assert "Traceback" not in again.stderr


def test_a_rerun_skips_what_is_finished_and_tries_the_rest_again(config_for, clips, tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    for index in range(3):
        write_clip(folder / f"{index}.mp4", real_frames(index, 40)[:5])
    whole = (folder / "2.mp4").read_bytes()
    (folder / "2.mp4").write_bytes(whole[: len(whole) // 2])
    config = config_for(tmp_path / "out", input=str(folder))
    assert extract(config) == 1
    assert [row["item"] for row in rows(tmp_path / "out" / "failed.jsonl")] == ["2.mp4"]
    before = (tmp_path / "out" / "0.mp4.safetensors").stat().st_mtime_ns

    pool, asked = extract_lib.DecodePool, []

    def spy(items, *arguments):
        asked.append([item.name for item in items])
        return pool(items, *arguments)

    monkeypatch.setattr(extract_lib, "DecodePool", spy)
    (folder / "2.mp4").write_bytes(whole)
    cut = tmp_path / "out" / "1.mp4.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])  # not what a killed run leaves, but it is not taken for finished
    assert extract(config) == 0
    assert not (tmp_path / "out" / "failed.jsonl").exists()
    assert extract(config) == 0
    write_clip(folder / "0.mp4", real_frames(3, 40)[:9])  # another video under the old name
    assert extract(config) == 0
    assert asked == [["1.mp4", "2.mp4"], [], ["0.mp4"]]
    assert (tmp_path / "out" / "0.mp4.safetensors").stat().st_mtime_ns > before
    assert [row["frames"] for row in rows(tmp_path / "out" / "index.jsonl")] == [9, 5, 5]
    (folder / "0.mp4").write_bytes(b"")  # a source that broke leaves no features of its earlier state
    assert extract(config) == 1
    assert [row["item"] for row in rows(tmp_path / "out" / "index.jsonl")] == ["1.mp4", "2.mp4"]


def test_processes_share_the_items_and_one_index(config_for, undisturbed, tmp_path):
    config = config_for(tmp_path, workers=1)
    statuses = [extract(config, index, 3) for index in (2, 0, 1)]
    assert sorted(statuses) == [0, 1, 1]
    assert contents(tmp_path) == contents(undisturbed[0])


@pytest.mark.slow
def test_several_devices_give_the_same_bytes(config_for, undisturbed, tmp_path):
    two = environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    arguments = command(config_for(tmp_path, workers=3))
    done = subprocess.run(arguments, cwd=REPOSITORY, env=two, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert contents(tmp_path) == contents(undisturbed[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, r'dtype: "float32" -> "float16"'),
        ({"window": 9, "frame_rate": 5.0}, r"frame_rate: 0.0 -> 5.0\n  window: 0 -> 9"),
        ({"layers": ()}, r"layers: \[1, 0\] -> \[\]"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(config_for, undisturbed, changes, message):
    before = contents(undisturbed[0])
    with pytest.raises(ConfigError, match=message):
        extract(config_for(undisturbed[0], **changes))
    assert contents(undisturbed[0]) == before


def test_another_model_in_the_same_directory_is_refused(config_for, undisturbed, checkpoint, tmp_path):
    random_model().save(tmp_path / "same")
    random_model(seed=1).save(tmp_path / "other")
    assert files.fingerprint(tmp_path / "same") == files.fingerprint(checkpoint)
    with pytest.raises(ConfigError, match=r"made with other settings.*\n  model: "):
        extract(config_for(undisturbed[0], checkpoint=str(tmp_path / "other")))


def test_a_second_run_into_one_directory_is_refused(config_for, tmp_path):
    with WorkdirLock(tmp_path / ".process-0"), pytest.raises(WorkdirLockedError):
        extract(config_for(tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": "/nowhere"}, DataError, "/nowhere.*no such file or folder"),
        ({"input": ""}, DataError, "input ''"),
        ({"checkpoint": "/nowhere/model"}, WeightsError, "/nowhere/model: no such directory"),
        ({"checkpoint": ""}, ConfigError, "checkpoint: expected a directory"),
        ({"layers": (0, 2)}, ConfigError, r"layers: expected block indices 0 to 1, got \[2\]"),
        ({"tokens": ("cls", "masks")}, ConfigError, "tokens: .*masks"),
        ({"tokens": ()}, ConfigError, "nothing would be stored"),
        ({"final": False, "layers": ()}, ConfigError, "nothing would be stored"),
        ({"dtype": "int8"}, ConfigError, "dtype: .*int8"),
        ({"compute_dtype": "float64"}, ConfigError, "^compute_dtype: expected one of auto, .*, got 'float64'"),
        ({"height": 40}, ConfigError, "multiples of 16, got 40 x 48"),
        ({"resize": "pad"}, ConfigError, "resize: .*pad"),
        ({"frame_rate": -1.0}, ConfigError, "frame_rate: .*-1"),
        ({"window": 1}, ConfigError, "window"),
        ({"window": -4}, ConfigError, "window: .*-4"),
        ({"chunk": 0}, ConfigError, "chunk: .*0"),
        ({"workers": 0}, ConfigError, "workers: .*0"),
        ({"aspect_ratio": True, "tokens": ("cls",)}, ConfigError, "aspect_ratio: .*add camera to tokens"),
        ({"log_seconds": float("nan")}, ConfigError, "log_seconds: expected a positive number of seconds, got nan"),
        ({"process_count": -1}, ConfigError, "^process_count: .*got -1"),
        ({"process_index": 2, "process_count": 2}, ConfigError, "process_index: .*got 2"),
        ({"process_index": 1}, ConfigError, "give process_count too"),
    ],
)
def test_a_field_that_cannot_work_is_one_clear_error(config_for, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        extract(config_for(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_command_line_tells_an_error_in_one_message(config_for, tmp_path):
    arguments = command(config_for(tmp_path / "out", input="/nowhere"))
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: input '/nowhere'" in done.stderr
    assert "Traceback" not in done.stderr


def test_features_beyond_float16_are_a_failure_and_not_infinities(config_for, clips, checkpoint, tmp_path):
    model = omnistream_jax.load(checkpoint)
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1e6 if path[-1].key == "patch_kernel" else leaf, model.params
    )
    extract_lib.model_lib.build_model(model.config, scaled).save(tmp_path / "model")
    source = {"input": str(clips[1]["group 1/clip_1.avi"]), "checkpoint": str(tmp_path / "model")}
    assert extract(config_for(tmp_path / "half", dtype="float16", **source)) == 1
    (row,) = rows(tmp_path / "half" / "failed.jsonl")
    assert "the features of frame 0 are not finite in float16" in row["reason"]
    assert extract(config_for(tmp_path / "brain", dtype="bfloat16", **source)) == 0


def test_a_device_out_of_memory_costs_that_item_alone(config_for, tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    for index in range(3):
        write_clip(folder / f"{index}.mp4", real_frames(0, 40)[:9])
    feed, fed = extract_lib._OpenItem.feed, []

    def run_out(self, chunk):
        fed.append(self._item.name)
        if fed.count("1.mp4") == 2 and fed[-1] == "1.mp4":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        feed(self, chunk)

    monkeypatch.setattr(extract_lib._OpenItem, "feed", run_out)
    assert extract(config_for(tmp_path / "out", input=str(folder))) == 1
    assert fed.count("1.mp4") == 2
    assert rows(tmp_path / "out" / "failed.jsonl") == [
        {"item": "1.mp4", "reason": f"{folder / '1.mp4'}: the device ran out of memory; set a window"}
    ]
    assert [row["item"] for row in rows(tmp_path / "out" / "index.jsonl")] == ["0.mp4", "2.mp4"]


def test_names_are_kept_where_they_are_safe_and_unique_where_not():
    for name in ("a/b c/d.mp4", "clip_1.avi", "höhe.mkv"):
        assert safe_name(name) == name
    unsafe = ["/etc/a.mp4", "../a.mp4", "a/../a.mp4", "a?.mp4", "a*.mp4", ".hidden.mp4", "x" * 300, "./a", "."]
    names = [safe_name(name) for name in unsafe]
    assert len(set(names)) == len(unsafe)
    for name in names:
        assert not name.startswith(("/", "."))
        assert ".." not in name.split("/")
        assert max(map(len, name.split("/"))) < 150
