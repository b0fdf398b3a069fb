import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from omnistream_jax.utils.metrics import MetricsWriter, read_metrics


def open_writer(workdir, **options):
    return MetricsWriter(workdir, 100, terminal=io.StringIO(), **options)


def test_each_step_is_one_json_line_with_step_first_and_names_sorted(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(1, {"total": np.float32(0.5), "dino": 2})
        writer.write(2, {"total": 0.25, "dino": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "dino": 2.0, "total": 0.5}', '{"step": 2, "dino": null, "total": 0.25}']
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_resuming_takes_out_the_steps_that_will_be_done_again(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": step})
    with open_writer(tmp_path, restored_step=20) as writer:
        writer.write(30, {"loss": -30})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 10), (20, 20), (30, -30)]


def test_a_new_run_begins_with_no_lines(tmp_path):
    """Where an earlier one was stopped before its first checkpoint, with a score of what it started from."""
    for loss in (1, 2):
        with open_writer(tmp_path) as writer:
            writer.write(0, {"loss": loss})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_the_scores_of_a_finished_run_that_is_run_again_replace_the_earlier(tmp_path):
    for score in (1, 2):
        with open_writer(tmp_path, restored_step=20) as writer:
            if score == 1:
                writer.write(20, {"loss": 0.5})
                writer.write(20, {"knn": 3})
            writer.write_again(20, {"score": score})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 20, "loss": 0.5}, {"step": 20, "knn": 3}, {"step": 20, "score": 2}]


def test_a_cut_last_line_is_left_out_and_removed_at_the_next_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    with open_writer(tmp_path, restored_step=1) as writer:
        writer.write(2, {"loss": 2.0})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object with a step"):
        open_writer(tmp_path, restored_step=1)
    assert path.read_bytes() == before


def test_a_killed_process_leaves_whole_lines(tmp_path):
    program = (
        "import sys, itertools, io\n"
        "from omnistream_jax.utils.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], 10, terminal=io.StringIO())\n"
        "for step in itertools.count(1):\n"
        "    writer.write(step, {f'loss{i}': step for i in range(20)})\n"
        "    if step == 50: print('running', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"running\n"
        process.kill()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, text.count("\n") + 1))


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path, monkeypatch):
    with open_writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        lines = writer._lines

        class HalfWritten:
            name, fileno, close = lines.name, lines.fileno, lines.close

            def write(self, line):
                return lines.write(line[: len(line) // 2])

        monkeypatch.setattr(writer, "_lines", HalfWritten())
        with pytest.raises(OSError, match="disk full"):
            writer.write(2, {"loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_the_terminal_shows_progress_and_the_named_values(tmp_path):
    terminal = io.StringIO()
    with MetricsWriter(tmp_path, 40, terminal_names=("total", "absent"), terminal=terminal) as writer:
        writer.write(10, {"total": 3.21412, "other": 1.0})
    rate = r"[\d.]+ (steps/s|s/step)"
    assert re.fullmatch(rf"step 10/40 25% \| {rate} \| left \d+:\d\d \| total 3\.214\n", terminal.getvalue())


def test_the_time_left_follows_the_latest_rate(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, *np.arange(101.0, 120.0)])  # 100 s of compilation, then a step a second
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    terminal = io.StringIO()
    writer = MetricsWriter(tmp_path, 4000, terminal=terminal)
    for step in range(1, 15):
        writer._terminal.truncate(0)
        terminal.write(writer._progress(step, {}, None))
    assert terminal.getvalue().endswith("| 1.00 steps/s | left 1:06:26")


def test_tensorboard_gets_scalars_and_pictures_without_tensorflow(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_image(1, "features", np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(ValueError, match=r"'bad' must be uint8 \[height, width, 3\], got float32 \(4, 6\)"):
            writer.write_image(1, "bad", np.zeros((4, 6), np.float32))
    (events,) = os.listdir(tmp_path / "tensorboard")
    data = (tmp_path / "tensorboard" / events).read_bytes()
    assert b"loss" in data
    assert b"features" in data
    assert b"\x89PNG" in data
    assert "tensorflow" not in sys.modules
