"""What a compiled program sends, and how long it must take at least: for plans.

Messages are read from the compiled program's text (XLA's HLO), those in a loop as often as it runs. Times are of three
kinds: products at a share of the device's peak, memory, and messages along rings.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UTILISATION = 0.4
"""Of the peak, assumed for products: what large runs reach (PaLM 0.46 on TPU v4, Llama 3 0.38 to 0.43 on H100)."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_TPU_REDUCE_SCATTER = "all-reduce-scatter"  # a fusion of an all-reduce and a slice, which sends what a scatter does


@dataclasses.dataclass(frozen=True)
class Collective:
    """Messages of one kind and size.

    Attributes:
        kind: one of KINDS.
        size: bytes on a device of the whole array: gathered, summed, or before it is scattered.
        group: places in the mesh of devices that talk, those of one group; the other groups are alike.
        times: how often the program does it.
    """

    kind: str
    size: int
    group: tuple[int, ...]
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends along a ring, all times together."""
        others = (len(self.group) - 1) / len(self.group)
        factor = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return factor * self.size * self.times


@dataclasses.dataclass(frozen=True)
class Messages:
    """All that a program sends.

    Attributes:
        collectives: with several devices a group, in the order of the program's text.
        unknown_loops: loops of unknown length that send something; each counts as run once.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """Kind -> (how many a run of the program has, bytes that a device sends)."""
        sums: dict[str, tuple[int, float]] = {}
        for one in self.collectives:
            count, sent = sums.get(one.kind, (0, 0.0))
            sums[one.kind] = count + one.times, sent + one.sent
        return {kind: sums[kind] for kind in KINDS if kind in sums}


def read_messages(program: str, devices: int) -> Messages:
    """The collectives of a compiled program's text (`jax.stages.Compiled.as_text`) for so many devices.

    Both branches of a condition are counted.

    Raises:
        ValueError: the text has no entry.
    """
    computations, entry = _computations(program)
    runs: dict[str, int] = defaultdict(int)
    unknown = 0

    def visit(name: str, times: int) -> None:
        nonlocal unknown
        runs[name] += times
        for line, opcode, _ in computations[name]:
            if opcode.removesuffix("-start") in KINDS:
                continue  # what it calls adds two numbers, or is itself again
            called = [*_CALLED.findall(line), *_names(_CALLED_LISTS.findall(line))]
            trips = _trips(computations, line) if opcode == "while" else 1
            if trips is None and any(_sends(computations, inner) for inner in called):
                unknown += 1
            for inner in called:
                if inner in computations:
                    visit(inner, times * (trips or 1))

    visit(entry, 1)
    found = []
    for name, instructions in computations.items():
        for line, opcode, shape in instructions:
            if runs[name] and opcode.removesuffix("-start") in KINDS:
                found.append(_collective(name, line, opcode, shape, runs[name], devices))
    return Messages(tuple(one for one in found if len(one.group) > 1), unknown)


def _computations(program: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Name -> its instructions (line, opcode, type), and which is the entry."""
    computations: dict[str, list[tuple[str, str, str]]] = {}
    entry, name = None, None
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name is not None and (instruction := _INSTRUCTION.match(line)):
            computations[name].append((line, instruction[2], instruction[1]))
    if entry is None:
        raise ValueError("the program's text has no ENTRY")
    return computations, entry


def _trips(computations: Mapping[str, list[tuple[str, str, str]]], line: str) -> int | None:
    """How often a loop runs: as XLA tells, or, since it does not on a TPU, to where its condition counts from 0."""
    if told := _TRIPS.search(line):
        return int(told[1])
    condition = computations.get(_CONDITION.search(line)[1], [])
    limits = [limit for text, opcode, _ in condition if opcode == "constant" for limit in _CONSTANT.findall(text)]
    counts = any(opcode == "compare" and "direction=LT" in text for text, opcode, _ in condition)
    return int(limits[0]) if counts and len(limits) == 1 else None


def _names(lists: Iterable[str]) -> list[str]:
    return [name.strip().lstrip("%") for names in lists for name in names.split(",") if name.strip()]


def _sends(computations: Mapping[str, list], name: str) -> bool:
    """Whether a computation, or one that it calls, has a collective."""
    for line, opcode, _ in computations.get(name, ()):
        called = [*_CALLED.findall(line), *_names(_CALLED_LISTS.findall(line))]
        if opcode.removesuffix("-start") in KINDS or any(_sends(computations, inner) for inner in called):
            return True
    return False


def _collective(name: str, line: str, opcode: str, shape: str, times: int, devices: int) -> Collective:
    kind, group = opcode.removesuffix("-start"), _group(line, devices)
    sizes = [_bytes(*array) for array in _ARRAY.findall(shape)]
    # What is started gives its inputs and its outputs, but for all-reduce; scalars among them are XLA's own.
    if opcode.endswith("-start") and kind != "all-reduce":
        sizes = [size for size in sizes if size > 4] or sizes
        sizes = sizes[len(sizes) // 2 :]
    size = sum(sizes)
    if kind == "reduce-scatter":
        size *= len(group)
    if kind == "all-reduce" and name.startswith(_TPU_REDUCE_SCATTER):
        kind = "reduce-scatter"
    return Collective(kind, size, group, times)


def _bytes(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def _group(line: str, devices: int) -> tuple[int, ...]:
    """The first group of devices, in each of the ways that XLA writes them; all where it tells none."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, sides, order = ([int(part) for part in (text or "").split(",") if part] for text in iota.groups())
        places = np.arange(math.prod(sides)).reshape(sides)
        return tuple(places.transpose(order or range(len(sides))).reshape(groups[0], -1)[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sides = {axis: int(side) for axis, side in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        places = np.arange(math.prod(sides.values())).reshape(list(sides.values()))
        used = re.findall(r"'(\w+)'", mesh[2])
        return tuple(places[tuple(slice(None) if axis in used else 0 for axis in sides)].ravel().tolist())
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}(?:,\{(\d+),(\d+)\})*", line):
        moved = re.findall(r"\{(\d+),(\d+)\}", line[pairs.start() :])
        return next(((int(a), int(b)) for a, b in moved if a != b), (0,))
    return tuple(range(devices))


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a program takes at least of each.

    Attributes:
        products: at UTILISATION of the peak.
        memory: every input and output once, temporaries written and read once.
        messages: along rings, one after the other.
    """

    products: float
    memory: float
    messages: float

    def __add__(self, other: "Times") -> "Times":
        return Times(self.products + other.products, self.memory + other.memory, self.messages + other.messages)

    @property
    def hidden(self) -> float:
        """All at once: messages behind products."""
        return max(self.products, self.memory, self.messages)

    @property
    def exposed(self) -> float:
        """Messages while nothing else happens."""
        return max(self.products, self.memory) + self.messages
