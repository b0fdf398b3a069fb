"""ScanNet v2 (Dai et al. 2017), as its SensReader unpacks it:

    scans/SCENE/color/N.jpg, depth/N.png         uint16 millimetres, 640 x 480, 0 not valid
    scans/SCENE/pose/N.txt                        camera-to-world, OpenCV; -inf where tracking was lost
    scans/SCENE/intrinsic/intrinsic_depth.txt     4 x 4, pixel centres at whole numbers
    scannetv2_{train,val,test}.txt                a scene a line, in root

Colour (1296 x 968) is resized to the size of depth, whose camera is used: the two are registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix
from omnistream_jax.data.readers.files import read_lines, read_numbers, read_png16
from omnistream_jax.data.schema import PosedFrame, SequenceInfo


class ScanNet(SequenceReader):
    """Posed RGB-D video of rooms, 30 frames a second."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False, frames_per_second=30.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 1201, "val": 312, "test": 100}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> ScanNet:
        """The scenes of a split that are there. Raises DataError where the layout is another."""
        scans = require(root, "scans", expected="the folder of scenes")
        listed = read_lines(require(root, f"scannetv2_{split}.txt", expected="the list of the split's scenes"))
        found = [f"scans/{scene}" for scene in listed if (scans / scene / "pose").is_dir()]
        return cls(f"scannet ({split})", root, require_some(found, scans, "SCENE/pose of the split's scenes"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        poses = self.root / sequence / "pose"
        names = sorted((path.stem for path in poses.glob("*.txt")), key=int)
        return [name for name in names if np.isfinite(read_numbers(poses / f"{name}.txt", 4)).all()]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        matrix = read_numbers(folder / "intrinsic" / "intrinsic_depth.txt", 4)
        intrinsics = intrinsics_matrix(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], centre=0.0)
        frames = []
        for name in names:
            path = folder / "color" / f"{name}.jpg"
            depth = read_png16(folder / "depth" / f"{name}.png") / 1000.0
            size = depth.shape[1], depth.shape[0]
            image = np.asarray(Image.fromarray(read_image(path)).resize(size, Image.Resampling.BOX))
            pose = read_numbers(folder / "pose" / f"{name}.txt", 4)
            frames.append(posed_frame(image, intrinsics, depth, pose, str(path)))
        return frames
