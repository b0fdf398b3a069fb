"""Masks as indexed PNG files, as DAVIS stores its annotations and davis2017-evaluation reads predictions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import MAX_PIXELS
from omnistream_jax.data.readers.files import reading
from omnistream_jax.utils.files import written_aside

_EXPECTED = "a mask: a PNG of one 8-bit channel, indexed or grey"


def _palette() -> np.ndarray:
    """Bits 0, 3 and 6 of a number are the highest bits of its red, bits 1, 4 and 7 of its green, the others of blue."""
    number, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for place in range(8):
        colours[:, place % 3] |= ((number >> place & 1) << (7 - place // 3)).astype(np.uint8)
    return colours


PALETTE = _palette()
"""uint8 [256, 3], the colours of DAVIS and PASCAL VOC; the first is black."""


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W], the numbers of a mask.

    Raises:
      DataError: the file is missing, damaged, too large, or no picture of one 8-bit channel; the message names it.
    """
    with reading(path, _EXPECTED), Image.open(path, formats=("PNG",)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are allowed")
        if image.mode not in ("P", "L"):
            raise ValueError(f"it has mode {image.mode}")
        return np.asarray(image)


def write_mask(path: str | os.PathLike, mask: np.ndarray) -> None:
    """Writes uint8 [H, W] as an indexed PNG with PALETTE, aside and then renamed; its folder exists."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"mask: {mask.dtype} {list(mask.shape)}, expected uint8 [H, W]")
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.ravel().tolist())
    with written_aside(Path(path)) as aside:
        image.save(aside, format="PNG")
