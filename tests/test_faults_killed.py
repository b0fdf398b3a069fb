"""Runs that are killed at random moments and started again: nothing that was saved is lost, and no bit differs."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from fault_cases import REPOSITORY, bits, finish, pair, read_until, restored, victim

from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.utils.lock import WorkdirLock
from omnistream_jax.utils.metrics import read_metrics

KILLS, KILLS_IN_MID_SAVE = 20, 30
FIELDS = {"steps": 90, "checkpoint__every": 1, "checkpoint__keep_last": 2}


class Watched:
    """A process, and what it has told so far."""

    def __init__(self, process):
        self.process, self.lines = process, []
        self._reader = threading.Thread(target=lambda: self.lines.extend(process.stdout), daemon=True)
        self._reader.start()

    def told(self, pattern):
        """The numbers that follow the pattern, in order."""
        return [int(number) for line in list(self.lines) for number in re.findall(pattern, line)]

    def wait_for_steps(self, count, seconds):
        """Until it has made so many steps."""
        deadline = time.monotonic() + seconds
        while len(self.told(r"^step (\d+)/")) < count:
            assert time.monotonic() < deadline, "".join(self.lines)
            if self.process.poll() is not None:
                return
            time.sleep(0.005)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()


def unfinished(directory):
    """What saves have left that were cut off: each by its name and inode, for the next may leave the same name."""
    return {(path.name, path.stat().st_ino) for path in directory.iterdir() if "tmp" in path.name}


def kill_again_and_again(start, workdir, seed):
    """Kills the processes that `start` begins at random moments; in how many of them a save was under way."""
    chance = random.Random(seed)
    reported, in_a_save = 0, 0
    for count in range(KILLS):
        before = unfinished(workdir / "checkpoints")
        watched = [Watched(process) for process in start()]
        if count % 5 == 4:  # while it starts and restores
            time.sleep(chance.uniform(0.5, 6.0))
        else:
            watched[0].wait_for_steps(chance.randint(1, 3), seconds=240)
            time.sleep(chance.uniform(0.0, 0.15))
        chance.shuffle(watched)
        for one in watched:
            one.kill()
        output = "".join("".join(one.lines) for one in watched)
        assert all(one.process.returncode == -signal.SIGKILL for one in watched), output
        assert "damaged" not in output
        reported = max([reported, *(step for one in watched for step in one.told(r"saved step (\d+)"))])
        in_a_save += bool(unfinished(workdir / "checkpoints") - before)
        last = restored(workdir)
        assert (last[0] if last else 0) >= reported, "a checkpoint that was reported as saved is lost"
    return in_a_save


def assert_same_end(workdir, undisturbed):
    (step, state, metadata), (_, expected, _) = restored(workdir), restored(undisturbed)
    assert step == FIELDS["steps"]
    assert bits(state) == bits(expected)
    assert metadata["counters"] == {"skipped_steps": 0, "skipped_in_a_row": 0, "failed_saves": 0}
    losses, again = ([row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (undisturbed, workdir))
    assert again == losses
    assert not [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]


@pytest.mark.slow
def test_a_process_killed_20_times_ends_with_the_same_bits(tmp_path):
    finish(victim(tmp_path / "undisturbed", FIELDS))
    workdir = tmp_path / "killed"
    (workdir / "checkpoints").mkdir(parents=True)
    in_a_save = kill_again_and_again(lambda: [victim(workdir, FIELDS)], workdir, seed=1)
    finish(victim(workdir, FIELDS))
    assert_same_end(workdir, tmp_path / "undisturbed")
    assert in_a_save > 0, "no kill fell into a save"


@pytest.mark.slow
def test_two_processes_killed_20_times_end_with_the_same_bits(tmp_path):
    fields = {**FIELDS, "mesh__fsdp": 2}
    finish(*pair(tmp_path / "undisturbed", fields))
    workdir = tmp_path / "killed"
    (workdir / "checkpoints").mkdir(parents=True)
    in_a_save = kill_again_and_again(lambda: pair(workdir, fields), workdir, seed=2)
    finish(*pair(workdir, fields))
    assert_same_end(workdir, tmp_path / "undisturbed")
    assert in_a_save > 0, "no kill fell into a save"


SAVING = """
import sys, itertools, jax, jax.numpy as jnp
from omnistream_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_last=2)
shape = jax.ShapeDtypeStruct((1000, 500), jnp.float32)
found = checkpoints.restore_latest({'x': shape})
for step in itertools.count(found[0] + 1 if found else 1):
    print('saving', step, flush=True)
    checkpoints.save(step, {'x': jnp.full(shape.shape, step, jnp.float32)})
    checkpoints.wait()
    print('saved', step, flush=True)
"""


@pytest.mark.slow
def test_killed_30_times_in_mid_save_the_last_committed_step_is_restored(tmp_path):
    chance, committed, interrupted = random.Random(0), 0, 0
    for _ in range(KILLS_IN_MID_SAVE):
        before = unfinished(tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        with process:
            lines = [line for _ in range(chance.randint(1, 3)) for line in read_until(process, "saving")]
            time.sleep(chance.uniform(0.0, 0.05))
            process.kill()
            lines += process.stdout
        saved = [int(step) for step in re.findall(r"^saved (\d+)$", "".join(lines), re.MULTILINE)]
        committed = max([committed, *saved])
        shape = jax.ShapeDtypeStruct((1000, 500), np.float32)
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            found = checkpoints.restore_latest({"x": shape})
        interrupted += bool(unfinished(tmp_path) - before)
        if found is None:
            assert committed == 0
            continue
        step, state, _ = found
        assert step >= committed
        np.testing.assert_array_equal(state["x"], np.full((1000, 500), step, np.float32))
    assert committed > 0, "no kill came after a whole save"
    assert interrupted >= KILLS_IN_MID_SAVE // 6, "the kills did not fall into saves"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one", "all"])
def test_a_signal_to_one_of_two_processes_or_to_both_saves_the_same_step_in_both(tmp_path, who):
    fields = {"steps": 100_000, "checkpoint__every": 100_000, "mesh__fsdp": 2}
    processes = pair(tmp_path, fields)
    read_until(processes[0], "step 3/")
    for process in processes[:1] if who == "one" else reversed(processes):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    outputs = finish(*processes, status=75, timeout=60)
    saved = restored(tmp_path)[0]
    assert f"saved at step {saved} of 100000" in outputs[0]
    told = [int(step) for step in re.findall(r"^step (\d+)/", outputs[0], re.MULTILINE)]
    assert told[-1] == saved, "no step was made and not saved"


@pytest.mark.slow
def test_two_processes_in_a_workdir_that_is_in_use_both_end_at_once(tmp_path):
    with WorkdirLock(tmp_path):
        processes = pair(tmp_path, {"steps": 10})
        outputs = finish(*processes, status=1, timeout=120)
    for output in outputs:
        assert f"WorkdirLockedError: working directory {tmp_path} is in use by process {os.getpid()}" in output
    assert os.listdir(tmp_path) == [".lock"]
