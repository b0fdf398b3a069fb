"""Decoding in worker processes, beside whatever the caller computes.

A worker is a bare interpreter that runs this module: it imports PyAV and NumPy, never JAX (the accelerator is the
caller's), and nothing of the caller's main module, as multiprocessing's would. It reads one JSON line an item from
standard input and answers with records: a JSON line, and for a chunk its frames' bytes. A worker that dies, say in a
codec's fault on a damaged file, costs that item alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.frames import FrameChunk, FrameOptions, decode_item
from omnistream_jax.data.items import Item


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What the pool hands out: a chunk of an item, or that it has come to its end.

    Attributes:
      item: whose.
      chunk: the next frames; None at the end.
      failure: at the end, why the item could not be read to its last frame; None if it was.
    """

    item: Item
    chunk: FrameChunk | None = None
    failure: str | None = None


class DecodePool:
    """Decodes items in `workers` processes at once; iterate over it once, and close it (or use `with`).

    Each item's chunks come in order, and then one end; those of up to `workers` items are interleaved. Memory is
    bounded: a worker is at most two chunks ahead of the `prefetch` chunks that wait for the caller.

    Args:
      items: taken in this order.
      options: how they are decoded.
      workers: processes, each with one item.
      prefetch: chunks that may wait for the caller.
    """

    def __init__(self, items: Sequence[Item], options: FrameOptions, workers: int, prefetch: int = 4):
        options.check()
        if workers < 1 or prefetch < 1:
            raise DataError(f"workers and prefetch: expected positive numbers, got {workers} and {prefetch}")
        self._left, self._options = iter(items), options
        self._ready: queue.Queue[Decoded] = queue.Queue(prefetch)
        self._lock, self._closed = threading.Lock(), False
        self._processes: set[subprocess.Popen] = set()
        self._ends = len(items)
        self._threads = [threading.Thread(target=self._attend, daemon=True) for _ in range(min(workers, len(items)))]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Decoded]:
        while self._ends:
            decoded = self._ready.get()
            self._ends -= decoded.chunk is None
            yield decoded

    def close(self) -> None:
        """Stops the workers, whatever they are doing."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        while any(thread.is_alive() for thread in self._threads):
            with contextlib.suppress(queue.Empty):  # a thread that waits for room goes on, and finds its worker gone
                self._ready.get(timeout=0.05)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _attend(self) -> None:
        """One thread's life: it hands items to its worker and passes on what comes back."""
        process = None
        while (item := self._next_item()) is not None:
            failure = None
            try:
                process = process or self._start()
                failure = self._pass_on(process, item)
            except (OSError, EOFError, ValueError) as error:
                failure = f"{item.path}: {_epitaph(process, error)}"
                self._stop(process)
                process = None
            self._ready.put(Decoded(item, failure=failure))
        self._stop(process)

    def _next_item(self) -> Item | None:
        with self._lock:
            return None if self._closed else next(self._left, None)

    def _start(self) -> subprocess.Popen:
        search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._lock:
            if self._closed:
                raise EOFError
            process = subprocess.Popen(
                [sys.executable, "-m", "omnistream_jax.data.decode_pool"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
            )
            self._processes.add(process)
        return process

    def _stop(self, process: subprocess.Popen | None) -> None:
        if process is None:
            return
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        with self._lock:
            self._processes.discard(process)

    def _pass_on(self, process: subprocess.Popen, item: Item) -> str | None:
        """Puts the chunks of an item into the queue; why it failed, or None."""
        request = {"item": dataclasses.asdict(item), "options": dataclasses.asdict(self._options)}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        while True:
            record = json.loads(process.stdout.readline() or _ended())
            if "end" in record:
                return record["end"]
            self._ready.put(Decoded(item, chunk=_read_chunk(process.stdout, record)))


def _ended() -> bytes:
    raise EOFError


def _epitaph(process: subprocess.Popen | None, error: Exception) -> str:
    if process is None:
        return f"no decoding process could be started ({error})"
    try:
        status = process.wait(5)
    except subprocess.TimeoutExpired:
        return f"the decoding process answered nonsense ({error})"
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"the decoding process died of it ({name})"


# The records of a worker


def _write_chunk(out: BinaryIO, chunk: FrameChunk) -> None:
    record = {
        "shape": chunk.frames.shape,
        "times": chunk.times.tolist(),
        "source_size": chunk.source_size,
        "progress": chunk.progress,
    }
    out.write(json.dumps(record).encode() + b"\n")
    out.write(np.ascontiguousarray(chunk.frames))
    out.flush()


def _read_chunk(stream: BinaryIO, record: dict) -> FrameChunk:
    frames = np.empty(record["shape"], np.uint8)
    if stream.readinto(frames.reshape(-1)) != frames.size:
        raise EOFError
    return FrameChunk(
        frames, np.array(record["times"], np.float64), tuple(record["source_size"]), float(record["progress"])
    )


def serve(requests: BinaryIO, out: BinaryIO) -> None:
    """A worker's life: answers requests until there are no more, or nobody listens."""
    for line in requests:
        request = json.loads(line)
        item, options = Item(**request["item"]), FrameOptions(**request["options"])
        failure = None
        try:
            for chunk in decode_item(item, options):
                _write_chunk(out, chunk)
        except BrokenPipeError:
            return
        except DataError as error:
            failure = str(error)
        except Exception as error:  # a fault of ours or of a library: it is told, and costs this item alone
            failure = f"{item.path}: {type(error).__name__}: {error}"
        out.write(json.dumps({"end": failure}).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    # What a library prints must not come between the records.
    records = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller stops its workers
    serve(sys.stdin.buffer, records)
