"""TartanAir (Wang et al. 2020), the training set of the left camera:

    ENVIRONMENT/{Easy,Hard}/PNNN/image_left/NNNNNN_left.png         640 x 480, focal length 320
    ENVIRONMENT/{Easy,Hard}/PNNN/depth_left/NNNNNN_left_depth.npy   float32 metres, z-depth; 1000 and more is sky
    ENVIRONMENT/{Easy,Hard}/PNNN/pose_left.txt                      tx ty tz qx qy qz qw a frame, camera-to-world

Poses are in NED axes, x forward, y right, z down, of the camera as of the world; here both get OpenCV's. The farthest
2 % of a frame's depth that is not sky (another sky sphere, or gaps in the models) is not valid, as CUT3R trains on it.
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
from omnistream_jax.data.readers.cameras import far_outliers, from_quaternion, intrinsics_matrix
from omnistream_jax.data.readers.files import read_npy, read_numbers
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_SIZE = (480, 640)
_SKY = 1000.0  # metres
# rows: OpenCV's x, y and z among the axes forward, right and down
_FROM_NED = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


class TartanAir(SequenceReader):
    """Rendered flights through eighteen environments; in a few of them things move."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 369}  # from memory, not counted

    @classmethod
    def open(cls, root: Path, split: str = "train") -> TartanAir:
        """The trajectories that are there. Raises DataError where the layout is another."""
        if split not in cls.EXPECTED:
            raise DataError(f"tartanair has no split {split!r}, expected train: there are no others with depth")
        found = [path.parent.relative_to(root).as_posix() for path in root.glob("*/*/P*/pose_left.txt")]
        found = [name for name in found if name.split("/")[1] in ("Easy", "Hard")]
        return cls(
            f"tartanair ({split})", root, require_some(found, root, "ENVIRONMENT/{Easy,Hard}/PNNN/pose_left.txt")
        )

    def _frame_names(self, sequence: str) -> Sequence[str]:
        poses = _poses(self.root / sequence / "pose_left.txt")
        usable = np.isfinite(poses).all(1) & (np.abs(poses[:, 3:]).max(1) > 0)
        return [f"{number:06d}" for number in np.flatnonzero(usable)]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        poses = _poses(folder / "pose_left.txt")
        frames = []
        for name in names:
            path = folder / "image_left" / f"{name}_left.png"
            image = read_image(path)
            if image.shape[:2] != _SIZE:
                raise DataError(f"{path}: {image.shape[1]} x {image.shape[0]} pixels, expected 640 x 480")
            depth = read_npy(folder / "depth_left" / f"{name}_left_depth.npy").astype(np.float64)
            sky = depth >= _SKY
            pose = poses[int(name)]
            cam_to_world = _FROM_NED @ from_quaternion(pose[3:], pose[:3], scalar_first=False) @ _FROM_NED.T
            intrinsics = intrinsics_matrix(320.0, 320.0, 320.0, 240.0)
            hidden = far_outliers(np.where(sky, 0.0, depth), 98.0)
            frames.append(posed_frame(image, intrinsics, depth, cam_to_world, str(path), sky=sky, hidden=hidden))
        return frames


@functools.lru_cache(maxsize=64)
def _poses(path: Path) -> np.ndarray:
    """float64 [T, 7], as stored."""
    return read_numbers(path, 7)
