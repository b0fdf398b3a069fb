"""PointOdyssey (Zheng et al. 2023), version 1.2:

    {train,val,test}/SEQUENCE/rgbs/rgb_NNNNN.jpg       960 x 540
    {train,val,test}/SEQUENCE/depths/depth_NNNNN.png   uint16, z-depth: 65535 is 1000 m and all beyond, which is sky
    {train,val,test}/SEQUENCE/anno.npz                 intrinsics [T, 3, 3], extrinsics [T, 4, 4]: world-to-camera

Blender puts the principal point of a centred camera at half the size: pixel centres lie at + 0.5. The authors' exporter
rounds both matrices to float16; rotations are made exact again here. Tracks, normals and masks are not read.
Some sequences have broken cameras: frames whose matrices are not finite, or no rigid motion, are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix, invert, rigid
from omnistream_jax.data.readers.files import read_npz, read_png16
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_FAR = 1000.0  # metres, of the largest depth that is stored


class PointOdyssey(SequenceReader):
    """Rendered video of moving people, animals and things, with its cameras."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 131, "val": 15, "test": 13}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> PointOdyssey:
        """The sequences of a split that are there. Raises DataError where the layout is another."""
        folder = require(root, split, expected="the folder of the split, one of train, val and test")
        found = [f"{split}/{path.parent.name}" for path in folder.glob("*/anno.npz")]
        return cls(f"point_odyssey ({split})", root, require_some(found, folder, "SEQUENCE/anno.npz"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        intrinsics, extrinsics = _cameras(self.root / sequence / "anno.npz")
        finite = np.isfinite(intrinsics).all((1, 2)) & np.isfinite(extrinsics).all((1, 2))
        volume = np.linalg.det(np.where(finite[:, None, None], extrinsics[:, :3, :3], 0.0))  # 1 of a rotation
        return [f"{number:05d}" for number in np.flatnonzero(finite & (np.abs(volume - 1) < 0.01))]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        intrinsics, extrinsics = _cameras(folder / "anno.npz")
        frames = []
        for name in names:
            path = folder / "rgbs" / f"rgb_{name}.jpg"
            stored = read_png16(folder / "depths" / f"depth_{name}.png")
            (fx, _, cx), (_, fy, cy) = intrinsics[int(name), :2]
            world_to_cam = extrinsics[int(name)]
            rotation = Rotation.from_matrix(world_to_cam[:3, :3]).as_matrix()
            frames.append(
                posed_frame(
                    read_image(path),
                    intrinsics_matrix(fx, fy, cx, cy),
                    stored * (_FAR / 65535),
                    invert(rigid(rotation, world_to_cam[:3, 3])),
                    str(path),
                    sky=stored == 65535,
                )
            )
        return frames


@functools.lru_cache(maxsize=64)
def _cameras(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """float64 intrinsics [T, 3, 3] and extrinsics [T, 4, 4], as stored."""
    intrinsics, extrinsics = (array.astype(np.float64) for array in read_npz(path, "intrinsics", "extrinsics"))
    if intrinsics.shape[1:] != (3, 3) or extrinsics.shape[1:] != (4, 4) or len(intrinsics) != len(extrinsics):
        raise DataError(
            f"{path}: intrinsics {intrinsics.shape} and extrinsics {extrinsics.shape}, expected [T, 3, 3] and [T, 4, 4]"
        )
    return intrinsics, extrinsics
