"""Which patches the student does not see (iBOT): blocks for images, tubes through time for clips.

Images, as DINOv3 (`dinov3/data/masking.py`): overlapping rectangles up to an exact count. Clips, as V-JEPA 2
(`multiseq_multiblock3d.py`): the union of a few equal rectangles, the same in every frame:

    frame 0     frame 1            # masked
    . # # #     . # # #            . seen
    . # # #     . # # #
    # # . .     # # . .
    # # . .     # # . .
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from omnistream_jax.data.errors import DataError

MIN_BLOCK_PATCHES = 4
MAX_BLOCK_SHARE = 0.5  # of all patches
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height / width, log-uniform
BLOCK_TRIES = 10

TUBE_SCHEMES = ((8, 0.15), (2, 0.7))  # (blocks, share of the frame that each covers)
TUBE_ASPECT = (0.75, 1.5)  # height / width, uniform
TUBE_TRIES = 1000


def image_block_masks(
    rng: np.random.Generator,
    count: int,
    height: int,
    width: int,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    rows: Sequence[int] | None = None,
) -> np.ndarray:
    """Block masks for a batch of `count` images of height x width patches.

    floor(count * probability) images are masked, spread at random over the batch; their ratios are the upper ends of
    as many equal parts of `ratio`, so a batch always covers the whole range.

    Args:
      rng: all randomness comes from it.
      count: images (global crops) in the batch.
      height: patches.
      width: patches.
      probability: share of the images that are masked.
      ratio: smallest and largest share of an image's patches that are masked.
      rows: which images' masks to make; each comes out the same whichever others are made with it, so processes that
        share a batch make only their own. None makes all.

    Returns:
      bool [len(rows) or count, height, width], True = masked.
    """
    masked = int(count * probability)
    bounds = np.linspace(*ratio, masked + 1)[1:]
    patches = np.zeros(count, np.int64)
    patches[:masked] = [int(height * width * bound) for bound in bounds]
    patches = rng.permutation(patches)
    seeds = rng.integers(2**63, size=count)
    rows = range(count) if rows is None else rows
    masks = [_block_mask(np.random.default_rng(seeds[row]), height, width, patches[row]) for row in rows]
    return np.stack(masks) if masks else np.zeros((0, height, width), bool)


def _block_mask(rng: np.random.Generator, height: int, width: int, patches: int) -> np.ndarray:
    """One mask of exactly `patches` patches: rectangles while they fit, then single patches at random."""
    mask = np.zeros((height, width), bool)
    missing = int(patches)
    while missing > 0:
        added = _add_block(rng, mask, min(missing, int(MAX_BLOCK_SHARE * height * width)))
        if added == 0:
            break
        missing -= added
    if missing > 0:
        free = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.choice(free, size=missing, replace=False)] = True
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, most: int) -> int:
    """Masks one more rectangle that adds 1 to `most` patches; returns how many, 0 if none was found in time."""
    height, width = mask.shape
    for _ in range(BLOCK_TRIES):
        area = MIN_BLOCK_PATCHES + (most - MIN_BLOCK_PATCHES) * rng.random()
        aspect = math.exp(rng.uniform(math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])))
        block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if block_height >= height or block_width >= width:
            continue
        top, left = rng.integers(height - block_height + 1), rng.integers(width - block_width + 1)
        block = mask[top : top + block_height, left : left + block_width]
        added = block.size - int(block.sum())
        if 0 < added <= most:
            block[:] = True
            return added
    return 0


def tube_masks(rng: np.random.Generator, count: int, frames: int, height: int, width: int) -> np.ndarray:
    """Tube masks for a batch of `count` clips of `frames` frames of height x width patches; every clip is masked.

    The whole batch shares the number of blocks (8 of 0.15 or 2 of 0.7 of the frame, either with probability 1/2) and
    their height and width; each clip has its own positions, drawn again while they leave no patch visible.

    Returns:
      bool [count, frames, height, width], True = masked, the same for all frames of a clip.

    Raises:
      DataError: the frame is so small that its blocks cover it.
    """
    blocks, share = TUBE_SCHEMES[rng.integers(len(TUBE_SCHEMES))]
    masks = tube_block_masks(rng, count, height, width, blocks, share)
    return np.repeat(masks[:, None], frames, axis=1)


def tube_block_masks(
    rng: np.random.Generator, count: int, height: int, width: int, blocks: int, share: float
) -> np.ndarray:
    """One scheme of `tube_masks`, one frame of it: bool [count, height, width]."""
    block_height, block_width = _tube_block_size(rng, height, width, share)
    masks = np.zeros((count, height, width), bool)
    todo = np.arange(count)
    for _ in range(TUBE_TRIES):
        masks[todo] = _unions(rng, len(todo), height, width, blocks, block_height, block_width)
        todo = np.flatnonzero(masks.all(axis=(1, 2)))
        if len(todo) == 0:
            return masks
    raise DataError(
        f"tube masks: {blocks} blocks of {block_height} x {block_width} leave nothing visible of {height} x {width} "
        "patches; use larger crops or smaller patches"
    )


def _tube_block_size(rng: np.random.Generator, height: int, width: int, share: float) -> tuple[int, int]:
    aspect = rng.uniform(*TUBE_ASPECT)
    area = int(height * width * share)
    block_height = min(max(round(math.sqrt(area * aspect)), 1), height)
    block_width = min(max(round(math.sqrt(area / aspect)), 1), width)
    return block_height, block_width


def _unions(
    rng: np.random.Generator, count: int, height: int, width: int, blocks: int, block_height: int, block_width: int
) -> np.ndarray:
    """Unions of `blocks` rectangles of one size at random positions: bool [count, height, width]."""
    top = rng.integers(height - block_height + 1, size=(count, blocks, 1))
    left = rng.integers(width - block_width + 1, size=(count, blocks, 1))
    row, column = np.arange(height), np.arange(width)
    in_rows = (row >= top) & (row < top + block_height)  # [count, blocks, height]
    in_columns = (column >= left) & (column < left + block_width)  # [count, blocks, width]
    return (in_rows[:, :, :, None] & in_columns[:, :, None, :]).any(axis=1)
