"""Victims: the real loop, pipeline, checkpoints and handlers around tasks that compile in no time.

As a program, `python tests/fault_victim.py WORKDIR JSON` runs one; see there.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from training_cases import REPOSITORY, small_config

from omnistream_jax import train as train_lib
from omnistream_jax.build import Run
from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.sources import embedded_source
from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.flops import Flops
from omnistream_jax.sharding import make_mesh
from omnistream_jax.step import init_state
from omnistream_jax.tasks.build import build_backbone, build_optimizer
from omnistream_jax.utils.trees import named_leaves

_SIDE, _WIDTH = 32, 32
TASKS = ("first", "second", "third")


@dataclasses.dataclass(frozen=True)
class PoisonedData(SelfSupervisedData):
    """Crops of photographs, and of each step (counted from 1) factors that make its loss or its gradient NaN.

    `missing`: (process, step) that cannot be read.
    """

    bad_losses: tuple[int, ...] = ()
    bad_gradients: tuple[int, ...] = ()
    missing: tuple[tuple[int, int], ...] = ()

    def dataset(self, seed, process_index, process_count):
        poison = functools.partial(self._poison, process_index)
        return super().dataset(seed, process_index, process_count).map_with_index(poison)

    def _poison(self, process, index, batch):
        if [process, index + 1] in [list(place) for place in self.missing]:
            raise DataError(f"step {index + 1} is missing in process {process}")
        rows = len(batch["record"])
        loss = np.full(rows, np.nan if index + 1 in self.bad_losses else 1, np.float32)
        gradient = np.full(rows, 0 if index + 1 in self.bad_gradients else 1, np.float32)
        return {**batch, "loss_factor": loss, "gradient_factor": gradient}


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """Two views of a photograph are to be alike after a linear map, with noise of the step."""

    name: str
    data: PoisonedData
    weight: float = 1.0
    has_teacher: bool = True
    micro_batches: int = 1
    heads: Mapping = dataclasses.field(default_factory=dict)

    def loss(self, params, teachers, batch, key):
        w = params["backbone"]["w"]
        views = batch["global_crops"].astype(jnp.float32).reshape(len(batch["global_crops"]), 2, -1) / 255
        student = (views[:, 0] + 0.1 * jax.random.normal(key, views[0, 0].shape)) @ w
        teacher = views[:, 1] @ teachers.ema["backbone"]["w"]
        # The root of a sum of squares of zeros: a number whose gradient is none.
        root = jnp.sqrt(jnp.sum((w * batch["gradient_factor"].mean()) ** 2))
        return jnp.mean((student - teacher + 1.0) ** 2) * batch["loss_factor"].mean() + 1e-3 * root, {}


def toy_build(config: ConfigDict, poison: Mapping[str, Mapping[str, tuple]] | None = None) -> Run:
    """What `build` returns, of toy tasks beside a backbone that none uses; `poison`: {task: {"bad_losses": steps}}."""
    sources = (embedded_source("images", "train"),)
    options = {"global_batch_size": 8, "global_size": _SIDE, "local_size": 16, "local_crops": 1}
    poison = poison or {}
    data = {name: PoisonedData(sources, **options, **poison.get(name, {})) for name in TASKS}
    tasks = [ToyTask(name, data[name]) for name in TASKS]
    mesh, optimizer = make_mesh(**config.mesh), build_optimizer(config)
    w = 0.02 * jax.random.normal(jax.random.key(config.seed), (3 * _SIDE**2, _WIDTH))
    params = {"backbone": {"w": w}}
    state = init_state(params, tasks, optimizer, None, mesh)
    return Run(build_backbone(config), tasks, optimizer, mesh, {}, state)


def toy_config(**overrides: object) -> ConfigDict:
    """Of a toy run."""
    fields = {"steps": 6, "checkpoint__every": 1, "optimizer__warmup_steps": 2, "optimizer__peak": 1e-2, **overrides}
    return small_config(**fields)


def train_toy(config: ConfigDict, workdir: Path, poison: Mapping | None = None) -> None:
    """Trains a toy by the real `train`, without the report at the end and the count of a task's FLOPs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "build", lambda config: toy_build(config, poison))
        patch.setattr(train_lib, "report", lambda *_: None)
        patch.setattr(train_lib, "task_flops", lambda _: Flops())
        train_lib.train(config, workdir)


def bits(tree: object) -> dict[str, bytes]:
    """The bits of every array of a state, by name."""
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree).items()}


def restored(workdir: Path, config: ConfigDict | None = None) -> tuple[int, object, dict]:
    """Step, state and metadata of a toy run's last whole checkpoint, without touching it."""
    state = toy_build(config or toy_config()).state
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_latest(state)


def victim(workdir: Path, fields: Mapping[str, object], *distributed: int, **environment: str) -> subprocess.Popen:
    """A toy run as a process of its own; its output is one stream of lines.

    `distributed`: port, number of processes and index of one of several; `environment` beside ours.
    """
    program = str(REPOSITORY / "tests" / "fault_victim.py")
    arguments = [sys.executable, program, str(workdir), json.dumps(fields), *map(str, distributed)]
    cache = jax.config.jax_compilation_cache_dir or ""
    return subprocess.Popen(
        arguments,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )


def pair(workdir: Path, fields: Mapping[str, object], **environment: str) -> list[subprocess.Popen]:
    """Two processes of one run."""
    port = free_port()
    return [victim(workdir, fields, port, 2, index, **environment) for index in range(2)]


def free_port() -> int:
    """One that nobody listens at, for a while."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(*processes: subprocess.Popen, status: int = 0, timeout: float = 300) -> list[str]:
    """The outputs of processes that run side by side; AssertionError where one ends with another status."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=timeout)[0], processes))
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def read_until(process: subprocess.Popen, text: str) -> list[str]:
    """The lines of its output up to the first that holds the text; AssertionError where it ends before."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} is not in:\n{''.join(lines)}")


@contextlib.contextmanager
def mounted_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size; skips the test where none can be mounted."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leaves so many bytes free."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb") as file:
        file.write(bytes(max(shutil.disk_usage(disk).free - leave, 0)))
