"""OmniWorld-Game (Zhou et al. 2025), its archives unpacked scene by scene as its extract_one_game_scene.sh does:

    UID/color/NNNNNN.png          1280 x 720, 24 frames a second
    UID/depth/NNNNNN.png          uint16, an inverse depth buffer
    UID/split_info.json           "split": the frames' numbers, split by split
    UID/camera/split_K.json       focals [S], cx, cy; world-to-camera, OpenCV: quats [S, 4] (w, x, y, z), trans [S, 3];
                                  pixel centres at + 0.5
    metadata/omniworld_game_metadata.csv    columns UID and Test Split Index ("0,5", or empty), among others

A sequence is one split: cameras and scale agree within it only, so nothing is metric. With d = value / 65535 depth is
d / (1000 - 999 d) / 0.004; below d = 0.0015 it is too near to be right, above 65500 / 65535 it is the sky.
The paper counts 96 thousand sequences; they are being published part by part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import from_quaternion, intrinsics_matrix, invert
from omnistream_jax.data.readers.files import read_csv, read_json, read_png16, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_TOO_NEAR, _SKY = 0.0015, 65500 / 65535
_TABLES = ("omniworld_game_metadata.csv", "OmniWorld-Game_metadata.csv")  # as it is stored, as its card calls it


class OmniWorldGame(SequenceReader):
    """Video recorded in games, with the depth buffer."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=False, dynamic=True, frames_per_second=24.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 96_000}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> OmniWorldGame:
        """The sequences that are there: for "train" all but the benchmark's, for "test" those of the benchmark.

        Raises DataError where the layout is another, or where the table does not say what is the benchmark's.
        """
        if split not in ("train", "test"):
            raise DataError(f"omniworld has the splits train and test, not {split!r}")
        named = [root / "metadata" / table for table in _TABLES if (root / "metadata" / table).exists()]
        table = named[0] if named else require(root, "metadata", _TABLES[0], expected="the table of test splits")
        test_splits, found = _test_splits(table), []
        for camera in root.glob("*/camera/split_*.json"):
            uid, number = camera.parent.parent.name, int(camera.stem.removeprefix("split_"))
            if uid not in test_splits:
                raise DataError(f"{table}: no row for {uid}; expected one for every scene, to leave out test splits")
            if (number in test_splits[uid]) == (split == "test"):
                found.append(camera.relative_to(root).as_posix())
        return cls(f"omniworld ({split})", root, require_some(found, root, f"UID/camera/split_K.json of {split}"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        cameras = _cameras(self.root / sequence)
        return [name for name, row in cameras.rows.items() if cameras.usable(row)]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        camera_file = self.root / sequence
        scene, cameras = camera_file.parent.parent, _cameras(camera_file)
        frames = []
        for name in names:
            row, path = cameras.rows[name], scene / "color" / f"{name}.png"
            buffer = read_png16(scene / "depth" / f"{name}.png") / 65535.0
            depth = buffer / (1000.0 - 999.0 * buffer) / 0.004
            intrinsics = intrinsics_matrix(cameras.focals[row], cameras.focals[row], cameras.cx, cameras.cy)
            pose = invert(from_quaternion(cameras.quaternions[row], cameras.translations[row], scalar_first=True))
            sky, hidden = buffer > _SKY, buffer < _TOO_NEAR
            frames.append(posed_frame(read_image(path), intrinsics, depth, pose, str(path), sky=sky, hidden=hidden))
        return frames


@dataclasses.dataclass(frozen=True)
class _Cameras:
    rows: Mapping[str, int]  # frame's name -> row of the arrays below
    focals: np.ndarray
    cx: float
    cy: float
    quaternions: np.ndarray
    translations: np.ndarray

    def usable(self, row: int) -> bool:
        numbers = np.concatenate([self.focals[row : row + 1], self.quaternions[row], self.translations[row]])
        return bool(np.isfinite(numbers).all() and self.quaternions[row].any())


@functools.lru_cache(maxsize=256)
def _cameras(path: Path) -> _Cameras:
    info, camera = path.parent.parent / "split_info.json", read_json(path)
    number = int(path.stem.removeprefix("split_"))
    with reading(info, f'"split", a list of lists of frame numbers, the one of number {number} among them'):
        rows = {f"{int(frame):06d}": row for row, frame in enumerate(read_json(info)["split"][number])}
    with reading(path, f"focals, cx, cy, quats and trans of {len(rows)} frames"):
        focals = np.asarray(camera["focals"], np.float64).reshape(len(rows))
        quaternions = np.asarray(camera["quats"], np.float64).reshape(len(rows), 4)
        translations = np.asarray(camera["trans"], np.float64).reshape(len(rows), 3)
        return _Cameras(rows, focals, float(camera["cx"]), float(camera["cy"]), quaternions, translations)


def _test_splits(path: Path) -> Mapping[str, frozenset[int]]:
    """UID -> the numbers of its splits that belong to the benchmark."""
    rows = read_csv(path, "UID", "Test Split Index")
    with reading(path, "numbers of splits, with commas between them, as Test Split Index"):
        numbers = [(row["UID"].strip(), row["Test Split Index"].split(",")) for row in rows]
        return {uid: frozenset(int(number) for number in listed if number.strip()) for uid, listed in numbers}
