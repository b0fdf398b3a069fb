"""BlendedMVS, and with its + and ++ parts BlendedMVG (Yao et al. 2020), as github.com/YoYo000/BlendedMVS unpacks it:

    PROJECT/blended_images/00000000.jpg          768 x 576; 00000000_masked.jpg beside it is not used
    PROJECT/rendered_depth_maps/00000000.pfm     float32 depth, 0 not valid
    PROJECT/cams/00000000_cam.txt                "extrinsic", 4 x 4 world-to-camera, OpenCV; "intrinsic", 3 x 3; depths
    PROJECT/cams/pair.txt                        number of views; for each its number, then: n, n times (view, score)
    BlendedMV{G,S}_training.txt, validation_list.txt     a project a line, in root

Photographs of one place each, in no order. A project has a scale of its own. Pixel centres lie at + 0.5, as MVSNet of
the same authors has them [M]. The split "train" is the list BlendedMVG_training.txt, or where only BlendedMVS was
unpacked, BlendedMVS_training.txt; "val" is validation_list.txt, the same for both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix, invert
from omnistream_jax.data.readers.files import read_lines, read_pfm, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_LISTS = {"train": ("BlendedMVG_training.txt", "BlendedMVS_training.txt"), "val": ("validation_list.txt",)}


class BlendedMVS(SequenceReader):
    """Photographs of buildings, statues and small things, blended with pictures of their mesh, which gives depth."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=False, dynamic=False, ordered=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 495, "val": 7}  # of BlendedMVG; BlendedMVS alone has 106 and 7

    @classmethod
    def open(cls, root: Path, split: str = "train") -> BlendedMVS:
        """The projects of a split that are there. Raises DataError where the layout is another."""
        if split not in _LISTS:
            raise DataError(f"BlendedMVS has no split {split!r}, expected train or val")
        lists = [root / name for name in _LISTS[split] if (root / name).is_file()]
        if not lists:
            names = " or ".join(_LISTS[split])
            raise DataError(f"{root}: there is no {names} in it; expected the list of the split's projects")
        found = [project for project in read_lines(lists[0]) if (root / project / "cams").is_dir()]
        return cls(f"blendedmvs ({split})", root, require_some(found, root, f"PROJECT/cams of {lists[0].name}"))

    def neighbours(self, index: int, frame: int) -> Sequence[int]:
        """The frames that pair.txt names for this one, best score first."""
        sequence = self.sequences[index]
        return _neighbours(self.root / sequence / "cams", tuple(self._frame_names(sequence)))[frame]

    def _frame_names(self, sequence: str) -> Sequence[str]:
        return _names(self.root / sequence)

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        frames = []
        for name in names:
            path = folder / "blended_images" / f"{name}.jpg"
            intrinsics, pose = _camera(folder / "cams" / f"{name}_cam.txt")
            depth = read_pfm(folder / "rendered_depth_maps" / f"{name}.pfm")
            frames.append(posed_frame(read_image(path), intrinsics, depth, pose, str(path)))
        return frames


@functools.lru_cache(maxsize=256)
def _names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name.removesuffix("_cam.txt") for path in (folder / "cams").glob("*_cam.txt"))
    return tuple(n for n in names if all(np.isfinite(part).all() for part in _camera(folder / "cams" / f"{n}_cam.txt")))


def _camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics [3, 3] and camera-to-world [4, 4]."""
    with reading(path, "extrinsic, a 4 x 4 matrix, intrinsic, a 3 x 3 matrix and the range of depth"):
        words = path.read_text().split()
        if (words[0], words[17]) != ("extrinsic", "intrinsic"):
            raise ValueError(f"in the place of these words it has {words[0]!r} and {words[17]!r}")
        pose = invert(np.array(words[1:17], np.float64).reshape(4, 4))
        matrix = np.array(words[18:27], np.float64).reshape(3, 3)
        return intrinsics_matrix(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]), pose


@functools.lru_cache(maxsize=256)
def _neighbours(cams: Path, names: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """For each frame, the others by falling score; frames that were left out are not among them."""
    path = cams / "pair.txt"
    place = {int(name): index for index, name in enumerate(names)}
    found: list[tuple[int, ...]] = [() for _ in names]
    with reading(path, "the number of views, then two lines a view: its number; n, and n times a view and its score"):
        count, *lines = [line.split() for line in read_lines(path)]
        if len(lines) != 2 * int(count[0]):
            raise ValueError(f"it has {len(lines)} lines for {count[0]} views")
        for (view,), (_, *pairs) in zip(lines[::2], lines[1::2], strict=True):
            scored = sorted(zip(map(float, pairs[1::2]), map(int, pairs[::2]), strict=True), key=lambda p: -p[0])
            if int(view) in place:
                found[place[int(view)]] = tuple(place[other] for _, other in scored if other in place)
    return tuple(found)
