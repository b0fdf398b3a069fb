"""What the processes of one run must agree on, so that none waits for another that has given up."""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError


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
    text = np.frombuffer((message or "").encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)])).ravel()
    if not sizes.any():
        return None
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - len(text))))
    first = int(np.flatnonzero(sizes)[0])
    told = texts[first, : sizes[first]].tobytes().decode()
    return told if sizes.all() else f"process {first}: {told}"


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
