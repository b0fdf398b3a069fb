"""The compiled programs of a training step: all compiled before the first step, side by side, and what they need."""

import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from omnistream_jax.utils.files import write_json


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, and its memory in bytes on each device.

    Attributes:
        name: of the task whose gradient it adds, or "update".
        seconds: that its compilation took, others beside it; next to nothing from the cache.
        arguments: what lies there while it runs: state, gradients and its batch. XLA's own number leaves out what the
            program does not read, as the optimiser's moments while a task runs.
        outputs: what it gives and does not write into what it takes.
        temporaries: what it needs besides while it runs.
        code: of the program itself, where it lies on the device.
    """

    name: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def memory(self) -> int:
        """All together: the device must have as much."""
        return self.arguments + self.outputs + self.temporaries + self.code


def compile_step(
    accumulate: Mapping[str, Callable],
    update: Callable,
    state: Any,
    gradients: Any,
    batches: Mapping[str, Mapping[str, jax.Array]],
) -> list[Program]:
    """Compiles the programs of a step, as many at once as there are cores; the jitted functions then run them.

    XLA compiles without Python's lock, so that one program is traced while others are compiled. What is compiled here
    lies in the functions' own caches: calling them with such arguments compiles nothing more.

    Args:
        accumulate: task name -> jitted (state, gradients, batch) -> (gradients, {"loss": ..., ...}).
        update: jitted (state, gradients, losses) -> ...
        state, gradients, batches: as for the first step; nothing is run or donated. On a mesh, losses are whole on
            every device.

    Returns:
        The programs, `update` last.
    """
    losses, started = [], {}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)), "compile") as pool:
        for name, function in accumulate.items():
            arguments = (state, gradients, batches[name])
            lowered = function.lower(*arguments)
            losses.append(_whole(lowered.out_info[1]["loss"], gradients))
            started[name] = pool.submit(_compile, name, lowered, device_bytes(arguments))
        arguments = (state, gradients, losses)
        started["update"] = pool.submit(_compile, "update", update.lower(*arguments), device_bytes(arguments))
        return [future.result() for future in started.values()]


def _whole(info: Any, gradients: Any) -> jax.ShapeDtypeStruct:
    """What a program will give, whole on every device of the mesh of `gradients`, if they are on one."""
    place = jax.tree.leaves(gradients)[0].sharding
    place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None
    return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=place)


def device_bytes(arrays: Any) -> int:
    """Of a tree of arrays, or of what stands for them, on each device."""

    def local(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(local(leaf) for leaf in jax.tree.leaves(arrays))


def _compile(name: str, lowered: jax.stages.Lowered, arguments: int) -> Program:
    started = time.monotonic()
    compiled = lowered.compile()
    return read_program(name, compiled, arguments, time.monotonic() - started)


def read_program(name: str, compiled: jax.stages.Compiled, arguments: int, seconds: float) -> Program:
    """What XLA tells of a program that took `seconds` to compile; arguments: `device_bytes` of what it takes."""
    stats = compiled.memory_analysis()
    return Program(
        name=name,
        seconds=seconds,
        arguments=arguments,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def table(programs: Sequence[Program], flops: Mapping[str, float]) -> str:
    """For the terminal, a line a program; flops: of the model, for the programs that have any, all devices together.

    program              memory    arguments    temporary  model GFLOP  compiled in
    caption          1,421.0 MB     350.0 MB   1,070.0 MB        512.4        9.1 s
    """

    def line(name: str, *cells: str) -> str:
        return f"{name:14}" + "".join(f"{cell:>13}" for cell in cells)

    lines = [line("program", "memory", "arguments", "temporary", "model GFLOP", "compiled in")]
    for program in programs:
        memory = (_megabytes(size) for size in (program.memory, program.arguments, program.temporaries))
        count = f"{flops[program.name] / 1e9:,.1f}" if program.name in flops else ""
        lines.append(line(program.name, *memory, count, f"{program.seconds:.1f} s"))
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def write_programs(path: Path, programs: Sequence[Program], flops: Mapping[str, float], devices: int) -> None:
    """The same as JSON: {"device": ..., "devices": ..., "jax": ..., "programs": {name: {"memory": bytes, ...}}}."""
    rows = {
        program.name: {
            **{key: value for key, value in dataclasses.asdict(program).items() if key != "name"},
            "memory": program.memory,
            "model_flops": flops.get(program.name, 0.0),
        }
        for program in programs
    }
    device = jax.devices()[0].device_kind
    write_json(path, {"device": device, "devices": devices, "jax": jax.__version__, "programs": rows})
