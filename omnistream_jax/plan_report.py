"""What a plan of a training step holds, and how it is told; plan.py makes it."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from omnistream_jax.programs import Program
from omnistream_jax.roofline import UTILISATION, Messages, Times
from omnistream_jax.topology import Topology


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """One program of a step.

    Attributes:
        name: of the task whose gradient it adds, or "update".
        program: its memory; None: the compiler refused it, since it does not fit.
        needs: bytes of memory a device; of a refused one, what the compiler said.
        flops: of the model, all devices together.
        messages: what it sends; None of a refused one.
        times: what it takes at least; None where the device's peak is not known, and of a refused one.
    """

    name: str
    program: Program | None
    needs: float
    flops: float
    messages: Messages | None
    times: Times | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on devices that are not here.

    Attributes:
        name: of the config.
        topology, mesh: the devices.
        settings: what decides how it is compiled, for readers.
        state, gradients: bytes on each device.
        programs: in the order of a step, the update last.
    """

    name: str
    topology: Topology
    mesh: Mesh
    settings: str
    state: int
    gradients: int
    programs: Sequence[PlannedProgram]


def report(made: Plan) -> str:
    """The plan for a terminal."""
    device, mesh = made.topology.device, made.mesh
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{made.name} on {made.topology.count} x {device.kind} ({made.topology.name}), mesh {axes}",
        f"{made.settings}; memory is that of one device, XLA's, FLOPs are the model's on all",
        f"state {_gigabytes(made.state)}, gradients {_gigabytes(made.gradients)}",
        "",
        _line("program", "memory", "arguments", "outputs", "temporary", "model TFLOP", "compiled in"),
        *map(_memory_line, made.programs),
        "",
        _largest(made),
        "",
        "messages of a step, and what a device sends in them along rings",
        *(line for one in made.programs for line in _message_lines(one)),
    ]
    return "\n".join([*lines, "", *_time_lines(made)])


def _line(name: str, *cells: str) -> str:
    return f"{name:14}" + "".join(f"{cell:>13}" for cell in cells)


def _memory_line(one: PlannedProgram) -> str:
    if one.program is None:
        return _line(one.name, _gigabytes(one.needs), "", "", "", f"{one.flops / 1e12:,.2f}", "refused")
    sizes = (one.needs, one.program.arguments, one.program.outputs, one.program.temporaries)
    count = f"{one.flops / 1e12:,.2f}" if one.flops else ""
    return _line(one.name, *map(_gigabytes, sizes), count, f"{one.program.seconds:.0f} s")


def _largest(made: Plan) -> str:
    largest = max(made.programs, key=lambda one: one.needs)
    told = f"the largest is {largest.name}: {_gigabytes(largest.needs)}"
    limit = made.topology.device.memory
    if not limit:
        return told
    over = [one for one in made.programs if one.program is None or one.needs > limit]
    if not over:
        return f"{told} of {_gigabytes(limit)}; all fit"
    which = ", ".join(f"{one.name} by {_gigabytes(one.needs - limit)}" for one in over)
    return f"{told} of {_gigabytes(limit)}; TOO LARGE: {which}"


def _message_lines(one: PlannedProgram) -> list[str]:
    if one.messages is None:
        return []
    kinds = one.messages.by_kind()
    lines = [_line(one.name, "none")] if not kinds else []
    for kind, (count, sent) in kinds.items():
        lines.append(f"{one.name:14}{kind:20}{count:9,} {_megabytes(sent):>15}")
    if one.messages.unknown_loops:
        lines.append(f"{one.name:14}{one.messages.unknown_loops} loops of unknown length, counted as run once")
    return lines


def _time_lines(made: Plan) -> list[str]:
    if any(one.program is None for one in made.programs):
        return ["no time of a step: not all of it fits"]
    if any(one.times is None for one in made.programs):
        return ["no time of a step: this device's peak at this number type is not known"]
    lines = [
        f"milliseconds at least: products at {UTILISATION:.0%} of the peak; memory, inputs and outputs once and",
        "temporaries twice; messages at the links' full rate",
        _line("program", "products", "memory", "messages", "hidden", "exposed"),
    ]

    def milliseconds(name: str, *seconds: float) -> str:
        return _line(name, *(f"{1e3 * value:,.2f}" for value in seconds))

    hidden = exposed = 0.0
    total = Times(0.0, 0.0, 0.0)
    for one in made.programs:
        times = one.times
        lines.append(milliseconds(one.name, times.products, times.memory, times.messages, times.hidden, times.exposed))
        total, hidden, exposed = total + times, hidden + times.hidden, exposed + times.exposed
    lines.append(milliseconds("step", total.products, total.memory, total.messages, hidden, exposed))
    return [*lines, f"a step takes {hidden:.3g} s with all messages behind products, {exposed:.3g} s with none"]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
