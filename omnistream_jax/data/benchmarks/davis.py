"""DAVIS-2017 (Pont-Tuset et al. 2017), its 30 validation sequences at 480p, for semi-supervised segmentation:

    ImageSets/2017/val.txt                  a name of a sequence a line
    JPEGImages/480p/SEQUENCE/NNNNN.jpg      854 x 480, some wider
    Annotations/480p/SEQUENCE/NNNNN.png     indexed: 0 no object, then the objects by number, 255 void

root is the folder that holds them, or the one above it if it is called DAVIS. Masks after the first one serve the score
alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from omnistream_jax.data.benchmarks.layout import files_of, first_with, partners
from omnistream_jax.data.benchmarks.mask_files import read_mask
from omnistream_jax.data.benchmarks.masked import VOID, MaskedSequence, MaskedVideos
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.files import read_lines

SEQUENCES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        **{"bike-packing": (69, 2), "blackswan": (50, 1), "bmx-trees": (80, 2), "breakdance": (84, 1)},
        **{"camel": (90, 1), "car-roundabout": (75, 1), "car-shadow": (40, 1), "cows": (104, 1)},
        **{"dance-twirl": (90, 1), "dog": (60, 1), "dogs-jump": (66, 3), "drift-chicane": (52, 1)},
        **{"drift-straight": (50, 1), "goat": (90, 1), "gold-fish": (78, 5), "horsejump-high": (50, 2)},
        **{"india": (81, 3), "judo": (34, 2), "kite-surf": (50, 3), "lab-coat": (47, 5), "libby": (49, 1)},
        **{"loading": (50, 3), "mbike-trick": (79, 2), "motocross-jump": (40, 2), "paragliding-launch": (80, 3)},
        **{"parkour": (100, 1), "pigs": (79, 3), "scooter-black": (43, 2), "shooting": (40, 3), "soapbox": (99, 3)},
    }
)
"""Frames and objects of each sequence of the validation set: 30 sequences, 1,999 frames, 61 objects."""
_NAMED = 12  # differences that a message tells at most


class DavisSequence(MaskedSequence):
    """A sequence as it lies on the disk; opening it decodes its first mask.

    Raises:
      DataError: the first mask cannot be read or shows no object.
    """

    def __init__(self, name: str, frame_paths: list[Path], mask_paths: list[Path]):
        self.name, self.frame_paths, self.mask_paths = name, tuple(frame_paths), tuple(mask_paths)
        first = read_mask(mask_paths[0])
        self.size = first.shape
        self.objects = int(first[first != VOID].max(initial=0))
        if not self.objects:
            raise DataError(f"{mask_paths[0]}: shows no object; the first mask says what is to be followed")

    def __len__(self) -> int:
        return len(self.frame_paths)

    def frame(self, index: int) -> np.ndarray:
        """See MaskedSequence; a picture of another size than the first mask is an error too."""
        return self._sized(read_image(self.frame_paths[index]), self.frame_paths[index])

    def mask(self, index: int) -> np.ndarray:
        """See MaskedSequence; a mask of another size than the first is an error too."""
        return self._sized(read_mask(self.mask_paths[index]), self.mask_paths[index])

    def frame_name(self, index: int) -> str:
        """As the frame's file is called."""
        return self.frame_paths[index].stem

    def identity(self) -> list[Any]:
        """Names and sizes of the files."""
        return [[path.parent.name, path.name, path.stat().st_size] for path in self.frame_paths + self.mask_paths]

    def _sized(self, array: np.ndarray, path: Path) -> np.ndarray:
        height, width = array.shape[:2]
        if (height, width) != self.size:
            expected = f"{self.size[1]} x {self.size[0]} as {self.mask_paths[0].name} of {self.mask_paths[0].parent}"
            raise DataError(f"{path}: {width} x {height} pixels, expected {expected}")
        return array


def open_davis(root: str | os.PathLike, allow_incomplete: bool = False) -> MaskedVideos:
    """The validation set.

    Args:
      root: the folder that holds the layout.
      allow_incomplete: take what is there of val.txt, whatever its names and numbers; `counts` says what differs.

    Raises:
      DataError: the layout is another, a file is missing or broken, or sequences, frames and objects are not as
        published and need be.
    """
    listed = "ImageSets/2017/val.txt"
    root = first_with(Path(root), ("", "DAVIS"), (listed,), f"{listed} of DAVIS-2017")
    names = read_lines(root / listed)
    if len(set(names)) != len(names):
        raise DataError(f"{root / listed}: names a sequence twice")
    sequences = []
    for name in names:
        if name != Path(name).name:
            raise DataError(f"{root / listed}: {name!r} is no name of a folder")
        frames = files_of(root / "JPEGImages" / "480p" / name, ".jpg")
        if frames:
            masks = partners(frames, root / "Annotations" / "480p" / name, ".png", "annotation")
            sequences.append(DavisSequence(name, frames, masks))
    counts = _counts(sequences)
    told = _told(counts)
    if not sequences:
        raise DataError(f"{root}: DAVIS-2017 has no frames here: {told}")
    if not (counts["complete"] or allow_incomplete):
        raise DataError(
            f"{root}: DAVIS-2017 is not as published: {told}. "
            "With allow_incomplete=True what is there is evaluated, and the result says so",
            reason="benchmark is not complete",
        )
    return MaskedVideos("davis2017", str(root), tuple(sequences), counts)


def _counts(sequences: list[DavisSequence]) -> dict[str, Any]:
    found = {sequence.name: (len(sequence), sequence.objects) for sequence in sequences}
    differences = []
    for name, numbers in SEQUENCES.items():
        for what, has, should in zip(("frames", "objects"), found.get(name, (0, 0)), numbers, strict=True):
            if has != should:
                differences.append(f"{name}: {has} of {should} {what}")
    differences += [f"{name}: not among the published" for name in found if name not in SEQUENCES]
    frames, objects = (sum(numbers[place] for numbers in found.values()) for place in (0, 1))
    expected_frames, expected_objects = (sum(numbers[place] for numbers in SEQUENCES.values()) for place in (0, 1))
    return {
        "sequences": len(found),
        "expected_sequences": len(SEQUENCES),
        "frames": frames,
        "expected_frames": expected_frames,
        "objects": objects,
        "expected_objects": expected_objects,
        "differences": differences,
        "complete": not differences,
    }


def _told(counts: Mapping[str, Any]) -> str:
    numbers = [
        f"{counts[name]:,} of {counts[f'expected_{name}']:,} {name}" for name in ("sequences", "frames", "objects")
    ]
    differences = counts["differences"]
    more = f"; and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
    return f"{', '.join(numbers)} ({'; '.join(differences[:_NAMED])}{more})"
