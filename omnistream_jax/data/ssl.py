"""The data of one self-supervised task: sources -> mixture -> clips -> crops -> batches with masks."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from omnistream_jax.data import masks as mask_schemes
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.multicrop import GLOBAL_CROPS, MultiCropSizes, multicrop
from omnistream_jax.data.schema import SelfSupervisedBatch
from omnistream_jax.data.sources import Source, mixture_weights

MASK_SCHEMES = ("blocks", "tubes")
SMALL_SOURCE = 4096  # records; below it Grain's own shuffle takes up to milliseconds a record


@dataclasses.dataclass(frozen=True)
class SelfSupervisedData:
    """Batches of image (frames = 1) or video self-supervision; see `schema.SelfSupervisedBatch`.

    Attributes:
      sources: where samples come from.
      global_batch_size: samples a step, over all processes.
      weights: share of each source; None weights them by the square root of their size.
      frames: T, frames of a clip.
      stride: smallest and largest distance between a clip's frames, in frames of the video.
      global_size: side of the two global crops in pixels.
      local_size: side of the local crops in pixels.
      local_crops: how many local crops.
      patch_size: side of a patch in pixels.
      mask_scheme: "blocks" (DINOv3's, repeated over the frames of a clip) or "tubes" (V-JEPA 2's, every clip masked).
      mask_probability: share of the global crops that blocks mask; 0.5 for blocks if None, must be None for tubes.
      mask_ratio: smallest and largest share of a crop's patches that blocks mask; likewise, (0.1, 0.5).
      gram_size: side of the Gram teacher's crops in pixels; None makes none. Images only.

    Raises:
      DataError: a field does not fit; the message names it.
    """

    sources: tuple[Source, ...]
    global_batch_size: int
    weights: tuple[float, ...] | None = None
    frames: int = 1
    stride: tuple[int, int] = (1, 1)
    global_size: int = 224
    local_size: int = 96
    local_crops: int = 2
    patch_size: int = 16
    mask_scheme: str = "blocks"
    mask_probability: float | None = None
    mask_ratio: tuple[float, float] | None = None
    gram_size: int | None = None

    def __post_init__(self):
        _require(len(self.sources) > 0, "sources", self.sources, "at least one")
        mixture_weights(self.sources, self.weights)
        _require(self.global_batch_size >= 1, "global_batch_size", self.global_batch_size, "1 or more")
        _require(self.local_crops >= 0, "local_crops", self.local_crops, "0 or more")
        _require(self.frames >= 1, "frames", self.frames, "1 or more")
        _require(1 <= self.stride[0] <= self.stride[1], "stride", self.stride, "(smallest, largest), from 1 on")
        for source in self.sources:
            limit = source.max_frames
            if limit is not None and self.frames > limit:
                raise DataError(f"frames: {self.frames}, but source {source.name} has {limit} frame in a record")
        self._check_sizes()
        self._check_masks()

    def _check_sizes(self) -> None:
        _require(self.patch_size >= 1, "patch_size", self.patch_size, "1 or more")
        sizes = {"global_size": self.global_size, "local_size": self.local_size, "gram_size": self.gram_size}
        for field, size in sizes.items():
            if size is not None:
                expected = f"a positive multiple of patch_size {self.patch_size}"
                _require(size > 0 and size % self.patch_size == 0, field, size, expected)
        _require(self.gram_size is None or self.frames == 1, "gram_size", self.gram_size, "None for clips")

    def _check_masks(self) -> None:
        _require(self.mask_scheme in MASK_SCHEMES, "mask_scheme", self.mask_scheme, " or ".join(MASK_SCHEMES))
        if self.mask_scheme == "tubes":
            expected = "None: tubes mask every clip, by their own constants"
            _require(self.mask_probability is None, "mask_probability", self.mask_probability, expected)
            _require(self.mask_ratio is None, "mask_ratio", self.mask_ratio, expected)
            return
        if self.mask_probability is not None:
            _require(0 <= self.mask_probability <= 1, "mask_probability", self.mask_probability, "0 to 1")
        if self.mask_ratio is not None:
            low, high = self.mask_ratio
            _require(0 <= low <= high <= 1, "mask_ratio", self.mask_ratio, "(smallest, largest) within 0 to 1")

    @property
    def blocks(self) -> tuple[float, tuple[float, float]]:
        """Probability and ratio of the block masks, the defaults filled in."""
        probability = 0.5 if self.mask_probability is None else self.mask_probability
        return probability, (0.1, 0.5) if self.mask_ratio is None else self.mask_ratio

    @property
    def max_masked(self) -> int:
        """An upper bound, at least 1, on the masked patches of one global crop, all frames together."""
        patches = (self.global_size // self.patch_size) ** 2
        if self.mask_scheme == "blocks":
            patches = max(1, int(patches * self.blocks[1][1]))
        return patches * self.frames

    def dataset(self, seed: int, process_index: int, process_count: int) -> grain.MapDataset:
        """Endless batches of this process: element `step` is a SelfSupervisedBatch of that step.

        The union of all processes' batches depends on (seed, step) only: sample i of a step's global batch is sample
        i // process_count of process i % process_count.

        Raises:
          DataError: global_batch_size is no multiple of process_count.
        """
        if self.global_batch_size % process_count:
            raise DataError(
                f"global_batch_size: {self.global_batch_size} is no multiple of the {process_count} processes"
            )
        shuffle_seed, crop_seed, mask_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(3))
        rows = range(process_index, self.global_batch_size, process_count)
        records = self._mixture(shuffle_seed)
        samples = records.random_map(_Crops(self), seed=crop_seed)[process_index::process_count]
        batches = samples.batch(self.global_batch_size // process_count)
        return batches.random_map(_Masks(self, rows), seed=mask_seed)

    def describe(self, records: Sequence[int]) -> list[str]:
        """The file paths of a batch's "record"."""
        return [source.describe(index) for source, index in map(self.locate, records)]

    def locate(self, record: int) -> tuple[Source, int]:
        """The source that a record number belongs to, and its index there."""
        offsets = self._offsets()
        place = bisect.bisect_right(offsets, int(record)) - 1
        return self.sources[place], int(record) - offsets[place]

    def _offsets(self) -> list[int]:
        """The record number of each source's first record."""
        return [0, *itertools.accumulate(len(source) for source in self.sources[:-1])]

    def _mixture(self, seed: int) -> grain.MapDataset:
        """Endless record numbers: each source shuffled anew in every pass over it, the sources by their weights."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.sources))
        shuffled = [
            _shuffled(offset, len(source), int(source_seed))
            for offset, source, source_seed in zip(self._offsets(), self.sources, seeds, strict=True)
        ]
        if len(shuffled) == 1:
            return shuffled[0]
        return grain.MapDataset.mix(shuffled, mixture_weights(self.sources, self.weights))


def _shuffled(first: int, count: int, seed: int) -> grain.MapDataset:
    """The numbers first .. first + count - 1, endlessly, in a new order in every pass."""
    if count < SMALL_SOURCE:
        return grain.MapDataset.source(_SmallShuffle(first, count, seed))
    return grain.MapDataset.range(first, first + count).shuffle(seed=seed).repeat()


@dataclasses.dataclass(frozen=True)
class _SmallShuffle:
    """A sequence, practically endless, of permutations of first .. first + count - 1."""

    first: int
    count: int
    seed: int

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> int:
        number, place = divmod(index, self.count)
        return self.first + int(_permutation(self.seed, number, self.count)[place])


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, number: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(count)


@dataclasses.dataclass(frozen=True)
class _Crops(grain.transforms.RandomMap):
    """Record number -> one sample's crops."""

    data: SelfSupervisedData

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        data = self.data
        source, index = data.locate(element)
        sample = source.sample(index, rng, data.frames, data.stride)
        sizes = MultiCropSizes(data.global_size, data.local_size, data.local_crops, data.gram_size)
        crops = multicrop(sample.frames, rng, sizes)
        out = {
            "global_crops": crops.global_crops,
            "local_crops": crops.local_crops,
            "record": np.int64(element),
        }
        if crops.gram_crops is not None:
            out["gram_crops"] = crops.gram_crops
        return out


@dataclasses.dataclass(frozen=True)
class _Masks(grain.transforms.RandomMap):
    """Adds this process's rows of the masks of the step's global batch."""

    data: SelfSupervisedData
    rows: range

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> SelfSupervisedBatch:
        data = self.data
        side = data.global_size // data.patch_size
        count = data.global_batch_size * GLOBAL_CROPS
        crops = [row * GLOBAL_CROPS + view for row in self.rows for view in range(GLOBAL_CROPS)]
        if data.mask_scheme == "tubes":
            masks = mask_schemes.tube_masks(rng, count, data.frames, side, side)[crops]
        else:
            masks = mask_schemes.image_block_masks(rng, count, side, side, *data.blocks, rows=crops)
            masks = np.repeat(masks[:, None], data.frames, axis=1)
        return {**element, "masks": masks.reshape(len(self.rows), GLOBAL_CROPS, data.frames, side, side)}


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{field}: {value!r}, expected {expected}")
