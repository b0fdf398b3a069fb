"""A question about a live stream: answers are the decoder's own, on the features that the stream gave."""

import dataclasses
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from clip_cases import real_frames, write_clip
from geometry_model_cases import random_geometry_model
from language_cases import decoder_config, random_language_model
from live_cases import CONFIG, assert_rerun_verifies, recorded, summary_of

import omnistream_jax
from omnistream_jax import config as config_lib
from omnistream_jax import live, live_question, live_view
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.geometry_model import GeometryModel
from omnistream_jax.language_model import CONFIG_NAME, LanguageModel
from omnistream_jax.live_question import ANSWERS, KeptFrame, KeptFrames
from omnistream_jax.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")
HEIGHT, WIDTH, FRAMES, TOKENS = 32, 48, 12, 16
QUESTION = "What colour is the cube?"
SMALL = {
    **{"height": HEIGHT, "width": WIDTH, "resize": "stretch", "window": 4, "pca_frames": 3, "question": QUESTION},
    **{"answer.every": 5, "answer.max_frames": 4, "answer.max_tokens": TOKENS},
}
# Of the 12 frames, those that are shown after frames 4, 9 and 11: with 4 at most, the past thins at frames 4 and 7.
SHOWN = {4: [0, 2, 4], 9: [0, 4, 8, 9], 11: [0, 4, 8, 11]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", real_frames(0, 40)[:FRAMES])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A backbone with geometry heads and a decoder."""
    directory, geometry = tmp_path_factory.mktemp("model"), random_geometry_model()
    geometry.save(directory)
    # With tied weights it would repeat itself, whatever the frames.
    language = random_language_model(geometry.model, decoder_config(tied=False), 32, seed=1)
    language.save_beside(directory)
    return directory


@pytest.fixture(scope="module")
def language(checkpoint):
    return omnistream_jax.load_language(checkpoint)


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture(scope="module")
def config_for(clip, checkpoint):
    def make(output, changes=None):
        fields = {"input": str(clip), "output": str(output), "checkpoint": str(checkpoint)}
        return config_lib.load(CONFIG, fields | SMALL | (changes or {}))

    return make


def run(config):
    """The results that a run showed, its lines, and how often it stepped the backbone and fed its decoder a frame."""
    results, lines, calls = [], [], {"step": 0, "prefill": 0}
    show, step, prefill = live_view.Drawing.show, Model.step, live_question.prefill

    def count(name, function):
        def counted(*arguments, **named):
            calls[name] += 1
            return function(*arguments, **named)

        return counted

    def refuse(*_, **__):
        raise AssertionError("frames are encoded again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "_say", lambda line: lines.extend(line.splitlines()))
        patch.setattr(live_view.Drawing, "show", lambda self, result: (results.append(result), show(self, result)))
        patch.setattr(Model, "step", count("step", step))
        patch.setattr(Model, "encode", refuse)
        patch.setattr(live_question, "prefill", count("prefill", prefill))
        live.stream(config)
    return results, lines, calls


@pytest.fixture(scope="module")
def shown(config_for, tmp_path_factory):
    """One undisturbed run: its directory, the results that it showed, its lines and its calls."""
    output = tmp_path_factory.mktemp("shown")
    return output, *run(config_for(output, {"log_seconds": 1e-9}))


def answers_of(output) -> list[dict]:
    with (output / ANSWERS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def expected_answers(language, results, shown=None) -> list[str]:
    """What the language model itself says of the patches that the stream gave."""
    patches = [np.stack([results[index].patches for index in frames])[None] for frames in (shown or SHOWN).values()]
    return [language.answer_features(each, [QUESTION], max_tokens=TOKENS)[0] for each in patches]


# Answers


def test_answers_are_the_language_models_own_on_the_frames_that_were_kept(shown, language):
    output, results, _, _ = shown
    answers = answers_of(output)
    assert {answer["frame"]: answer["frames"] for answer in answers} == SHOWN
    found = [answer["answer"] for answer in answers]
    assert found == expected_answers(language, results)
    assert all(found)
    for change in (slice(1, None), slice(-1), slice(None, None, -1)):  # without the first, the newest, and backwards
        others = expected_answers(language, results, {index: frames[change] for index, frames in SHOWN.items()})
        assert all(one != other for one, other in zip(found, others, strict=True)), "other frames, other answers"
    assert {answer["question"] for answer in answers} == {QUESTION}
    assert [answer["time"] for answer in answers] == [results[index].frame.time for index in SHOWN]
    assert all(answer["seconds"] > 0 for answer in answers)


def test_no_frame_is_encoded_again_and_each_is_read_once_between_thinnings(shown):
    calls = shown[3]
    assert calls["step"] == FRAMES + 2, "two before the stream, to compile"
    # One to compile; frames 0 and 2 for the first answer; 0, 4 and 8 for the second; none for the last.
    assert calls["prefill"] == 1 + 2 + 3 + 0


def test_nothing_is_compiled_once_frames_come(shown):
    output, _, lines, _ = shown
    assert int(re.match(r"compiled (\d+) program", lines[0])[1]) == summary_of(output)["compiled"]["programs"] > 0


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16])
def test_the_kept_frames_span_the_stream_evenly_and_stay_few(most):
    kept, newest, thinned = KeptFrames(most), np.zeros((1, 1, 1)), []
    assert kept.indices == ()
    for index in range(200):
        past = kept.indices
        if kept.add(KeptFrame(index, newest)):
            thinned.append(index)
        indices = kept.indices
        assert set(indices) <= {*past, index}, "what was left out does not come back"
        assert indices[-1] == index
        assert len(indices) <= most
        if most > 1:
            assert indices[0] == 0
            steps = np.diff(indices[:-1])
            assert (steps == steps[:1]).all(), "evenly spaced"
            assert len(indices) > min(index, most // 2)
            assert not len(steps) or index - indices[-2] <= steps[0], "up to now"
    doublings = [(most - 1) * 2**power + 1 for power in range(8)] if most > 1 else []
    assert thinned == [index for index in doublings if index < 200]


def test_the_newest_frame_alone_may_be_asked_about(config_for, language, tmp_path):
    changes = {"answer.max_frames": 1, "answer.every": 6, "record": False, "video": False}
    results, _, calls = run(config_for(tmp_path, changes))
    alone = {5: [5], 11: [11]}
    assert {answer["frame"]: answer["frames"] for answer in answers_of(tmp_path)} == alone
    assert [answer["answer"] for answer in answers_of(tmp_path)] == expected_answers(language, results, alone)
    assert calls["prefill"] == 0
    assert [result.index for result in results if result.answer is not None] == [5, 11], "none twice"


def test_geometry_and_answers_go_together(config_for, language, tmp_path):
    changes = {"geometry.enabled": True, "answer.every": 0, "geometry.shard_frames": 4}
    results, lines, _ = run(config_for(tmp_path, changes))
    (answer,) = answers_of(tmp_path)
    assert (answer["frame"], answer["frames"]) == (11, SHOWN[11])
    assert [answer["answer"]] == expected_answers(language, results, {11: SHOWN[11]})
    assert all(result.geometry is not None and result.answer is None for result in results)
    summary = summary_of(tmp_path)
    assert summary["files"][-2:] == ["points.ply", ANSWERS]
    assert summary["geometry"]["points"] > 0
    assert int(re.match(r"compiled (\d+) program", lines[0])[1]) == summary["compiled"]["programs"]


def test_the_question_keeps_no_backbone_of_its_own(config_for, tmp_path):
    job = live.build(config_for(tmp_path, {"geometry.enabled": True}))
    assert isinstance(job.model, GeometryModel)
    assert not any(isinstance(value, LanguageModel | Model) for value in vars(job.question).values())


# What is told, written and shown


def test_the_summary_and_the_terminal_tell_the_answers(shown):
    output, _, lines, _ = shown
    answers, summary = answers_of(output), summary_of(output)
    found = summary["answers"]
    assert (found["question"], found["answers"], found["last"]) == (QUESTION, 3, answers[-1])
    seconds = [answer["seconds"] for answer in answers]
    assert found["seconds"] == pytest.approx({"mean": np.mean(seconds), "max": max(seconds)})
    assert summary["files"] == [live_view.RECORDING, live_view.VIDEO, ANSWERS]
    text = "\n".join(lines)
    for answer in answers:
        said = " ".join(answer["answer"].split())
        assert f"answer after frame {answer['frame']}, {answer['time']:.2f} s: {said}\n" in text
    assert re.search(r"answers +3, mean [\d.]+ s, max [\d.]+ s", text)
    assert not list(output.glob("*.tmp*"))


def test_the_recording_holds_the_answers_at_their_frames(shown):
    output, results, _, _ = shown
    indices, times, texts = recorded(output / live_view.RECORDING, "/answer", "TextLog:text")
    answers = answers_of(output)
    assert indices == [answer["frame"] for answer in answers]
    np.testing.assert_allclose(times, [results[index].frame.time for index in indices], atol=1e-6)
    assert texts == [answer["answer"] for answer in answers]
    assert_rerun_verifies(output / live_view.RECORDING)


def test_without_a_question_nothing_is_asked_and_no_decoder_is_needed(config_for, copied, tmp_path):
    (copied / CONFIG_NAME).unlink()
    output = tmp_path / "out"
    live.stream(config_for(output, {"question": "", "checkpoint": str(copied), "record": False, "max_frames": 5}))
    assert summary_of(output)["answers"] is None
    assert not (output / ANSWERS).exists()


# Endings


def test_a_termination_signal_is_answered_and_finishes_the_file(config_for, language, tmp_path, monkeypatch):
    show = live_view.Drawing.show

    def show_and_stop(self, result):
        show(self, result)
        if result.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(live_view.Drawing, "show", show_and_stop)
    results, _, _ = run(config_for(tmp_path, {"answer.every": 0}))
    assert [answer["frames"] for answer in answers_of(tmp_path)] == [[0, 1]]
    assert [answers_of(tmp_path)[0]["answer"]] == expected_answers(language, results, {1: [0, 1]})
    assert summary_of(tmp_path)["ended"] == "stopped"


def test_a_damaged_file_is_answered_as_far_as_it_was_read(config_for, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", real_frames(2, 40)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.mp4: .*damaged or truncated after frame"):
        live.stream(config_for(tmp_path / "out", {"input": str(cut), "answer.every": 0}))
    summary = summary_of(tmp_path / "out")
    assert "damaged" in summary["ended"]
    assert [answer["frame"] for answer in answers_of(tmp_path / "out")] == [summary["frames"] - 1]
    indices, _, _ = recorded(tmp_path / "out" / live_view.RECORDING, "/answer", "TextLog:text")
    assert indices == [summary["frames"] - 1]


def test_a_stream_that_stops_before_its_first_frame_has_no_answer(config_for, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "_warm_up", lambda job: os.kill(os.getpid(), signal.SIGINT))
    live.stream(config_for(tmp_path))
    assert summary_of(tmp_path)["answers"] == {
        **{"question": QUESTION, "answers": 0, "last": None},
        "seconds": {"mean": None, "max": None},
    }
    assert "stopped: 0 frames" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {live.SUMMARY, ".lock"}


def test_an_error_after_some_answers_leaves_them(config_for, tmp_path, monkeypatch):
    show = live_view.Drawing.show

    def show_and_fail(self, result):
        show(self, result)
        if result.index == 6:
            raise live.LiveError("no space left")

    monkeypatch.setattr(live_view.Drawing, "show", show_and_fail)
    with pytest.raises(live.LiveError, match="no space left"):
        live.stream(config_for(tmp_path))
    assert [answer["frame"] for answer in answers_of(tmp_path)] == [4], "and nothing more is asked"
    assert summary_of(tmp_path)["files"][-1] == ANSWERS


# What cannot work


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("question", "  ", r"question: '  ', expected a text"),
        ("question", "What?<|im_end|>", r"question: .* holds <\|im_end\|>"),
        (
            "question",
            "What is in <|box_start|>(1,2)<|box_end|>?",
            "question: .* holds a box that is not written as one",
        ),
        ("question", "why " * 40_960, "question: 4 frames of 6 .* are too long, expected at most 40,960"),
        ("answer.every", -1, "answer.every: expected 0 or more, got -1"),
        ("answer.max_frames", 0, "answer.max_frames: expected 1 or more, got 0"),
        ("answer.max_frames", 40_960, r"answer\.max_frames\), .* are too long"),
        ("answer.max_tokens", 0, "answer.max_tokens: expected 1 or more, got 0"),
        ("height", 40, "multiples of 16, got 40 x 48"),
        ("compute_dtype", "int8", "dtype: .*int8"),
    ],
)
def test_a_field_that_cannot_work_is_one_clear_error(config_for, tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        live.stream(config_for(tmp_path / "out", {field: value}))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_decoder_is_one_clear_error(config_for, copied, tmp_path):
    (copied / CONFIG_NAME).unlink()
    with pytest.raises(WeightsError, match=rf"model: a backbone without a decoder, expected {CONFIG_NAME} in it"):
        live.stream(config_for(tmp_path / "out", {"checkpoint": str(copied)}))
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_gives_no_numbers_is_one_clear_error(config_for, checkpoint, language, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "model")
    broken = jax.tree.map(lambda leaf: leaf * np.nan, language.params)
    dataclasses.replace(language, params=broken).save_beside(copied)
    with pytest.raises(live.LiveError, match=r"question: decoder: its logits .* not finite"):
        live.stream(config_for(tmp_path / "out", {"checkpoint": str(copied)}))
