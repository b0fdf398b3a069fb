"""The job of video object segmentation as a whole: masks, numbers, files, resuming, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from backbone_cases import random_model
from PIL import Image
from vos_cases import world_sequences, write_davis, write_png

from omnistream_jax import config as config_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.benchmarks import davis
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.propagation import Propagation
from omnistream_jax.evals.region_boundary import mean_scores, score_sequence
from omnistream_jax.evals.video_segmentation import FeatureReader, FrameRule, segment
from omnistream_jax.propagate import PropagationError, Segmenter, propagate
from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError

pytestmark = pytest.mark.usefixtures("quick_compilation")
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = str(REPOSITORY / "configs" / "evaluate_vos.py")
FRAMES = 5


@pytest.fixture(scope="module")
def sequences():
    return world_sequences(2, FRAMES, 64)


@pytest.fixture(scope="module")
def tree(sequences, tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("davis"), sequences)


@pytest.fixture(scope="module")
def model():
    return random_model(patch_size=8)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model.save(directory)
    return directory


@pytest.fixture(scope="module")
def fields_for(checkpoint, tree):
    def make(output, **changes):
        fields = {"checkpoint": str(checkpoint), "output": str(output), "data": str(tree), "allow_incomplete": True}
        return fields | {"short_side": 64} | changes

    return make


@pytest.fixture(scope="module")
def config_for(fields_for):
    return lambda output, **changes: config_lib.load(CONFIG, fields_for(output, **changes))


@pytest.fixture(scope="module")
def finished(fields_for, tmp_path_factory):
    """The output of a run through the command line, and what it said."""
    output = tmp_path_factory.mktemp("vos")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    done = subprocess.run(
        [sys.executable, "-m", "omnistream_jax.main", f"--config={CONFIG}"]
        + [f"--config.{name}={value}" for name, value in fields_for(output).items()],
        cwd=REPOSITORY,
        env=os.environ | cache,
        capture_output=True,
        text=True,
        timeout=900,  # beside other work
    )
    return output, done


def summary(output):
    return json.loads((output / "vos.json").read_text())


def read_masks(folder, sequence):
    return np.stack([np.asarray(Image.open(folder / sequence.name / f"{t:05d}.png")) for t in range(len(sequence))])


# The masks and their scores


def test_the_command_writes_masks_and_scores_them(finished, model, tree, sequences):
    output, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    content, scores = summary(output), []
    rule = FrameRule(short_side=64, rounding="up", multiple=0, interpolation="bicubic", deviation="imagenet")
    propagation = Propagation(7, 12, "circle", 5, 0.2, "nearest", "loses")
    for sequence, video in zip(sequences, davis.open_davis(tree, allow_incomplete=True).sequences, strict=True):
        masks = read_masks(output / "predictions", sequence)
        expected = np.stack(list(segment(FeatureReader(model, "stream"), rule, propagation, video)))
        assert (masks != expected).mean() < 1e-3  # two ways to compile
        np.testing.assert_array_equal(masks[0], sequence.mask(0))
        assert 0 < (masks[1:] != sequence.masks()[1:]).mean() < 0.5
        scores.append(score_sequence(masks, sequence.masks()))
        row = content["sequences"][sequence.name]
        assert (row["frames"], len(row["objects"])) == (FRAMES, sequence.objects)
        mean = mean_scores(scores[-1:])
        assert [row[name] for name in ("j_and_f", "j", "f")] == [mean.both, mean.region, mean.boundary]
        assert [each["j"] for each in row["objects"]] == pytest.approx(scores[-1].region.mean(1).tolist(), abs=1e-12)
    mean = mean_scores(scores)
    for name, value in (("j_and_f", mean.both), ("j", mean.region), ("f", mean.boundary)):
        assert content["scores"][name] == pytest.approx(value, abs=1e-12)
    still = mean_scores([score_sequence(np.repeat(s.masks()[:1], FRAMES, 0), s.masks()) for s in sequences])
    assert content["still"]["j_and_f"] == pytest.approx(still.both, abs=1e-12)


def test_the_summary_holds_every_setting(finished, config_for):
    output, _ = finished
    content = summary(output)
    assert content["config"] == config_lib.to_plain(config_for(output))
    preset = {"preset": "paper", "features": "stream", "neighbourhood": "circle", "temperature": 0.2, "context": 7}
    ours = {"short_side": 64, "window": 0, "time_unit": 16.0, "compute_dtype": "float32", "void": "background"}
    assert content["settings"].items() >= (preset | ours).items()
    assert len(content["settings"]["model"]) == 64
    assert set(content["versions"]) >= {"omnistream_jax", "jax"}
    assert content["data"]["counts"]["expected_objects"] == 61
    assert not content["data"]["counts"]["complete"]
    assert content["published"] is None


def test_the_table_and_the_pictures(finished, sequences):
    output, done = finished
    content = summary(output)
    lines = [line.split() for line in done.stdout.splitlines()]
    numbers = [f"{100 * content['scores'][name]:.1f}" for name in ("j_and_f", "j", "f")]
    objects = str(sum(sequence.objects for sequence in sequences))
    assert ["all", "objects", objects, *numbers] in lines
    assert "davis2017: incomplete, not to be compared with published numbers" in done.stdout
    pictures = sorted((output / "pictures").iterdir())
    assert [path.name for path in pictures] == sorted(f"{sequence.name}.png" for sequence in sequences)
    for path in pictures:
        picture = Image.open(path).convert("RGB")
        assert picture.width > 5 * 200
        assert len(picture.getcolors(1 << 22)) > 100
    assert not list(output.rglob("*.tmp*"))


# Masks of another program


def write_predictions(folder, sequences, change=lambda masks, sequence: masks):
    for sequence in sequences:
        for index, mask in enumerate(change(sequence.masks().copy(), sequence)):
            write_png(folder / sequence.name / f"{index:05d}.png", mask)
    return folder


def permuted(masks, sequence):
    numbers = np.roll(np.arange(1, sequence.objects + 1), 1)
    return np.concatenate([[0], numbers]).astype(np.uint8)[masks]


def scored(config_for, tmp_path, predictions, **changes):
    propagate(config_for(tmp_path / "out", checkpoint="", predictions=str(predictions), **changes))
    return summary(tmp_path / "out")["scores"]


def test_the_truth_has_the_perfect_score(config_for, sequences, tmp_path):
    folder = write_predictions(tmp_path / "masks", sequences)
    assert scored(config_for, tmp_path, folder) == {"j_and_f": 1, "j": 1, "f": 1}
    assert summary(tmp_path / "out")["settings"] == {"void": "background", "predictions": str(folder)}
    assert summary(tmp_path / "out")["still"]["j_and_f"] < 1


def test_permuted_objects_have_the_low_score(config_for, sequences, tmp_path):
    scores = scored(config_for, tmp_path, write_predictions(tmp_path / "masks", sequences, permuted))
    assert scores["j"] == 0
    assert scores["f"] < 0.35  # boundaries of things side by side


def test_masks_are_scored_anew_when_they_change(config_for, sequences, tmp_path):
    folder = write_predictions(tmp_path / "masks", sequences, permuted)
    assert scored(config_for, tmp_path, folder)["j"] == 0
    write_predictions(folder, sequences)
    assert scored(config_for, tmp_path, folder)["j"] == 1


def test_the_first_and_last_masks_need_not_be_there(config_for, sequences, tmp_path):
    folder = write_predictions(tmp_path / "masks", sequences)
    write_png(folder / sequences[0].name / "00000.png", np.full((64, 64), 255, np.uint8))  # they are not scored
    assert scored(config_for, tmp_path, folder)["j_and_f"] == 1
    for sequence in sequences:
        for index in (0, FRAMES - 1):
            (folder / sequence.name / f"{index:05d}.png").unlink()
    assert scored(config_for, tmp_path, folder)["j_and_f"] == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"00002\.png: there is no such file; expected a mask"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), r"00002\.png: expected a mask: a PNG"),
        (lambda path: write_png(path, np.zeros((60, 64), np.uint8)), r"00002\.png: 64 x 60 pixels, expected 64 x 64"),
        (lambda path: write_png(path, np.full((64, 64), 9, np.uint8)), r"00002\.png: has object 9, expected 0 to"),
    ],
)
def test_a_missing_or_damaged_prediction_is_one_clear_error(config_for, sequences, tmp_path, damage, message):
    folder = write_predictions(tmp_path / "masks", sequences)
    damage(folder / sequences[1].name / "00002.png")
    with pytest.raises(DataError, match=message):
        scored(config_for, tmp_path, folder)


# Going on


def test_a_rerun_does_what_is_missing(config_for, sequences, tmp_path, monkeypatch):
    asked, masks = [], Segmenter.masks

    def spy(self, sequence):
        asked.append(sequence.name)
        return masks(self, sequence)

    monkeypatch.setattr(Segmenter, "masks", spy)
    names = [sequence.name for sequence in sequences]
    propagate(config_for(tmp_path))
    before = summary(tmp_path)
    assert asked == names
    propagate(config_for(tmp_path))
    assert asked == names
    assert summary(tmp_path) == before
    (tmp_path / "results" / f"{names[0]}.json").write_text('{"key"')
    (tmp_path / "predictions" / names[1] / "00003.png").unlink()
    propagate(config_for(tmp_path))
    assert asked == names * 2
    (tmp_path / "pictures" / f"{names[1]}.png").unlink()
    propagate(config_for(tmp_path))
    assert asked == [*names * 2, names[1]]
    assert summary(tmp_path)["scores"] == before["scores"]


def test_a_run_that_was_stopped_keeps_what_was_finished(config_for, sequences, tree, tmp_path):
    copy = write_davis(tmp_path / "copy", sequences)
    broken = copy / "JPEGImages/480p" / sequences[1].name / "00003.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    config = config_for(tmp_path / "out", data=str(copy))
    with pytest.raises(DataError, match=r"00003\.jpg: expected a whole image file"):
        propagate(config)
    first = tmp_path / "out" / "results" / f"{sequences[0].name}.json"
    stamp = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "vos.json").exists()
    broken.write_bytes(whole)
    propagate(config)
    assert first.stat().st_mtime_ns == stamp
    assert len(summary(tmp_path / "out")["sequences"]) == 2


def test_other_data_under_an_old_name_are_segmented_anew(config_for, sequences, tmp_path):
    copy = write_davis(tmp_path / "copy", sequences)
    config = config_for(tmp_path / "out", data=str(copy), plots=False)
    propagate(config)
    first = summary(tmp_path / "out")["sequences"]
    assert not (tmp_path / "out" / "pictures").exists()
    mask = sequences[0].mask(2).copy()
    mask[:9] = 1
    write_png(copy / "Annotations/480p" / sequences[0].name / "00002.png", mask)
    propagate(config)
    again = summary(tmp_path / "out")["sequences"]
    assert again[sequences[0].name]["j"] != first[sequences[0].name]["j"]
    assert again[sequences[1].name] == first[sequences[1].name]


def test_other_settings_are_refused(finished, config_for):
    before = (finished[0] / "vos.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"other settings.*\n  preset: .*\n  radius: 12 -> 3\n  temperature: 0.2 -> 0.1"
    ):
        propagate(config_for(finished[0], preset="dinov3", radius=3, temperature=0.1, features="stream"))
    assert (finished[0] / "vos.json").read_bytes() == before


# The rest


def test_the_world_needs_no_data(checkpoint, tmp_path):
    changes = {"world.clips": 2, "world.frames": 4, "world.size": 32, "short_side": 32}
    config = config_lib.load(f"{CONFIG}:world", {"checkpoint": str(checkpoint), "output": str(tmp_path)} | changes)
    propagate(config)
    content = summary(tmp_path)
    assert content["data"]["benchmark"] == "world"
    assert 0 < content["scores"]["j_and_f"] < 1
    assert len(list((tmp_path / "predictions").rglob("*.png"))) == 4 * len(content["sequences"])


def test_the_papers_figure_stands_beside_complete_data_alone(config_for, sequences, tmp_path, monkeypatch, capsys):
    counts = {sequence.name: (FRAMES, sequence.objects) for sequence in sequences}
    monkeypatch.setattr(davis, "SEQUENCES", counts)
    folder = write_predictions(tmp_path / "masks", sequences)
    scored(config_for, tmp_path, folder, allow_incomplete=False)
    assert summary(tmp_path / "out")["published"]["OmniStream, Table 2"] == "71.6"
    assert "71.6" in capsys.readouterr().out


def test_a_second_run_into_one_directory_is_refused(config_for, tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(WorkdirLockedError):
        propagate(config_for(tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": ""}, ConfigError, "output: expected a directory"),
        ({"data": ""}, ConfigError, "data: expected a directory"),
        ({"checkpoint": ""}, ConfigError, "checkpoint: expected a model's directory, or masks"),
        ({"predictions": "/masks"}, ConfigError, "checkpoint: expected a model's directory, or masks"),
        ({"checkpoint": "/nowhere/model"}, WeightsError, "/nowhere/model: no such directory"),
        ({"data": "/nowhere"}, DataError, "/nowhere: there is no such folder"),
        ({"allow_incomplete": False}, DataError, r"not as published: 2 of 30 sequences, 10 of 1,999 frames"),
        ({"data": "embedded"}, ConfigError, "allow_incomplete: nothing of the embedded world can be missing"),
        (
            {"data": "embedded", "allow_incomplete": False, "world.frames": 2},
            ConfigError,
            r"world\.frames: 2, expected 3 or more",
        ),
        ({"preset": "dinov2"}, ConfigError, "preset: expected one of .*, got 'dinov2'"),
        ({"void": "ignored"}, ConfigError, "void: expected one of background, excluded, got 'ignored'"),
        ({"top": 0}, ConfigError, "top: expected 1 or more, got 0"),
        ({"rounding": "up", "multiple": 12}, ConfigError, "multiple: expected a multiple of the model's patch"),
        ({"rounding": "down", "multiple": 128}, ConfigError, "short_side: expected 128 or more with rounding down"),
        ({"preset": "dino", "window": 8}, ConfigError, "window: frames that are encoded alone have none, got 8"),
        ({"features": "clip"}, ConfigError, "features: expected one of stream, frame, got 'clip'"),
        ({"window": -1}, ConfigError, "window: .*-1"),
        ({"window": 1}, ConfigError, "window: 1 frames cannot hold 1 sinks"),
        ({"time_unit": -2.0}, ConfigError, "time_unit: expected a positive number of frames, got -2"),
        ({"frames_per_step": 0}, ConfigError, "frames_per_step: expected 1 or more, got 0"),
        ({"compute_dtype": "int8"}, ConfigError, "^compute_dtype: .*int8"),
    ],
)
def test_a_field_that_cannot_work_is_one_clear_error(config_for, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        propagate(config_for(**{"output": tmp_path / "out"} | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({}, "set a window"),
        ({"window": 4}, "set a smaller window"),
        ({"preset": "dino"}, "set a smaller short_side or frames_per_step"),
    ],
)
def test_a_full_device_is_one_clear_error(config_for, tmp_path, monkeypatch, changes, hint):
    def masks(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20 GB")

    monkeypatch.setattr(Segmenter, "masks", masks)
    with pytest.raises(PropagationError, match=f"ran out of memory; .*{hint}"):
        propagate(config_for(tmp_path, **changes))


def test_the_worlds_frames_are_seen_in_their_own_size():
    assert config_lib.load(f"{CONFIG}:world", {"world.size": 64}).short_side == 64
    config = config_lib.load(f"{CONFIG}:world", {"short_side": 96})
    assert (config.short_side, config.world.size) == (96, 192)


def test_an_unknown_recipe_is_one_clear_error():
    with pytest.raises(ConfigError, match="unknown recipe 'davis'; there are davis2017, world"):
        config_lib.load(f"{CONFIG}:davis")
