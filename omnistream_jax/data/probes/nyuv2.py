"""NYU Depth v2 (Silberman et al. 2012) as BTS extracted it (Lee et al. 2019), in the layout that DINOv3 reads:

    nyu_train.txt, nyu_test.txt      a line a picture: "RGB DEPTH FOCAL", paths from the folder of the lists on, with or
                                     without a slash in front; 24,231 and 654 lines
    SCENE/rgb_NNNNN.jpg              640 x 480
    SCENE/sync_depth_NNNNN.png       16-bit PNG, millimetres, 0 where it is not known

root is the folder that holds the lists, or the one above it if it is called NYU or nyu. The lists are BTS's
nyudepthv2_train_files_with_gt.txt and nyudepthv2_test_files_with_gt.txt, renamed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.data.benchmarks.layout import first_with
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.files import read_lines, read_png16

LISTS = {"train": "nyu_train.txt", "test": "nyu_test.txt"}
COUNTS = {"train": 24_231, "test": 654}
SIZE = (480, 640)
UNITS_PER_METRE = 1000
_NAMED = 3  # files that a message names at most


@dataclasses.dataclass(frozen=True)
class NyuImages:
    """The pictures of a split, in the order of their sorted lines; a `probes.depth.DepthSource` with T = 1.

    Attributes:
      root: folder of the lists.
      split: "train" or "test".
      pairs: picture and depth of each.
      size: (height, width) that all of them have.
    """

    root: Path
    split: str
    pairs: tuple[tuple[Path, Path], ...]
    size: tuple[int, int] = SIZE

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"NYU Depth v2 ({self.split})"

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, index: int) -> str:
        """The picture's path."""
        return str(self.pairs[index][0])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One picture, uint8 [1, H, W, 3], and its depth, float32 [1, H, W] in metres, 0 where it is not known.

        Raises:
          DataError: a file is missing, damaged, or of another size.
        """
        picture_path, depth_path = self.pairs[index]
        picture, depth = read_image(picture_path, upright=False), read_png16(depth_path)
        for path, found in ((picture_path, picture.shape), (depth_path, depth.shape)):
            if found[:2] != tuple(self.size):
                raise DataError(
                    f"{path}: {found[1]} x {found[0]} pixels, expected {self.size[1]} x {self.size[0]}",
                    reason="another size",
                )
        return picture[None], (depth.astype(np.float32) / UNITS_PER_METRE)[None]

    def settings(self) -> dict[str, Any]:
        """JSON values: folder, list, counts, and whether all pictures are there ("complete")."""
        expected = COUNTS[self.split]
        counts = {"images": len(self), "expected_images": expected, "complete": len(self) == expected}
        return {"root": str(self.root), "list": LISTS[self.split], "size": list(self.size), **counts}


def open_nyuv2(root: str | Path, split: str, *, size: tuple[int, int] = SIZE, incomplete: bool = False) -> NyuImages:
    """The pictures that a split's list names; all of them must be there.

    Args:
      root: as the head of this file says.
      split: "train" or "test".
      size: (height, width) of the pictures.
      incomplete: take fewer or more than the published ones.

    Raises:
      DataError: another layout, a line that does not fit, files that are missing, or other counts than the published.
    """
    if split not in LISTS:
        raise DataError(f"split: {split!r}, expected one of {', '.join(LISTS)}")
    root = first_with(Path(root), ("", "NYU", "nyu"), [LISTS[split]], f"{LISTS[split]} of NYU Depth v2 as of BTS")
    path = root / LISTS[split]
    pairs = tuple(_pair(root, line, path) for line in sorted(read_lines(path)))
    if not pairs or (not incomplete and len(pairs) != COUNTS[split]):
        raise DataError(
            f"{path}: {len(pairs):,} pictures, the published list has {COUNTS[split]:,}; "
            "config.allow_incomplete takes what is there, for numbers that cannot be compared"
        )
    missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise DataError(f"{path}: {len(missing):,} of its files are missing: {named}", reason="file is missing")
    return NyuImages(root, split, pairs, tuple(size))


def _pair(root: Path, line: str, path: Path) -> tuple[Path, Path]:
    fields = line.split()
    if len(fields) != 3:
        raise DataError(f"{path}: a line is {line!r}, expected a picture, its depth and a focal length")
    return root / fields[0].strip("/"), root / fields[1].strip("/")
