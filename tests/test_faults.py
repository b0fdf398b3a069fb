"""What a run outlives: numbers that are not finite, a full disk, workers that die, a second writer."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from fault_cases import REPOSITORY, bits, fill, mounted_disk, read_until, restored, toy_config, train_toy, victim

from omnistream_jax import checkpoint as checkpoint_lib
from omnistream_jax import train as train_lib
from omnistream_jax.checkpoint import CheckpointError, Checkpoints, SaveFailedError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.sources import embedded_source
from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.faults import Counters, FiniteGuard, Saver
from omnistream_jax.train import TrainingError
from omnistream_jax.utils import agreement
from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError
from omnistream_jax.utils.metrics import read_metrics

# Numbers that are not finite


@pytest.mark.parametrize(
    ("poison", "told"),
    [("bad_losses", "the loss of second is not finite"), ("bad_gradients", "the gradient is not finite")],
)
def test_a_bad_number_in_one_of_three_tasks_skips_the_whole_step_bitwise(tmp_path, caplog, poison, told):
    train_toy(toy_config(steps=3), tmp_path, {"second": {poison: (3,)}})
    step, state, metadata = restored(tmp_path)
    assert step == 3
    assert int(state.step) == 2
    assert metadata["counters"] == {"skipped_steps": 1, "skipped_in_a_row": 1, "failed_saves": 0}
    assert f"step 3: {told}; the update was not made (1 in a row, 1 in all)" in caplog.text
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    step, before, _ = restored(tmp_path)
    assert step == 2
    assert bits(state) == bits(before), "the state after the skipped step is the one before it"


def test_training_goes_on_after_skipped_steps_and_a_good_one_ends_a_row(tmp_path):
    train_toy(
        toy_config(max_nonfinite_steps=2), tmp_path, {"first": {"bad_losses": (2, 3)}, "third": {"bad_losses": (5,)}}
    )
    step, state, metadata = restored(tmp_path)
    assert (step, int(state.step)) == (6, 3)
    assert metadata["counters"] == {"skipped_steps": 3, "skipped_in_a_row": 0, "failed_saves": 0}
    assert all(np.isfinite(np.asarray(state.params["backbone"]["w"])).ravel())


def test_too_many_in_a_row_stop_and_name_their_batches_and_starting_again_forgets_none(tmp_path):
    config, poison = toy_config(max_nonfinite_steps=2), {"second": {"bad_losses": (3, 4, 5)}}
    with pytest.raises(
        TrainingError, match=r"step 5: the loss of second is not finite; .*3 in a row, 3 in all"
    ) as error:
        train_toy(config, tmp_path, poison)
    assert ".jpg" in str(error.value)
    path = tmp_path / "nonfinite_steps.json"
    assert str(path) in str(error.value)
    rows = json.loads(path.read_text())
    assert [row["step"] for row in rows] == [3, 4, 5]
    assert rows[0]["losses"]["second"] == "nan"
    assert rows[0]["losses"]["first"] > 0
    assert len(rows[0]["batches"]["second"]["records"]) == 8
    assert all(name.endswith(".jpg") for name in rows[0]["batches"]["second"]["files"])

    path.unlink()
    with pytest.raises(TrainingError, match=r"step 5: .*3 in a row, 3 in all"):  # from the checkpoint of step 4
        train_toy(config, tmp_path, poison)
    assert [row["step"] for row in json.loads(path.read_text())] == [5]
    step, state, _ = restored(tmp_path)
    assert (step, int(state.step)) == (4, 2)


class FullDisk:
    """Checkpoints that are never saved."""

    def wait(self):
        return None

    def save(self, step, *_):
        raise SaveFailedError(f"step {step} could not be saved")


@pytest.mark.parametrize(("process", "lines"), [(0, 2), (1, 0)])
def test_what_every_process_knows_is_told_by_the_first_alone(tmp_path, monkeypatch, caplog, process, lines):
    monkeypatch.setattr(agreement, "jax", types.SimpleNamespace(process_index=lambda: process))
    FiniteGuard(Counters(), 1, tmp_path).check(1, {"first": math.nan}, 1.0, dict)
    Saver(FullDisk(), Counters(), print, last_saved=0).save(1, {}, {})
    assert [record.getMessage().startswith("step 1") for record in caplog.records] == [True] * lines


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    with mounted_disk(tmp_path / "disk", megabytes=12) as disk:
        yield disk


def unaware(monkeypatch):
    """Saving does not know how much is free, as under a quota."""
    monkeypatch.setattr(checkpoint_lib, "_check_space", lambda *_: None)


def noise(step):
    return {"x": np.random.default_rng(step).integers(0, 2**32, 500_000, np.uint32)}  # 2 MB that cannot be compressed


def save_and_wait(checkpoints, step):
    checkpoints.save(step, noise(step))
    checkpoints.wait()


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("leave", [0, 100_000, 1_000_000])
def test_a_full_disk_fails_one_save_and_leaves_the_others_whole(small_disk, monkeypatch, leave, knows):
    if not knows:
        unaware(monkeypatch)
    with Checkpoints(small_disk / "checkpoints", keep_last=2) as checkpoints:
        checkpoints.save(1, noise(1))
        assert checkpoints.wait() == 1
        fill(small_disk, leave)
        before = {path: path.read_bytes() for path in (small_disk / "checkpoints" / "1").rglob("*") if path.is_file()}
        message = "MB are needed" if knows else "(RESOURCE_EXHAUSTED|No space left)"
        with pytest.raises(SaveFailedError, match=f"step 2 could not be saved in .*{message}"):
            save_and_wait(checkpoints, 2)
        assert os.listdir(small_disk / "checkpoints") == ["1"]
        assert {path: path.read_bytes() for path in before} == before
        (small_disk / "ballast").unlink()
        for step in (3, 4):
            checkpoints.save(step, noise(step))
            assert checkpoints.wait() == step
        assert checkpoints.steps() == [3, 4]
        step, state, _ = checkpoints.restore_latest(noise(0))
        assert step == 4
        np.testing.assert_array_equal(state["x"], noise(4)["x"])


def test_a_run_goes_on_over_a_full_disk(small_disk, monkeypatch, caplog):
    save = Saver.save

    def save_on_a_full_disk(self, step, *arguments):
        if step == 3:
            assert self.finish() == 2
            fill(small_disk, 0)
        if step == 5:
            (small_disk / "ballast").unlink()
        save(self, step, *arguments)

    monkeypatch.setattr(Saver, "save", save_on_a_full_disk)
    train_toy(toy_config(checkpoint__keep_last=2), small_disk / "run")
    step, _, metadata = restored(small_disk / "run")
    assert step == 6
    assert metadata["counters"]["failed_saves"] == 2
    assert "step 3 could not be saved" in caplog.text
    assert "The run goes on; step 2 is the last one saved" in caplog.text
    assert [row["step"] for row in read_metrics(small_disk / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_from_the_start_is_one_clear_error(small_disk):
    fill(small_disk, 0)
    with pytest.raises(TrainingError, match=r"No space left on device.*the same command goes on from there"):
        train_toy(toy_config(steps=2), small_disk / "run")
    names = [path.name for path in (small_disk / "run").rglob("*")]
    assert not [name for name in names if name.endswith(".json")], "no half-written file"


def test_three_failed_saves_in_a_row_stop_the_run_with_the_last_good_checkpoint_whole(small_disk, monkeypatch):
    unaware(monkeypatch)
    save = Saver.save

    def save_on_a_full_disk(self, step, *arguments):
        if step == 3:
            assert self.finish() == 2
            fill(small_disk, 0)
        save(self, step, *arguments)

    monkeypatch.setattr(Saver, "save", save_on_a_full_disk)
    with pytest.raises(CheckpointError, match="3 saves in a row have failed; step 2 is the last one saved"):
        train_toy(toy_config(steps=20), small_disk / "run")
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    assert restored(small_disk / "run")[0] == 2
    train_toy(toy_config(steps=20), small_disk / "run")
    train_toy(toy_config(steps=20), small_disk.parent / "undisturbed")
    assert bits(restored(small_disk / "run")[1]) == bits(restored(small_disk.parent / "undisturbed")[1])


# Workers that die


def photographs():
    source = embedded_source("images", "train")
    return {"image": SelfSupervisedData((source,), 4, global_size=32, local_size=16)}


def draw(count, kill_before=(), **options):
    steps = []
    with build_pipeline(photographs(), seed=3, **options) as pipeline:
        for step in range(count):
            if step in kill_before:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)
            steps.append(next(pipeline))
        return steps, pipeline.skipped


def test_killed_workers_are_started_anew_and_give_the_same_batches(caplog):
    steps, skipped = draw(9, kill_before=(2, 6), workers=2, prefetch=1)
    expected, _ = draw(9)
    for ours, theirs in zip(steps, expected, strict=True):
        for name, value in theirs["image"].items():
            np.testing.assert_array_equal(ours["image"][name], value, err_msg=name)
    assert "a data worker died" in caplog.text
    assert "exit code -9" in caplog.text
    assert skipped == {}


def test_workers_that_die_again_and_again_stop_the_run():
    with pytest.raises(DataError, match=r"step \d: a data worker died .*2 times in a row: it ran out of memory"):
        draw(40, kill_before=range(40), workers=1, prefetch=1, max_restarts=1)


def test_workers_outlive_a_signal_to_the_whole_job_and_not_the_process_that_they_work_for():
    program = (
        "import sys, time, multiprocessing; sys.path.insert(0, 'tests')\n"
        "from omnistream_jax.data.pipeline import build_pipeline\n"
        "from test_faults import photographs\n"
        "if __name__ == '__main__':\n"
        "    with build_pipeline(photographs(), seed=3, workers=2, prefetch=1) as pipeline:\n"
        "        for _ in range(2): next(pipeline)\n"
        "        print('workers', *(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "        sys.stdin.readline()\n"
        "        for _ in range(6): next(pipeline)\n"
        "        print('still here', flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()[1:]]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still here\n"
        shared = {name for pid in (process.pid, *workers) for name in shared_memory(pid)}
        process.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert shared
    assert not shared & set(os.listdir("/dev/shm")), "the memory that they shared is given back"


def shared_memory(pid: int) -> list[str]:
    """Names of the segments that a process has in its memory."""
    return re.findall(r" /dev/shm/(\S+)", Path(f"/proc/{pid}/maps").read_text())


# A second writer


def test_a_second_run_in_a_workdir_is_refused_before_it_builds_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lib, "build", lambda _: pytest.fail("it has begun to build"))
    with WorkdirLock(tmp_path):
        begun = time.monotonic()
        with pytest.raises(WorkdirLockedError, match=f"in use by process {os.getpid()}"):
            train_lib.train(toy_config(), tmp_path)
        assert time.monotonic() - begun < 1
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_trains_on(tmp_path):
    with victim(tmp_path, {"steps": 100_000}) as first:
        read_until(first, "step 2/")
        with victim(tmp_path, {"steps": 100_000}) as second:
            read_until(second, f"in use by process {first.pid} on host")
        assert second.returncode != 0
        read_until(first, "saved step")
        first.kill()
