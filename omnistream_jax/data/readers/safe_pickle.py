"""Plain values (lists, dicts, tuples, text, numbers, None) out of a pickle, executing nothing.

A pickle is a program for a small stack machine, some of whose instructions call any function by its name. The standard
library's `pickletools.genops` lists the instructions without running them; here those that only build plain values are
carried out, and every other is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.files import reading

_MARK = object()
_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
"""Instructions that push their own argument, which genops has decoded."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")


def read_plain_pickle(path: str | Path) -> Any:
    """The plain value that a pickle file holds.

    Raises:
      DataError: the file is missing or damaged, or holds an instruction that builds anything else; the message names
        the instruction.
    """
    machine = _Machine(str(path))
    with reading(path, "a pickle of lists, dicts, text and numbers"), open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            machine.run(opcode.name, argument)
        return machine.result()


class _Machine:
    """The part of the pickle machine that can do no harm."""

    def __init__(self, path: str):
        self._path = path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._actions: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._stack.append(_MARK),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_DICT": lambda: self._stack.append({}),
            "EMPTY_TUPLE": lambda: self._stack.append(()),
            "LIST": lambda: self._stack.append(self._to_mark()),
            "TUPLE": lambda: self._stack.append(tuple(self._to_mark())),
            "DICT": lambda: self._stack.append(_pairs(self._to_mark())),
            "TUPLE1": lambda: self._tuple(1),
            "TUPLE2": lambda: self._tuple(2),
            "TUPLE3": lambda: self._tuple(3),
            "APPEND": lambda: self._extend([self._pop()]),
            "APPENDS": lambda: self._extend(self._to_mark()),
            "SETITEM": lambda: self._update([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda: self._update(self._to_mark()),
            "MEMOIZE": lambda: self._memo.__setitem__(len(self._memo), self._top(object)),
            "PROTO": lambda: None,
            "FRAME": lambda: None,
            "STOP": lambda: None,
        }

    def run(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        self._steps += 1
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _PUT:
            self._memo[argument] = self._top(object)
        elif name in _GET:
            self._stack.append(self._memo[argument])
        elif name in self._actions:
            self._actions[name]()
        else:
            raise DataError(f"{self._path}: holds the instruction {name}, which plain values do not need; refused")

    def result(self) -> Any:
        """The one value that is left, if it has no more parts than the file has instructions to build it."""
        value = self._pop()
        if self._stack:
            raise ValueError("values are left over")
        self._check_size(value)
        return value

    def _check_size(self, value: Any) -> None:
        """Refuses values that contain themselves, and parts used over and over, which would grow without limit."""
        parts, todo, limit = 0, [value], 4 * self._steps
        while todo:
            part = todo.pop()
            parts += 1
            if isinstance(part, dict):
                todo += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple):
                todo += part
            if parts + len(todo) > limit:
                raise DataError(f"{self._path}: its parts contain each other or are used over and over; refused")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark stands where a value should")
        return value

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if value is _MARK or not isinstance(value, kind):
            raise ValueError(f"expected a {kind.__name__} to work on, found a {type(value).__name__}")
        return value

    def _to_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                items = self._stack[place + 1 :]
                del self._stack[place:]
                return items
        raise ValueError("there is no mark")

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple([self._pop() for _ in range(count)][::-1]))

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _update(self, items: list[Any]) -> None:
        self._top(dict).update(_pairs(items))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    return dict(zip(items[::2], items[1::2], strict=True))
