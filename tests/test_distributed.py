"""Which launcher it is, the start and the end of many processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from process_cases import run_two

from omnistream_jax import distributed, jobs, launcher
from omnistream_jax.config import ConfigError, load
from omnistream_jax.launcher import Launch, detect, first_node, tasks_of_node

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# As seen in steps of SLURM 22.05 (tests/slurm_cases.py): two nodes, two tasks and two GPUs on each.
STEP = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[03,07]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "_NVIDIA", tmp_path / "none")


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, {}, None),
        ({"HOME": "/root", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}, {}, None),  # a pod on its own
        (PLAIN, {}, Launch("environment", 4, 2, "10.0.0.1:8476")),
        (PLAIN, {"process_id": 0}, Launch("flags", 4, 0, "10.0.0.1:8476")),
        (
            {},
            {"coordinator": "localhost:9", "process_count": 2, "process_id": 1},
            Launch("flags", 2, 1, "localhost:9", one_machine=True),
        ),
        (PLAIN | {"JAX_COORDINATOR_ADDRESS": "[fd00::1]:9"}, {}, Launch("environment", 4, 2, "[fd00::1]:9")),
        (
            PLAIN | {"JAX_COORDINATOR_ADDRESS": "head", "JAX_COORDINATOR_PORT": "9"},
            {},
            Launch("environment", 4, 2, "head:9"),
        ),
        (
            POD | {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "run-train-0-0.run:8476"},
            {},
            Launch("Kubernetes", 2, 1, "run-train-0-0.run:8476"),
        ),
        (PLAIN | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, {}, Launch("environment", 4, 2, "10.0.0.1:8476", gpus=(2, 3))),
        (STEP, {}, Launch("SLURM", 4, 3, "gpu03:61443", gpus=(1,))),
        (STEP | {"JAX_LOCAL_DEVICE_IDS": "0"}, {}, Launch("SLURM", 4, 3, "gpu03:61443", gpus=(0,))),
        (STEP | PLAIN, {}, Launch("environment", 4, 2, "10.0.0.1:8476")),  # said outright
        (STEP | {"JAX_COORDINATOR_PORT": "9"}, {}, Launch("SLURM", 4, 3, "gpu03:9", gpus=(1,))),
        (STEP | {"CUDA_VISIBLE_DEVICES": "1"}, {}, Launch("SLURM", 4, 3, "gpu03:61443", gpus=(0,))),  # --gpus-per-task
        (STEP | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, {}, Launch("SLURM", 4, 3, "gpu03:61443")),
        (  # one process for a whole node
            STEP
            | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
            | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu03"}
            | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            {},
            Launch("SLURM", 1, 0, "gpu03:61443", one_machine=True, gpus=tuple(range(8))),
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),  # a batch script's own process
        ({"SLURM_JOB_ID": "7"}, {}, None),
    ],
)
def test_every_launcher_is_told_from_its_variables(environment, flags, expected):
    assert detect(environment, **flags) == expected


def test_one_process_by_flag_gets_a_port_of_its_own():
    launch = detect(STEP, process_count=1)
    assert (launch.launcher, launch.count, launch.index, launch.one_machine) == ("flags", 1, 0, True)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", launch.coordinator)


def test_a_tpu_host_leaves_all_to_jax():
    assert detect(POD, "tpu,cpu") == Launch("TPU", None, None, None)
    assert detect({}, "cpu") is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (PLAIN | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID: expected 0 to JAX_NUM_PROCESSES - 1 = 3, got 4"),
        (PLAIN | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: expected 0 to"),
        (PLAIN | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: expected 1 or more, got 0"),
        (PLAIN | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES: expected a number, got 'four'"),
        (PLAIN | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "expected HOST:PORT, got '10.0.0.1'"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is 2, but not which of them this is: give --process_id"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID without the number of processes: give --process_count"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "not where process 0 is: give --coordinator=HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:9"}, "coordinator 10.0.0.1:9 without a number of processes"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "srun has not started this process"),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0"},
            "2 GPU.s. and 1 task.s., .* use 1",
        ),
        (STEP | {"SLURM_GPUS_ON_NODE": "3", "CUDA_VISIBLE_DEVICES": "0,1,2"}, "--ntasks-per-node=3 --gpus-per-node=3"),
        (POD, "expected JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS in its manifest"),
    ],
)
def test_half_a_launch_is_refused_by_the_name_of_what_is_missing(environment, message, monkeypatch):
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)  # of the package kubernetes
    with pytest.raises(ConfigError, match=message):
        detect(environment)


def test_with_the_package_kubernetes_jax_asks_the_cluster(monkeypatch):
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: name)
    assert detect(POD) == Launch("Kubernetes", None, 1, None, cluster="k8s")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("vm,vmb", "vm"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("gpu[12,14-16]", "gpu12"),
        ("rack[2-3]-ib,x", "rack2-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(("node", "tasks"), [("0", 8), ("1", 8), ("2", 4)])
def test_the_tasks_of_a_node(node, tasks):
    assert tasks_of_node({"SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": node}) == tasks


def test_gpus_are_counted_where_slurm_does_not_manage_them(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "_NVIDIA", tmp_path)
    for name in ("0000:1a:00.0", "0000:3d:00.0"):
        (tmp_path / name).mkdir()
    unmanaged = {name: value for name, value in STEP.items() if "GPU" not in name and "CUDA" not in name}
    assert detect(unmanaged).gpus == (1,)


@pytest.mark.parametrize(
    ("coordinator", "one_machine", "addresses", "expected"),
    [
        ("localhost:9", True, ["127.0.0.1"], "127.0.0.1:9"),
        ("node1:9", True, ["127.0.0.1"], "127.0.0.1:9"),
        ("node1:9", False, ["127.0.1.1"], None),  # Debian's hosts file: others could not reach it there
        ("node1:9", False, ["127.0.1.1", "127.0.0.1"], None),
        ("node1:9", False, ["192.0.2.1"], None),  # not an address of this machine
        ("[::1]:9", True, ["::1"], "[::1]:9"),
    ],
)
def test_process_0_listens_on_the_coordinators_address_only(monkeypatch, coordinator, one_machine, addresses, expected):
    if "::1" in addresses:
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no IPv6 loopback")
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    found = [
        (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 9))
        for address in addresses
    ]
    monkeypatch.setattr(distributed.socket, "getaddrinfo", lambda *_, **__: found)
    assert distributed.bind_address(Launch("flags", 2, 0, coordinator, one_machine)) == expected


def test_process_0_listens_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:9")
    assert distributed.bind_address(Launch("flags", 2, 0, "localhost:9", one_machine=True)) is None


# Jobs


def test_the_processes_of_an_extraction_share_its_items_and_are_not_connected(monkeypatch):
    asked, gpus = [], []
    monkeypatch.setattr(jobs.extract, "extract", lambda config, *share: asked.append(share))
    monkeypatch.setattr(distributed, "use_gpus", gpus.append)
    launch = Launch("SLURM", 4, 3, "gpu03:61443", gpus=(1,))
    jobs.run_job(ConfigDict({"job": "extract", "process_count": 0}), None, launch)
    jobs.run_job(ConfigDict({"job": "extract", "process_count": 8}), None, launch)  # the config says outright
    jobs.run_job(ConfigDict({"job": "extract", "process_count": 0}), None, None)
    assert asked == [(3, 4), (), ()]
    assert gpus == [launch]
    assert not distributed.with_others()


@pytest.mark.parametrize("job", ["stream", "plan"])
def test_jobs_for_one_process_refuse_more(job):
    with pytest.raises(ConfigError, match=f"job {job}: works in one process, got 4 by SLURM"):
        jobs.run_job(ConfigDict({"job": job}), None, Launch("SLURM", 4, 3, "gpu03:61443"))


@pytest.mark.parametrize("name", ["evaluate_geometry", "evaluate_probes", "evaluate_vos"])
def test_the_processes_of_an_evaluation_are_connected(name, monkeypatch):
    launches = []

    @contextlib.contextmanager
    def connected(launch):
        launches.append(launch)
        yield

    monkeypatch.setattr(distributed, "connected", connected)
    launch = Launch("SLURM", 4, 3, "gpu03:61443")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="expected a directory, got none"):
        jobs.run_job(load(str(CONFIGS / f"{name}.py"), {}), None, launch)
    assert launches == [launch]
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_an_evaluation_by_itself_with_75():
    with pytest.raises(SystemExit) as ended, distributed.ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 75


def test_a_workdir_is_the_output_of_a_job_that_has_one(monkeypatch):
    asked = []
    monkeypatch.setattr(jobs.extract, "extract", lambda config: asked.append(config.output))
    config = ConfigDict({"job": "extract", "output": "", "process_count": 0})
    jobs.run_job(config, "runs/features", None)
    assert asked == ["runs/features"]
    with pytest.raises(ConfigError, match="workdir: other and output: runs/features name the same; give one of them"):
        jobs.run_job(config, "other", None)


def test_a_plan_refuses_a_workdir_in_which_it_would_write_nothing():
    with pytest.raises(ConfigError, match="workdir: a plan writes nothing"):
        jobs.run_job(ConfigDict({"job": "plan"}), "runs/plan", None)


def test_an_unknown_job_is_refused_by_its_field():
    with pytest.raises(ConfigError, match=r"job: expected one of train, .*, got 'tain'"):
        jobs.check_job(ConfigDict({"job": "tain"}))


def test_a_process_by_itself_connects_to_nobody():
    with distributed.connected(None):
        assert not distributed.with_others()
    distributed.finish()


# Processes


def end_of(mode, culprit):
    """Of the process to which it happens, its status and output; of the other, also how many seconds later it ended."""
    results = run_two(mode, culprit)
    (status, marks, _), (other, told, ended) = results[culprit], results[1 - culprit]
    return (status, marks), (other, told, ended - float(re.search(r"^at ([\d.]+)", marks, re.MULTILINE)[1]))


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_of_one_process_ends_the_other_at_once_with_the_same_status(culprit):
    """Whether the other hears of it or finds the connection broken; and the data workers, which do not heed SIGTERM."""
    (status, trace), (other, told, seconds) = end_of("fails", culprit)
    assert (status, other) == (2, 2)
    assert f"error: process {culprit} on host" in told
    assert "ended with status 2; so does this one" in told
    assert "error: a file is missing on this machine" in trace
    assert seconds < 5
    first, second = (trace, told) if culprit == 0 else (told, trace)
    assert first.count("2 processes by environment, 1 cpu device each") == 1
    assert "processes by" not in second
    assert "met [0, 1]" in told
    assert "after" not in told + trace


def test_processes_whose_stderr_lies_on_a_full_disk_end_together_too():
    (status, _), (other, told, seconds) = end_of("fails mutely", culprit=0)
    assert (status, other) == (1, 1), told
    assert seconds < 5


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_killed_process_ends_the_other_within_the_heartbeat(culprit):
    (status, _), (other, told, seconds) = end_of("dies", culprit)
    assert status == -9
    assert other not in (0, None), told
    assert seconds < 15


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_process_ends_the_other_within_the_heartbeat(culprit):
    _, (other, told, seconds) = end_of("stops", culprit)
    assert other == -6  # SIGABRT, by JAX
    assert "heartbeat" in told.lower()
    assert seconds < 15


@pytest.mark.slow
def test_sigterm_to_one_process_ends_all_of_a_job_that_keeps_what_is_finished():
    (status, marks), (other, told, seconds) = end_of("terminates", 1)
    assert (status, other) == (75, 75)
    assert "SIGTERM: the run ends here; the same command goes on from what is finished" in marks
    assert "process 1 on host" in told
    assert seconds < 5


@pytest.mark.slow
def test_processes_wait_for_the_last_and_keep_their_own_statuses():
    (first, told, first_ended), (second, _, second_ended) = run_two("ends")
    assert (first, second) == (0, 3)
    assert abs(first_ended - second_ended) < 1.9
    assert "after" in told


@pytest.mark.slow
def test_unlike_device_counts_are_refused_by_every_process():
    results = run_two("ends", JAX_NUM_CPU_DEVICES="2")
    for status, output, _ in results:
        assert status != 0
        assert "the processes must have equally many devices: process 0 has 1, process 1 has 2" in output


# A step's deadline

HUNG = """
import ctypes, sys, time
from omnistream_jax.utils.step_deadline import StepDeadline
with StepDeadline(0.8, long_factor=8) as deadline:
    time.sleep(1.0)            # the first step, which compiles
    deadline.step_done()
    for _ in range(3):
        time.sleep(0.3)
        deadline.step_done()
    deadline.step_done(long=True)
    time.sleep(1.0)            # evaluators
    deadline.step_done()
    print("now", flush=True)
    def a_loader_that_hangs():
        ctypes.PyDLL(None).sleep({seconds})   # holds the interpreter's lock
    a_loader_that_hangs()
print("through")
"""


def test_a_step_beyond_its_deadline_ends_with_all_stacks_even_if_the_interpreter_is_locked():
    started = time.monotonic()
    program = textwrap.dedent(HUNG.format(seconds=30))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=25)
    assert result.returncode == 1
    assert result.stdout == "now\n"
    assert "a_loader_that_hangs" in result.stderr
    assert time.monotonic() - started < 15


def test_without_a_deadline_and_after_the_last_step_nothing_ends():
    program = HUNG.format(seconds=1).replace("StepDeadline(0.8, long_factor=8)", "StepDeadline(0)")
    after = program + "with StepDeadline(0.2, long_factor=1): pass\ntime.sleep(0.5)\nprint('alive')"
    result = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, timeout=25)
    assert (result.returncode, result.stdout) == (0, "now\nthrough\nalive\n")
