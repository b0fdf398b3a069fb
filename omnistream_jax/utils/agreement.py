"""What the processes of one run must agree on, so that none waits for another that has given up."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

# The public face of jax.distributed has no barrier that needs no device.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError

_PATIENCE_SECONDS = 24 * 3600  # a process that dies ends the wait of the others
_waits = itertools.count()


def wait_for_all(name: str = "", seconds: int = _PATIENCE_SECONDS) -> None:
    """Until all processes have come here, however far apart: the devices are not asked, which lose patience sooner.

    Args:
        name: of the place; "": the next of those that all come to in the same order.
        seconds: after which it raises RuntimeError.
    """
    if jax.process_count() > 1:
        global_state.client.wait_at_barrier(f"omnistream_jax/{name or next(_waits)}", seconds * 1000)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))


def shared_message(message: str | None) -> str | None:
    """The message of the first process that has one, in every process; None where none has. All call it together.

    It names the process, unless all have one.
    """
    if jax.process_count() == 1:
        return message
    texts = _gathered((message or "").encode())
    if not any(texts):
        return None
    first = next(index for index, text in enumerate(texts) if text)
    told = texts[first].decode()
    return told if all(texts) else f"process {first}: {told}"


def share(sizes: Mapping[str, float]) -> list[str]:
    """The names of what this process is to do, the largest first: of so many things of such sizes, every so many-th.

    Every process gives the same `sizes`.
    """
    by_size = sorted(sizes, key=lambda name: -sizes[name]) if jax.process_count() > 1 else list(sizes)
    return by_size[jax.process_index() :: jax.process_count()]


def own_rows(count: int) -> slice:
    """Of so many rows, those of this process: equal parts, to within one, one after the other."""
    return slice(*(count * part // jax.process_count() for part in (jax.process_index(), jax.process_index() + 1)))


def from_all(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order, in every process; all call it together."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(content) for content in _gathered(json.dumps(value).encode())]


def arrays_from_all(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of all processes, as `from_all`; they keep their types, 64 bits too, and pass through a device."""
    if jax.process_count() == 1:
        return [dict(arrays)]
    file = io.BytesIO()
    np.savez(file, **arrays)
    return [dict(np.load(io.BytesIO(content), allow_pickle=False)) for content in _gathered(file.getvalue())]


def _gathered(content: bytes) -> list[bytes]:
    """Of each process; they may come to it at different times."""
    wait_for_all()
    own = np.frombuffer(content, np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(own)])).ravel()
    if not sizes.any():
        return [b""] * len(sizes)
    rows = multihost_utils.process_allgather(np.pad(own, (0, sizes.max() - len(own))))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def say(line: str) -> None:
    """Prints what every process knows, in process 0 alone."""
    if jax.process_index() == 0:
        print(line, flush=True)


@logging.skip_log_prefix
def warn(message: str, *values: object) -> None:
    """Logs a warning about what every process knows, in process 0 alone."""
    if jax.process_index() == 0:
        logging.warning(message, *values)


def from_first_process(function: Callable[[], Any], errors: tuple[type[Exception], ...] = ()) -> Any:
    """What `function` returns in process 0, in every process; all call it together.

    Args:
        function: called in process 0 only; returns JSON values.
        errors: exceptions of it that are raised in every process, with the same message. Any other is raised in
            process 0 and as a RuntimeError in the rest.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    raised: Exception | None = None
    if jax.process_index() == 0:
        try:
            outcome = {"value": function()}
        except Exception as error:
            raised = error
            kinds = [index for index, kind in enumerate(errors) if isinstance(error, kind)]
            outcome = {"error": str(error), "kind": kinds[0] if kinds else None}
    outcome = _broadcast(outcome)
    if raised is not None:
        raise raised
    if "error" not in outcome:
        return outcome["value"]
    if outcome["kind"] is None:
        raise RuntimeError(f"process 0 has failed: {outcome['error']}")
    raise errors[outcome["kind"]](outcome["error"])


def lock_workdir(workdir: str | os.PathLike) -> contextlib.AbstractContextManager:
    """Locks the directory for a run of any number of processes, which call this together: the first holds the lock.

    Raises WorkdirLockedError in every process where another run holds it.
    """
    taken: list[WorkdirLock] = []
    from_first_process(lambda: taken.append(WorkdirLock(workdir)), errors=(WorkdirLockedError,))
    return taken[0] if taken else contextlib.nullcontext()


def _broadcast(outcome: dict[str, Any]) -> dict[str, Any]:
    content = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
