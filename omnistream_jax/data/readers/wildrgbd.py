"""WildRGB-D (Xia et al. 2024), as github.com/wildrgbd/wildrgbd unpacks it:

    CATEGORY/scenes/SCENE/rgb/00000.png, depth/00000.png   depth: uint16 millimetres, 0 not valid
    CATEGORY/scenes/SCENE/metadata                         JSON: "K" (nine numbers, column by column), "w", "h"
    CATEGORY/scenes/SCENE/cam_poses.txt                    a frame a row: number, 4 x 4 camera-to-world, OpenCV
    CATEGORY/camera_eval_list.json, nvs_list.json          {"train": ["scenes/SCENE", ...], "val": [...]}

Pixel centres lie at whole numbers, as in the authors' wildrgbd_generate_point_cloud.py. The split "train" is what both
lists train on, "val" all else that they name, as CUT3R splits it. In scenes that types.json calls "hand", a hand holds
the object and moves with it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix
from omnistream_jax.data.readers.files import read_json, read_numbers, read_png16, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_LISTS = ("camera_eval_list.json", "nvs_list.json")


class WildRGBD(SequenceReader):
    """Posed RGB-D video of objects where they stand, taken with a phone."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {}  # published for all splits together only: some 20,000 [M]

    @classmethod
    def open(cls, root: Path, split: str = "train") -> WildRGBD:
        """The scenes of a split that are there. Raises DataError where the layout is another."""
        if split not in ("train", "val"):
            raise DataError(f"WildRGB-D has no split {split!r}, expected train or val")
        categories = [path.parent.name for path in root.glob("*/scenes")]
        found = []
        for category in require_some(categories, root, "CATEGORY/scenes"):
            listed = _scenes_of(root / category, split)
            found += [f"{category}/{scene}" for scene in listed if (root / category / scene / "rgb").is_dir()]
        return cls(f"wildrgbd ({split})", root, require_some(found, root, "CATEGORY/scenes/SCENE/rgb of the split"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        return list(_poses(self.root / sequence / "cam_poses.txt"))

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        intrinsics, size = _camera(folder / "metadata")
        poses = _poses(folder / "cam_poses.txt")
        frames = []
        for name in names:
            path = folder / "rgb" / f"{name}.png"
            image = read_image(path)
            if image.shape[:2] != size:
                raise DataError(f"{path}: metadata says {size[0]} x {size[1]}, the image is {image.shape[:2]}")
            depth = read_png16(folder / "depth" / f"{name}.png") / 1000.0
            frames.append(posed_frame(image, intrinsics, depth, poses[name], str(path)))
        return frames


def _scenes_of(category: Path, split: str) -> set[str]:
    """Paths of a split's scenes relative to the category."""
    train, named = [], set()
    for name in _LISTS:
        path = require(category, name, expected="a list of the scenes that a task trains on and is measured on")
        with reading(path, '{"train": [scenes/SCENE, ...], "val": [...]}'):
            lists = read_json(path)
            train.append(set(lists["train"]))
            named |= {*lists["train"], *lists["val"]}
    chosen = train[0] & train[1] if split == "train" else named - (train[0] & train[1])
    outside = [scene for scene in chosen if ".." in Path(scene).parts or Path(scene).is_absolute()]
    if outside:
        raise DataError(f"{category}: its lists name {outside[0]!r}, expected paths of the form scenes/SCENE")
    return chosen


@functools.lru_cache(maxsize=256)
def _poses(path: Path) -> Mapping[str, np.ndarray]:
    """float64 [4, 4] by the names of frames, in order; poses that are not finite are left out."""
    rows = read_numbers(path, 17)
    rows = rows[np.isfinite(rows).all(1)]
    return {f"{int(row[0]):05d}": row[1:].reshape(4, 4) for row in rows}


def _camera(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """The intrinsics [3, 3], and the height and width that they belong to."""
    with reading(path, 'a JSON object with "K" (nine numbers, column by column), "w" and "h"'):
        metadata = read_json(path)
        matrix = np.array(metadata["K"], np.float64).reshape(3, 3).T
        intrinsics = intrinsics_matrix(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], centre=0.0)
        return intrinsics, (int(metadata["h"]), int(metadata["w"]))
