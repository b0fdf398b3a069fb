"""Which launcher started this process, and as which of how many; nothing here asks JAX or touches a device.

flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID      as they say
TPU                  JAX asks the TPU's own services
SLURM                a step started by srun: SLURM_PROCID of SLURM_NTASKS, process 0 on the step's first node
Kubernetes           an Indexed Job or JobSet: JOB_COMPLETION_INDEX; the rest from JAX_... variables in its manifest
                     (launch/jobset.yaml), or by JAX from the cluster's API with the package kubernetes
"""

import dataclasses
import importlib.util
import ipaddress
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from omnistream_jax.config import ConfigError

_NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where this process stands among those of its run.

    Attributes:
        launcher: who started it, for messages: "SLURM", "Kubernetes", "TPU", "flags", "environment".
        count, index: how many processes there are, and which this is; None where JAX must ask the cluster.
        coordinator: "host:port" of process 0; None where JAX must ask the cluster.
        one_machine: all processes are known to run on one machine.
        gpus: which of the GPUs that are visible here are this process's; None: all, or none.
        cluster: JAX's name of the detection that finds out what is None; None: whichever applies.
    """

    launcher: str
    count: int | None
    index: int | None
    coordinator: str | None
    one_machine: bool = False
    gpus: tuple[int, ...] | None = None
    cluster: str | None = None


def detect(
    environment: Mapping[str, str],
    platforms: str | None = None,
    *,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """Who started this process, and as which of how many; None for one that runs alone.

    Args:
        environment: as os.environ.
        platforms: `jax.config.jax_platforms`: "tpu,..." on a TPU's host.
        coordinator, process_count, process_id: the flags; they come before the variables, and both before launchers.

    Raises ConfigError, naming the flag or variable, where what is given is not enough or cannot be.
    """
    in_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    flags_given = any(value is not None for value in (coordinator, process_count, process_id))
    count = _number("--process_count", process_count) or _number_of(environment, "JAX_NUM_PROCESSES")
    index = _number("--process_id", process_id) or _number_of(environment, "JAX_PROCESS_ID")
    address = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if count or index:
        if index is None and in_job:
            index = _number_of(environment, "JOB_COMPLETION_INDEX")
        launcher = "flags" if flags_given else "Kubernetes" if in_job else "environment"
        launch = _explicit(launcher, count, index, address, environment.get("JAX_COORDINATOR_PORT"))
        return dataclasses.replace(launch, gpus=_chosen_gpus(environment))
    if "tpu" in (platforms or "").split(","):
        return Launch("TPU", None, None, address)
    if "SLURM_JOB_ID" in environment:
        return _slurm(environment, address)
    if in_job:
        return _kubernetes(environment, address)
    if address:
        raise ConfigError(
            f"coordinator {address} without a number of processes: give --process_count and --process_id, or "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    return None


def _number(name: str, value: int | str | None) -> tuple[str, int] | None:
    """A flag or variable with its value as a number."""
    if value is None:
        return None
    try:
        return name, int(value)
    except ValueError:
        raise ConfigError(f"{name}: expected a number, got {value!r}") from None


def _number_of(environment: Mapping[str, str], name: str) -> tuple[str, int] | None:
    return _number(name, environment.get(name))


def _explicit(
    launcher: str,
    count: tuple[str, int] | None,
    index: tuple[str, int] | None,
    coordinator: str | None,
    port: str | None,
) -> Launch:
    if count is None:
        raise ConfigError(f"{index[0]} without the number of processes: give --process_count or JAX_NUM_PROCESSES")
    if count[1] < 1:
        raise ConfigError(f"{count[0]}: expected 1 or more, got {count[1]}")
    if index is None and count[1] > 1:
        raise ConfigError(
            f"{count[0]} is {count[1]}, but not which of them this is: give --process_id or JAX_PROCESS_ID"
        )
    name, number = index or ("--process_id", 0)
    if not 0 <= number < count[1]:
        raise ConfigError(f"{name}: expected 0 to {count[0]} - 1 = {count[1] - 1}, got {number}")
    if coordinator is None:
        if count[1] > 1:
            raise ConfigError(
                f"{count[0]} is {count[1]}, but not where process 0 is: give --coordinator=HOST:PORT or "
                "JAX_COORDINATOR_ADDRESS"
            )
        return Launch(launcher, 1, 0, f"127.0.0.1:{free_port()}", one_machine=True)
    if not re.fullmatch(r".+:\d+", coordinator) and port:
        coordinator = f"{coordinator}:{port}"
    if not re.fullmatch(r"([^:]+|\[[0-9a-fA-F:.]+\]):\d+", coordinator):
        raise ConfigError(f"--coordinator, JAX_COORDINATOR_ADDRESS: expected HOST:PORT, got {coordinator!r}")
    return Launch(launcher, count[1], number, coordinator, one_machine=is_loopback(coordinator.rpartition(":")[0]))


def _slurm(environment: Mapping[str, str], coordinator: str | None) -> Launch | None:
    """JAX would find the same processes, but of several GPUs it would give each process one."""
    count = _number_of(environment, "SLURM_NTASKS")
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        if count and count[1] > 1:
            raise ConfigError(
                f"SLURM_NTASKS is {count[1]}, but srun has not started this process: start it with srun, as "
                "launch/slurm.sbatch does, or as one process with --process_count=1"
            )
        return None
    index = _number_of(environment, "SLURM_PROCID")
    if count is None or not 0 <= index[1] < count[1]:
        raise ConfigError(f"SLURM_PROCID is {index[1]}: expected 0 to SLURM_NTASKS - 1, SLURM_NTASKS is {count}")
    if coordinator is None:
        job = _number_of(environment, "SLURM_JOB_ID")[1]
        # One port for each job, above those that Linux gives to clients (the same as JAX's choice).
        port = environment.get("JAX_COORDINATOR_PORT") or 61_440 + job % 4_096
        coordinator = f"{first_node(environment['SLURM_STEP_NODELIST'])}:{port}"
    nodes = _number_of(environment, "SLURM_STEP_NUM_NODES")
    one_machine = nodes is not None and nodes[1] == 1
    gpus = _chosen_gpus(environment) or _gpus_of_task(environment)
    return Launch("SLURM", count[1], index[1], coordinator, one_machine, gpus)


def first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu03" of "gpu[03-07,12],login1"."""
    prefix, number, suffix = re.fullmatch(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?.*", nodes).groups()
    return prefix + (number or "") + (suffix or "")


def _chosen_gpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """JAX reads the variable too, but only where jax.distributed is started."""
    chosen = environment.get("JAX_LOCAL_DEVICE_IDS")
    return tuple(_number("JAX_LOCAL_DEVICE_IDS", number)[1] for number in chosen.split(",")) if chosen else None


def _gpus_of_task(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's share of the GPUs that it sees; SLURM binds GPUs to tasks only when it is told to."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        seen = len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    else:
        seen = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
    if seen == 0:
        return None
    tasks = tasks_of_node(environment)
    given = _number_of(environment, "SLURM_GPUS_ON_NODE")
    if tasks == 1 or (given and seen < given[1]):  # SLURM has bound them
        used, gpus = seen * tasks, tuple(range(seen))
    else:
        share, local = seen // tasks, _number_of(environment, "SLURM_LOCALID")[1]
        used, gpus = share * tasks, tuple(range(local * share, (local + 1) * share))
    expected = given[1] if given else seen
    if used != expected or not gpus:
        raise ConfigError(
            f"SLURM gives this node {expected} GPU(s) and {tasks} task(s), which would use {used}: start one task per "
            f"GPU (--ntasks-per-node={expected} --gpus-per-node={expected})"
        )
    return gpus


def tasks_of_node(environment: Mapping[str, str]) -> int:
    """How many tasks of the step run on this node: of SLURM's "8(x2),4", 8 on nodes 0 and 1, and 4 on node 2."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    counts: list[int] = []
    for part in text.split(","):
        tasks, repeats = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(tasks)] * int(repeats or 1)
    node = _number_of(environment, "SLURM_NODEID")
    return counts[node[1] if node else 0]


def _kubernetes(environment: Mapping[str, str], coordinator: str | None) -> Launch:
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "a pod of an Indexed Job (JOB_COMPLETION_INDEX is set): expected JAX_NUM_PROCESSES and "
            "JAX_COORDINATOR_ADDRESS in its manifest, as in launch/jobset.yaml (or the package kubernetes, and "
            "permission to ask the cluster); JAX_NUM_PROCESSES=1 for a pod on its own"
        )
    return Launch("Kubernetes", None, _number_of(environment, "JOB_COMPLETION_INDEX")[1], coordinator, cluster="k8s")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means the machine itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
