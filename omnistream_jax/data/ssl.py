"""The data of one self-supervised task: sources -> mixture -> clips -> crops -> batches with masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from omnistream_jax.data import masks as mask_schemes
from omnistream_jax.data.errors import DataError, because, require_field
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.multicrop import GLOBAL_CROPS, MultiCropSizes, multicrop
from omnistream_jax.data.schema import SelfSupervisedBatch
from omnistream_jax.data.sources import Source

MASK_SCHEMES = ("blocks", "tubes")


@dataclasses.dataclass(frozen=True)
class SelfSupervisedData(MixtureData[Source]):
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
        super().__post_init__()
        require_field(self.local_crops >= 0, "local_crops", self.local_crops, "0 or more")
        require_field(self.frames >= 1, "frames", self.frames, "1 or more")
        fits = len(self.stride) == 2 and 1 <= self.stride[0] <= self.stride[1]
        require_field(fits, "stride", self.stride, "(smallest, largest), from 1 on")
        for source in self.sources:
            limit = source.max_frames
            if limit is not None and self.frames > limit:
                raise DataError(f"frames: {self.frames}, but source {source.name} has {limit} frame in a record")
        self._check_sizes()
        self._check_masks()

    def _check_sizes(self) -> None:
        require_field(self.patch_size >= 1, "patch_size", self.patch_size, "1 or more")
        sizes = {"global_size": self.global_size, "local_size": self.local_size, "gram_size": self.gram_size}
        for field, size in sizes.items():
            if size is not None:
                expected = f"a positive multiple of patch_size {self.patch_size}"
                require_field(size > 0 and size % self.patch_size == 0, field, size, expected)
        require_field(self.gram_size is None or self.frames == 1, "gram_size", self.gram_size, "None for clips")

    def _check_masks(self) -> None:
        require_field(self.mask_scheme in MASK_SCHEMES, "mask_scheme", self.mask_scheme, " or ".join(MASK_SCHEMES))
        if self.mask_scheme == "tubes":
            expected = "None: tubes mask every clip, by their own constants"
            require_field(self.mask_probability is None, "mask_probability", self.mask_probability, expected)
            require_field(self.mask_ratio is None, "mask_ratio", self.mask_ratio, expected)
            return
        if self.mask_probability is not None:
            require_field(0 <= self.mask_probability <= 1, "mask_probability", self.mask_probability, "0 to 1")
        if self.mask_ratio is not None:
            low, high = self.mask_ratio
            require_field(0 <= low <= high <= 1, "mask_ratio", self.mask_ratio, "(smallest, largest) within 0 to 1")

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
        """Endless batches of this process: element `step` is a SelfSupervisedBatch of that step, with "skipped".

        The union of all processes' batches depends on (seed, step) only; see `MixtureData.dataset`.

        Raises:
          DataError: global_batch_size is no multiple of process_count.
        """
        shuffle_seed, crop_seed, mask_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(3))
        rows = range(process_index, self.global_batch_size, process_count)
        batches = self._batches(shuffle_seed, crop_seed, process_index, process_count)
        return batches.random_map(_Masks(self, rows), seed=mask_seed)

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source = self.sources[place]
        with because("image cannot be decoded" if source.max_frames == 1 else "video cannot be decoded"):
            sample = source.sample(index, rng, self.frames, self.stride)
        sizes = MultiCropSizes(self.global_size, self.local_size, self.local_crops, self.gram_size)
        crops = multicrop(sample.frames, rng, sizes)
        out = {"global_crops": crops.global_crops, "local_crops": crops.local_crops}
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
