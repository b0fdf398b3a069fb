"""SIGTERM: the step is ended, saved, and the program exits with a status to start it again."""

import os
import signal
import subprocess
import sys
import threading

import jax
import pytest
from fault_cases import REPOSITORY, bits, read_until, restored, toy_config, train_toy, victim
from process_cases import run_two
from training_cases import PRETRAIN

from omnistream_jax.faults import FiniteGuard
from omnistream_jax.preemption import PreemptedError, Preemption
from omnistream_jax.utils.metrics import read_metrics

TERM = signal.SIGTERM


def terminate():
    os.kill(os.getpid(), TERM)


def test_before_the_first_step_there_is_nothing_to_save_and_the_run_ends_at_once(capfd):
    with Preemption(75), pytest.raises(PreemptedError) as caught:
        terminate()
    assert caught.value.code == 75
    assert "SIGTERM: the run ends here" in capfd.readouterr().err


def test_between_steps_the_signal_is_told_where_it_is_asked_for():
    with Preemption(75) as preemption:
        assert not preemption.reached()
        terminate()
        assert preemption.reached()
        with pytest.raises(PreemptedError):
            preemption.leave("saved")


def test_once_all_is_saved_the_run_ends_at_once_again():
    with Preemption(7) as preemption:
        assert not preemption.reached()
        preemption.nothing_to_save()
        with pytest.raises(PreemptedError) as caught:
            terminate()
    assert caught.value.code == 7
    with Preemption(7) as preemption:
        preemption.reached()
        terminate()
        with pytest.raises(PreemptedError):
            preemption.nothing_to_save()


def test_the_handler_of_before_comes_back_and_other_threads_have_none():
    before = signal.getsignal(TERM)
    with Preemption(75):
        assert signal.getsignal(TERM) != before
    assert signal.getsignal(TERM) == before

    def enter():
        with Preemption(75) as preemption:
            seen.append((signal.getsignal(TERM), preemption.reached()))

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_what_handles_failures_does_not_take_it_for_one():
    assert not issubclass(PreemptedError, Exception)


def test_a_second_signal_kills():
    program = (
        "import os, signal; from omnistream_jax.preemption import Preemption\n"
        "with Preemption(75) as preemption:\n"
        "    preemption.reached()\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == -TERM
    assert "the run ends after this step; a second one kills it" in done.stderr
    assert done.stdout == ""


def signalled_after(monkeypatch, step):
    """The process gets SIGTERM while it makes that step."""
    check = FiniteGuard.check

    def check_and_terminate(self, now, *arguments):
        if now == step:
            terminate()
        check(self, now, *arguments)

    monkeypatch.setattr(FiniteGuard, "check", check_and_terminate)


def test_a_signal_in_a_step_saves_that_step_and_the_run_goes_on_bitwise(tmp_path, monkeypatch, capfd):
    config = toy_config(checkpoint__every=100)
    with monkeypatch.context() as patch:
        signalled_after(patch, 4)
        with pytest.raises(PreemptedError) as caught:
            train_toy(config, tmp_path / "stopped")
    assert caught.value.code == 75
    assert "SIGTERM: the run ends here, saved at step 4 of 6" in capfd.readouterr().err
    assert restored(tmp_path / "stopped")[0] == 4
    train_toy(config, tmp_path / "stopped")
    train_toy(config, tmp_path / "whole")
    assert bits(restored(tmp_path / "stopped")[1]) == bits(restored(tmp_path / "whole")[1])
    rows = [row["step"] for row in read_metrics(tmp_path / "stopped" / "metrics.jsonl")]
    assert rows == [1, 2, 3, 4, 5, 6], "no step was lost, none was made twice"


def test_a_signal_in_a_step_that_is_saved_anyway_saves_it_once(tmp_path, monkeypatch):
    signalled_after(monkeypatch, 4)
    with pytest.raises(PreemptedError):
        train_toy(toy_config(checkpoint__every=2), tmp_path)
    assert restored(tmp_path)[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("mode", "told"), [("early notice", "saved at step 1"), ("late notice", "with nothing left to save")]
)
def test_a_notice_to_one_of_two_processes_at_any_time_is_heard_by_both(mode, told, culprit):
    (first, output, _), (second, other, _) = run_two(mode, culprit)
    assert (first, second) == (75, 75), output + other
    assert told in output
    assert told not in other, "one process tells it"
    assert "over" not in output + other


@pytest.mark.slow
def test_a_process_ends_with_the_status_to_requeue(tmp_path):
    with victim(tmp_path, {"steps": 100_000, "checkpoint__every": 1_000, "requeue_exit_code": 99}) as process:
        read_until(process, "step 3/")
        process.send_signal(TERM)
        lines = process.stdout.read().splitlines()
        process.wait(60)
    assert process.returncode == 99
    told = [int(line.split("/")[0].split()[1]) for line in lines if line.startswith("step ")]
    saved = restored(tmp_path)[0]
    assert saved >= 3
    assert not told or told[-1] == saved
    assert any(f"saved at step {saved} of 100000" in line for line in lines)


@pytest.mark.slow
def test_the_command_line_ends_with_the_status_to_requeue(tmp_path):
    """The real recipe at its real sizes: it takes a minute to compile."""
    command = [sys.executable, "-m", "omnistream_jax.main", f"--config={PRETRAIN}", f"--workdir={tmp_path}"]
    weights = [f"--config.tasks.{task}.weight=0" for task in ("image_ssl", "clip_ssl", "caption")]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    with subprocess.Popen(
        [*command, *weights, "--config.self_supervision.gram.weight=0", "--config.log_every=1"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        read_until(process, "step 2/")
        process.send_signal(TERM)
        output = process.stdout.read()
        process.wait(120)
    assert process.returncode == 75, output
    assert "SIGTERM: the run ends here, saved at step" in output
    assert "Traceback" not in output
    assert any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
