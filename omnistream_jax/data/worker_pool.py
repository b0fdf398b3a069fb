"""A function over many items in several processes, each of which may fail or die without hanging the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from omnistream_jax.data.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with function(item), as they are finished.

    Args:
      function: for more than one worker it and the items must be of importable types; it is sent to each worker once.
      items: taken in this order.
      workers: 1 works in this process. Others are ended when the iterator is, or when this process dies.

    Raises:
      DataError: the function raised one; or a worker died, which the message tells with its item.
      RuntimeError: the function raised something else; the message holds the worker's stack trace.
    """
    if workers < 1:
        raise DataError(f"workers: expected at least 1, got {workers}")
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads' locks
    left, running = list(reversed(items)), {}
    processes = []
    try:
        for _ in range(min(workers, len(items))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            running[ours] = process, left.pop()
            _send(*running[ours], ours)
        while running:
            for pipe in wait(list(running)):
                process, item = running.pop(pipe)
                yield item, _receive(pipe, process, item)
                if left:
                    running[pipe] = process, left.pop()
                    _send(*running[pipe], pipe)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _send(process: multiprocessing.Process, item: Any, pipe: Connection) -> None:
    try:
        pipe.send(item)
    except OSError:
        raise _died(process, item) from None


def _receive(pipe: Connection, process: multiprocessing.Process, item: Any) -> Any:
    try:
        outcome, value = pipe.recv()
    except (EOFError, OSError):
        raise _died(process, item) from None
    if outcome == "data error":
        raise DataError(value)
    if outcome == "fault":
        raise RuntimeError(f"in a worker, at {item}:\n{value}")
    return value


def _died(process: multiprocessing.Process, item: Any) -> DataError:
    process.join(5)
    status = process.exitcode
    name = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
    return DataError(f"a worker process died at {item} ({name}): it ran out of memory, or a codec failed")


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """A worker's life: answers items until the caller hangs up or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends its workers
    threading.Thread(target=die_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = "result", function(item)
        except DataError as error:
            answer = "data error", str(error)
        except Exception:
            answer = "fault", traceback.format_exc()
        pipe.send(answer)


def die_with(parent: int) -> None:
    """Ends this process as soon as its parent, of that sentinel, is no more; for a thread of its own."""
    wait([parent])
    os._exit(1)
