"""A SLURM of two nodes on this machine, from Debian's slurm-wlm and munge; nothing outside its directory is touched."""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# Nodes n0 and n1 are this machine, each with two make-believe GPUs; those of the partition "gpus" exist on paper only,
# for sbatch --test-only.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=10
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_0} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName={host}b NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=cloud[1-8] CPUs=128 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes={host},{host}b Default=YES MaxTime=INFINITE State=UP
PartitionName=gpus Nodes=cloud[1-8] MaxTime=INFINITE State=UP
"""
_GRES = """
NodeName=cloud[1-8] Name=gpu Count=8
NodeName={host},{host}b Name=gpu File=/dev/tty[1-2]
"""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A running cluster; its commands go through `run`."""

    environment: dict[str, str]

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """What a command prints, both streams."""
        result = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            **options,
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}")
        return result.stdout

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait_for(self, job: str, states: set[str], seconds: float) -> str:
        """The job's state, as soon as it is one of these."""
        end = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {state} after {seconds} s, expected one of {states}")
            time.sleep(0.5)
        return state


def missing() -> list[str]:
    """Programs that are not installed."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@contextlib.contextmanager
def one_machine_slurm(directory: Path) -> Iterator[Slurm]:
    """Starts the daemons with all their files in `directory`, and ends them."""
    host = socket.gethostname().partition(".")[0]
    for name in ("munge", "state", "spool"):
        (directory / name).mkdir(mode=0o700)
    ports = dict(zip(("port", "port_0", "port_1"), _free_ports(3), strict=True))
    (directory / "slurm.conf").write_text(_CONF.format(host=host, directory=directory, **ports))
    (directory / "gres.conf").write_text(_GRES.format(host=host))
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = dict(os.environ, SLURM_CONF=str(directory / "slurm.conf"))
    environment["PATH"] += ":/usr/sbin:/sbin"
    files = ("socket", "key-file", "log-file", "pid-file", "seed-file")
    munge = [f"--{name}={directory / 'munge' / name.removesuffix('-file')}" for name in files]
    commands = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
    commands += [["slurmd", "-D", "-N", node] for node in (host, f"{host}b")]
    daemons: list[subprocess.Popen] = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            time.sleep(1)
        slurm = Slurm(environment)
        end = time.monotonic() + 30
        while slurm.run("sinfo", "--noheader", "--format=%D %t", "--partition=main", check=False).split() != [
            "2",
            "idle",
        ]:
            if time.monotonic() > end:
                raise TimeoutError(f"SLURM has not come up: see {directory}/*.log")
            time.sleep(0.5)
        yield slurm
    finally:
        if len(daemons) == len(commands):
            subprocess.run(["scancel", "--user=root"], env=environment, timeout=30)
            time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
