"""What the data of all tasks share: records of several sources, mixed by weight and shuffled without repetition.

The records of all sources of a task are numbered in a row. A sample is drawn by (seed, its number in the run) alone;
sample i of a step's global batch is sample i // process_count of process i % process_count.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import grain
import numpy as np

from omnistream_jax.data.errors import DataError, require_field
from omnistream_jax.data.skipped import first_usable, skip_entry
from omnistream_jax.data.sources import mixture_weights

ENDLESS = 1 << 40  # samples
SMALL_SOURCE = 4096  # records; below it Grain's own shuffle takes up to milliseconds a record


class RecordSource(Protocol):
    """What a mixture needs of a source."""

    name: str

    def __len__(self) -> int:
        """How many records there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the path of a record."""


SourceT = TypeVar("SourceT", bound=RecordSource)


@dataclasses.dataclass(frozen=True)
class MixtureData(Generic[SourceT]):
    """Batches from a mixture of sources; the kinds of data say in `_sample` what a record becomes.

    Attributes:
      sources: where samples come from.
      global_batch_size: samples a step, over all processes.
      weights: share of each source; None weights them by the square root of their size.

    Raises:
      DataError: a field does not fit; the message names it.
    """

    sources: tuple[SourceT, ...]
    global_batch_size: int
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        require_field(len(self.sources) > 0, "sources", self.sources, "at least one")
        for source in self.sources:
            if len(source) == 0:
                raise DataError(f"sources: {source.name} has no records")
        mixture_weights(self.sources, self.weights)
        require_field(self.global_batch_size >= 1, "global_batch_size", self.global_batch_size, "1 or more")

    def dataset(self, seed: int, process_index: int, process_count: int) -> grain.MapDataset:
        """Endless batches of this process: element `step` is the batch of that step, with "skipped" (`Skips`) in it.

        The union of all processes' batches depends on (seed, step) only.

        Raises:
          DataError: global_batch_size is no multiple of process_count.
        """
        shuffle_seed, sample_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
        return self._batches(shuffle_seed, sample_seed, process_index, process_count)

    def describe(self, records: Sequence[int]) -> list[str]:
        """The file paths of a batch's "record", in its order, row by row."""
        return [source.describe(index) for source, index in map(self.locate, np.ravel(records))]

    def locate(self, record: int) -> tuple[SourceT, int]:
        """The source that a record number belongs to, and its index there."""
        place, index = self._place(record)
        return self.sources[place], index

    def _place(self, record: int) -> tuple[int, int]:
        place = bisect.bisect_right(self._offsets, int(record)) - 1
        return place, int(record) - self._offsets[place]

    @functools.cached_property
    def _offsets(self) -> list[int]:
        """The record number of each source's first record."""
        return [0, *itertools.accumulate(len(source) for source in self.sources[:-1])]

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The arrays of one sample: record `index` of source `place`. Raises DataError where it cannot be used."""
        raise NotImplementedError

    def _batches(self, shuffle_seed: int, sample_seed: int, process_index: int, process_count: int) -> grain.MapDataset:
        if self.global_batch_size % process_count:
            raise DataError(
                f"global_batch_size: {self.global_batch_size} is no multiple of the {process_count} processes"
            )
        samples = self._join(self._mixture(shuffle_seed).random_map(_Samples(self), seed=sample_seed))
        return samples[process_index::process_count].batch(self.global_batch_size // process_count)

    def _join(self, samples: grain.MapDataset) -> grain.MapDataset:
        """What is batched: a sample is one record's, unless a kind of data joins several."""
        return samples

    def _mixture(self, seed: int) -> grain.MapDataset:
        """Endless record numbers: each source shuffled anew in every pass over it, the sources by their weights."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.sources))
        shuffled = [
            _shuffled(offset, len(source), int(source_seed))
            for offset, source, source_seed in zip(self._offsets, self.sources, seeds, strict=True)
        ]
        if len(shuffled) == 1:
            return shuffled[0]
        return grain.MapDataset.mix(shuffled, mixture_weights(self.sources, self.weights))


def _shuffled(first: int, count: int, seed: int) -> grain.MapDataset:
    """The numbers first .. first + count - 1, endlessly, in a new order in every pass."""
    if count < SMALL_SOURCE:
        return grain.MapDataset.source(_SmallShuffle(first, count, seed))
    passes = ENDLESS // count  # Grain's own endless length does not always fit its len()
    return grain.MapDataset.range(first, first + count).shuffle(seed=seed).repeat(passes)


@dataclasses.dataclass(frozen=True)
class _SmallShuffle:
    """A sequence, practically endless, of permutations of first .. first + count - 1."""

    first: int
    count: int
    seed: int

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> int:
        number, place = divmod(index, self.count)
        return self.first + int(_permutation(self.seed, number, self.count)[place])


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, number: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(count)


@dataclasses.dataclass(frozen=True)
class _Samples(grain.transforms.RandomMap):
    """Record number -> one sample, of the next record where that one cannot be used."""

    data: MixtureData

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        place, index = self.data._place(element)
        used, sample, error = first_usable(
            self.data.sources[place], index, lambda each: self.data._sample(place, each, rng)
        )
        record = np.int64(element - index + used)
        return {**sample, "record": record, "skipped": skip_entry(element, error)}
