"""One stream of steps over all tasks, through Grain: a step's element is {task name: its batch}.

Batches are determined by (seed, step) alone. No iterator state is ever saved: a run resumes by starting at its step,
and gets bitwise the same batches with any number of workers; with any number of processes, the same global batches.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags, logging

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.mixture import RecordSource
from omnistream_jax.data.skipped import SkipCounter, Skips
from omnistream_jax.data.worker_pool import die_with

_WORKER_DIED = "Worker process was terminated unexpectedly"  # how Grain begins to tell it
_STEADY_STEPS = 100  # after so many steps without a death, those before are forgotten


class TaskData(Protocol):
    """What the pipeline needs of a task's data."""

    def dataset(self, seed: int, process_index: int, process_count: int) -> grain.MapDataset:
        """Batches of this process, as {name: array} and their `Skips` as "skipped"; the index is the step."""

    def describe(self, records: Sequence[int]) -> list[str]:
        """Names the records of a batch, for error messages."""

    def locate(self, record: int) -> tuple[RecordSource, int]:
        """The source that a record number belongs to, and its index there."""


def build_pipeline(
    tasks: Mapping[str, TaskData],
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    max_failed_fraction: float = 0.5,
    max_restarts: int = 3,
) -> Pipeline:
    """Builds the endless stream of steps from `start_step` on.

    Args:
      tasks: name -> data of that task. A task's batches do not depend on which others there are.
      seed: 0 or more.
      process_index: which of the processes that share every global batch this one is.
      process_count: how many there are.
      start_step: the first step to give.
      workers: processes that make batches, whole steps each; 0 makes them in a thread of this process.
      prefetch: steps made ahead (by each worker); 0, for workers = 0 only, makes each when it is asked for.
      max_failed_fraction: a source stops the run when more than this share of its last 100 draws (of this process)
        could not be used. Up to there a record that cannot be used is skipped: the next of its source takes its place.
      max_restarts: when a worker dies, all are started anew at the step that is due, and give bitwise the same batches;
        so often in a row, which 100 steps without a death end.

    Raises:
      DataError: an argument does not fit. Drawing a step raises it, naming the source and files, when one fails too
        often, none of its records can be used, or workers die too often.
    """
    if max_restarts < 0:
        raise DataError(f"max_restarts: {max_restarts}, expected 0 or more")
    _check(tasks, seed, process_index, process_count, start_step, workers, prefetch)
    skips = SkipCounter(max_failed_fraction)
    datasets = [tasks[name].dataset(_task_seed(seed, name), process_index, process_count) for name in tasks]
    steps = min(len(dataset) for dataset in datasets)  # "endless" datasets are long, not all equally
    in_thread = workers == 0 and prefetch > 0
    if workers > 0 and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands its flags to the workers; outside absl.app nobody parses them

    def stream_from(step: int) -> grain.IterDataset:
        aligned = [dataset[step:steps] for dataset in datasets]
        named = grain.experimental.ZipMapDataset(aligned).map(_Name(tuple(tasks)))
        stream = named.to_iter_dataset(
            grain.ReadOptions(num_threads=1 if in_thread else 0, prefetch_buffer_size=prefetch if in_thread else 0)
        )
        if workers == 0:
            return stream
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        return stream.mp_prefetch(options, worker_init_fn=_begin_worker)

    return Pipeline(stream_from, tasks, start_step, skips, max_restarts)


class Pipeline(Iterator[dict[str, Any]]):
    """Iterator over steps; close it, or use `with`: it may hold worker processes and shared memory.

    Attributes:
      step: the step whose batches `next` gives.
      tasks: name -> data of that task.
    """

    def __init__(
        self,
        stream_from: Callable[[int], grain.IterDataset],
        tasks: Mapping[str, TaskData],
        start_step: int,
        skips: SkipCounter,
        max_restarts: int,
    ):
        self.step = start_step
        self.tasks = dict(tasks)
        self._stream_from, self._skips, self._max_restarts = stream_from, skips, max_restarts
        self._deaths: list[int] = []  # the steps that were due
        self._iterator = iter(stream_from(start_step))

    def __next__(self) -> dict[str, Any]:
        while True:
            try:
                batches = next(self._iterator)
                break
            except RuntimeError as error:
                if _WORKER_DIED not in str(error):
                    raise
                self._start_anew(str(error))
        self.step += 1
        return {name: self._count(name, dict(batch)) for name, batch in batches.items()}

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """What this process could not use in the steps that were drawn: {source: {reason: samples}}."""
        return self._skips.counts

    def _start_anew(self, problem: str) -> None:
        if self._deaths and self.step - self._deaths[-1] >= _STEADY_STEPS:
            self._deaths.clear()
        self._deaths.append(self.step)
        problem = f"step {self.step}: a data worker died ({problem.partition('. ')[0]})"
        if len(self._deaths) > self._max_restarts:
            raise DataError(
                f"{problem}, {len(self._deaths)} times in a row: it ran out of memory (fewer loader.workers or less "
                "loader.prefetch need less), or a codec failed"
            )
        logging.warning("%s; starting all anew, %d of %d times", problem, len(self._deaths), self._max_restarts)
        self._iterator.close()
        self._iterator = iter(self._stream_from(self.step))

    def _count(self, name: str, batch: dict[str, Any]) -> dict[str, Any]:
        skips: Skips = batch.pop("skipped")
        sources = [self.tasks[name].locate(record)[0] for record in skips["drawn"].ravel().tolist()]
        self._skips.add(name, sources, skips)
        return batch

    def describe(self, batches: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[str]]:
        """The files that a step's batches came from: {task name: paths}."""
        return {name: self.tasks[name].describe(batch["record"]) for name, batch in batches.items()}

    def close(self) -> None:
        """Ends the workers. Further calls of `next` are errors."""
        self._iterator.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Name(grain.transforms.Map):
    """A tuple of the tasks' batches -> {task name: batch}."""

    def __init__(self, names: tuple[str, ...]):
        self._names = names

    def map(self, element: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self._names, element, strict=True))


def _begin_worker(_index: int, _count: int) -> None:
    """A worker lives as long as the process that it works for: signals to the whole job are that one's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=die_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()


def _task_seed(seed: int, name: str) -> int:
    """A seed of 32 bits for one task, which does not change when other tasks come or go."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


def _check(
    tasks: Mapping[str, TaskData],
    seed: int,
    process_index: int,
    process_count: int,
    start_step: int,
    workers: int,
    prefetch: int,
) -> None:
    if not tasks:
        raise DataError("tasks: none are given, expected at least one")
    for field, value in {"seed": seed, "start_step": start_step, "workers": workers, "prefetch": prefetch}.items():
        if value < 0:
            raise DataError(f"{field}: {value}, expected 0 or more")
    if workers > 0 and prefetch == 0:
        raise DataError("prefetch: 0, expected 1 or more with workers")
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index: {process_index}, expected 0 to {process_count - 1} (process_count - 1)")
