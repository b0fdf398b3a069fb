"""Virtual KITTI 2 (Cabon et al. 2020), release 2.0.3; the layout is written down from memory, not from the files:

    vkitti_2.0.3_rgb/SCENE/VARIATION/frames/rgb/CAMERA/rgb_NNNNN.jpg          1242 x 375
    vkitti_2.0.3_depth/SCENE/VARIATION/frames/depth/CAMERA/depth_NNNNN.png    uint16 centimetres; 65535 is sky
    vkitti_2.0.3_textgt/SCENE/VARIATION/intrinsic.txt   below a line of names, frame cameraID fx fy cx cy
    vkitti_2.0.3_textgt/SCENE/VARIATION/extrinsic.txt   likewise, frame cameraID and a 4 x 4 matrix, world-to-camera

The three archives may also lie unpacked in one folder, without the folders vkitti_2.0.3_*. The principal point is
(620.5, 187), the middle of 1242 x 375 pixels whose centres are whole numbers. There is no official split: Scene20 is
kept for tests, as CUT3R does.
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
from omnistream_jax.data.readers.files import read_png16, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_SCENES = {"train": ("Scene01", "Scene02", "Scene06", "Scene18"), "test": ("Scene20",)}
_SKY = 65535


class VKitti2(SequenceReader):
    """Rendered drives in ten kinds of weather and heading, seen by two cameras."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True, frames_per_second=10.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 80, "test": 20}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> VKitti2:
        """The drives of a split that are there, one a camera. Raises DataError where the layout is another."""
        if split not in _SCENES:
            raise DataError(f"vkitti2 has no split {split!r}, expected one of {', '.join(_SCENES)}")
        folder = _part(root, "rgb")
        found = [path for scene in _SCENES[split] for path in folder.glob(f"{scene}/*/frames/rgb/Camera_[01]")]
        names = [path.relative_to(root).as_posix() for path in found]
        expected = f"SCENE/VARIATION/frames/rgb/Camera_0 of {', '.join(_SCENES[split])}"
        return cls(f"vkitti2 ({split})", root, require_some(names, folder, expected))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        intrinsics, extrinsics = self._cameras(sequence)
        shared = sorted(intrinsics.keys() & extrinsics.keys())
        return [f"{n:05d}" for n in shared if np.isfinite(intrinsics[n]).all() and np.isfinite(extrinsics[n]).all()]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        *_, scene, variation, _, _, camera = sequence.split("/")
        depths = _part(self.root, "depth") / scene / variation / "frames" / "depth" / camera
        intrinsics, extrinsics = self._cameras(sequence)
        frames = []
        for name in names:
            path = self.root / sequence / f"rgb_{name}.jpg"
            stored = read_png16(depths / f"depth_{name}.png")
            matrix = intrinsics_matrix(*intrinsics[int(name)], centre=0.0)
            pose = invert(extrinsics[int(name)].reshape(4, 4))
            image, sky = read_image(path), stored == _SKY
            frames.append(posed_frame(image, matrix, stored / 100.0, pose, str(path), sky=sky))
        return frames

    def _cameras(self, sequence: str) -> tuple[Mapping[int, np.ndarray], Mapping[int, np.ndarray]]:
        *_, scene, variation, _, _, camera = sequence.split("/")
        folder = _part(self.root, "textgt") / scene / variation
        number = int(camera.removeprefix("Camera_"))
        return _rows(folder / "intrinsic.txt", number, 4), _rows(folder / "extrinsic.txt", number, 16)


def _part(root: Path, kind: str) -> Path:
    folder = root / f"vkitti_2.0.3_{kind}"
    return folder if folder.is_dir() else root


@functools.lru_cache(maxsize=256)
def _rows(path: Path, camera: int, columns: int) -> Mapping[int, np.ndarray]:
    """The numbers of a camera's frames by the frame's number; the first line of the file names its columns."""
    with reading(path, f"a line of names, then rows of frame, cameraID and {columns} numbers"):
        lines = [line.split() for line in path.read_text().splitlines()[1:]]
        table = np.array([[float(field) for field in line] for line in lines if line])
        if table.ndim != 2 or table.shape[1] != columns + 2:
            raise ValueError(f"its shape is {table.shape}")
    return {int(row[0]): row[2:] for row in table if row[1] == camera}
