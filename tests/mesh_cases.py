"""Training steps of a very small model on any mesh of fake devices, in processes of their own.

The number of devices and the width of numbers are fixed when JAX starts: `run_program` starts a Python in which
`import mesh_cases` comes first, and what imports JAX or the package after it.
"""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
BATCH = 8  # of every task: a sample for each of eight devices


def run_program(program: str, devices: int, *arguments: str, timeout: int = 600) -> str:
    """What a program prints that sees so many fake devices; its error where it fails."""
    process = _start(program, devices, arguments)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-5000:]
    return output


def run_processes(program: str, processes: int, devices: int, *arguments: str, timeout: int = 600) -> list[str]:
    """What so many processes of one `jax.distributed` job print, each with so many fake devices; Gloo prints first.

    The program starts with `mesh_cases.join()`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = {"MESH_CASES_ADDRESS": address, "MESH_CASES_PROCESSES": str(processes)}
    running = [
        _start(program, devices, arguments, cluster | {"MESH_CASES_INDEX": str(index)}) for index in range(processes)
    ]
    try:
        results = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, results, strict=True):
        assert process.returncode == 0, errors[-5000:]
    return [output for output, _ in results]


def _start(
    program: str, devices: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    environment = {
        **os.environ,
        **(environment or {}),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        # Threads of XLA's pool. By default as many as devices or cores: a device that waits for two messages at once
        # then takes a thread from another, and all wait for ever.
        "NPROC": "64",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def join() -> None:
    """Make this process one of a `jax.distributed` job of `run_processes`."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        os.environ["MESH_CASES_ADDRESS"],
        int(os.environ["MESH_CASES_PROCESSES"]),
        int(os.environ["MESH_CASES_INDEX"]),
    )


def compute_in_float64() -> None:
    """Make every number a float64, before the package is imported.

    The package and Flax name float32 where they must not compute in less; here that name means float64.
    """
    assert not {"omnistream_jax", "flax"} & sys.modules.keys()
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64


def compile_quickly() -> None:
    """Time goes into compiling, not into computing: the compiler hardly optimises."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)


def shrink_model(smallest_split: int = 128) -> None:
    """The preset "tiny" at width 32, of which "fsdp" splits every kernel."""
    from omnistream_jax import sharding
    from omnistream_jax.models import presets

    sizes = {"width": 32, "heads": 4, "mlp_width": 64}
    presets.PRESETS["tiny"] = dataclasses.replace(presets.PRESETS["tiny"], **sizes)
    sharding.SMALLEST_SPLIT = smallest_split


def mesh_config(**overrides: object):
    """`whole_config` with batches that eight devices share; `overrides` spell dotted names with "__"."""
    from training_cases import whole_config

    sizes = {f"tasks__{name}__batch_size": BATCH for name in ("image_ssl", "clip_ssl", "clip_geometry", "caption")}
    sizes |= {"tasks__caption__captions_per_row": 1, "steps": 20, "optimizer__peak": 1e-3}
    sizes["language__decoder__vocabulary_size"] = 560  # the tokenizer has 549, which nothing but 3, 9, 61 divides
    # Blocks of weight, and features that differ: else the nearest neighbours of KoLeo hang on the last bits of float32.
    sizes |= {"model__kernel_std": 0.18, "model__layer_scale": 1.0}
    return whole_config(**{**sizes, **overrides})


def losses_of(steps: int, programs: dict[str, str] | None = None, **overrides: object) -> list[dict[str, float]]:
    """The metrics of the first steps of a run, and the sum of all parameters' absolute values after them.

    The compiled programs' texts go into `programs`, by task and as "update".
    """
    import jax
    import jax.numpy as jnp

    from omnistream_jax.build import build
    from omnistream_jax.data.pipeline import build_pipeline
    from omnistream_jax.sharding import global_batch
    from omnistream_jax.step import make_accumulate, make_update, merge_metrics, zero_gradients
    from omnistream_jax.tasks.build import teacher_schedule

    config = mesh_config(**overrides)
    run = build(config)
    state, shardings = run.state, run.shardings
    accumulate = {task.name: make_accumulate(task, config.seed, shardings) for task in run.tasks}
    update = make_update(run.optimizer, teacher_schedule(config), shardings)
    gradients, rows = zero_gradients(state), []

    def compiled(name: str, program, *inputs):
        if programs is None or name in programs:
            return program
        program = program.lower(*inputs).compile()
        programs[name] = program.as_text()
        return program

    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    with build_pipeline({task.name: task.data for task in run.tasks}, seed=config.seed, **share) as pipeline:
        for _ in range(steps):
            batches, values = next(pipeline), {}
            for task in run.tasks:
                arrays = {name: array for name, array in batches[task.name].items() if name != "record"}
                inputs = state, gradients, global_batch(arrays, run.mesh)
                accumulate[task.name] = compiled(task.name, accumulate[task.name], *inputs)
                gradients, values[task.name] = accumulate[task.name](*inputs)
            inputs = state, gradients, [value["loss"] for value in values.values()]
            update = compiled("update", update, *inputs)
            state, gradients, update_values = update(*inputs)
            row = merge_metrics(run.tasks, jax.device_get(values)) | jax.device_get(update_values)
            rows.append({name: float(value) for name, value in row.items()})
    total = jax.jit(lambda tree: sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))(state.params)
    rows[-1]["parameters"] = float(total)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    return rows


def print_losses(steps: int, **overrides: object) -> None:
    """`losses_of` as a line of JSON."""
    print(json.dumps(losses_of(steps, **overrides)))


def largest_difference(rows: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> list[float]:
    """Of each step, the largest relative difference of a metric."""
    assert len(rows) == len(expected)
    assert all(row.keys() == other.keys() for row, other in zip(rows, expected, strict=True))
    return [
        max(abs(row[name] - other[name]) / max(abs(other[name]), 1e-30) for name in row)
        for row, other in zip(rows, expected, strict=True)
    ]


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One message of a compiled program.

    Attributes:
        kind: one of COLLECTIVES.
        shape: of one array of its result: XLA sends several at once, each is listed.
        group: how many devices take part together; 0 if the text does not say.
        path: where in the source's functions it comes from.
    """

    kind: str
    shape: tuple[int, ...]
    group: int
    path: str

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def collectives(program: str) -> list[Collective]:
    """What a compiled program's text sends; a message in a loop is listed once."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            path = re.search(r'op_name="([^"]*)"', line)
            shapes = re.findall(r"\b[a-z]\w*\[([\d,]*)\]", match[1])
            for shape in shapes:
                sides = tuple(int(side) for side in shape.split(",") if side)
                found.append(Collective(match[2], sides, _group_size(line), path[1] if path else ""))
    return found


def _group_size(line: str) -> int:
    """Devices of one group, in the three ways that XLA writes them."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 0
