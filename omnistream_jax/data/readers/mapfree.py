"""Map-free Visual Relocalization (Arnold et al. 2022), as Niantic publishes it:

    {train,val}/sNNNNN/{seq0,seq1}/frame_NNNNN.jpg   540 x 720; numbers may be skipped
    {train,val}/sNNNNN/intrinsics.txt                a frame a line: seq0/frame_00000.jpg fx fy cx cy width height
    {train,val}/sNNNNN/poses.txt                     a frame a line: seq0/frame_00000.jpg qw qx qy qz tx ty tz,
                                                     world-to-camera, OpenCV

A training scene has two videos in one world, both of them sequences here; a validation scene has one video (seq1) and
a single photograph (seq0), which is left out. Poses of the test scenes are kept secret (rows of zeros).
No measured depth is published: frames have cameras only. (What CUT3R computed by multi-view stereo belongs to the
cameras of another reconstruction and is not read.)
From memory, not from the data: where pixel centres lie; at + 0.5 here, as in COLMAP.
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
from omnistream_jax.data.readers.cameras import from_quaternion, intrinsics_matrix, invert
from omnistream_jax.data.readers.files import read_lines, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_VIDEOS = {"train": ("seq0", "seq1"), "val": ("seq1",)}


class MapFree(SequenceReader):
    """Hand-held video of outdoor places, with metric cameras and no depth."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 2 * 460, "val": 65}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> MapFree:
        """The videos of a split that are there. Raises DataError where the layout is another."""
        if split not in _VIDEOS:
            raise DataError(f"mapfree has posed frames in the splits train and val, not in {split!r}")
        folder = require(root, split, expected="the folder of the split's scenes")
        scenes = [path.parent for path in folder.glob("*/poses.txt")]
        videos = [scene / video for scene in scenes for video in _VIDEOS[split] if (scene / video).is_dir()]
        found = [video.relative_to(root).as_posix() for video in videos]
        return cls(f"mapfree ({split})", root, require_some(found, folder, "SCENE/poses.txt with SCENE/seq1"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        scene, video = (self.root / sequence).parent, Path(sequence).name
        poses, intrinsics = _rows(scene / "poses.txt", 7), _rows(scene / "intrinsics.txt", 6)
        names = [name for name in poses if name.startswith(f"{video}/") and name in intrinsics]
        return [name for name in names if np.isfinite(poses[name]).all() and poses[name][:4].any()]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        scene = (self.root / sequence).parent
        poses, intrinsics = _rows(scene / "poses.txt", 7), _rows(scene / "intrinsics.txt", 6)
        frames = []
        for name in names:
            *camera, width, height = intrinsics[name]
            image = read_image(scene / name)
            if image.shape[:2] != (height, width):
                size = f"{image.shape[1]} x {image.shape[0]} pixels"
                raise DataError(f"{scene / name}: {size}, but intrinsics.txt is for {width:g} x {height:g}")
            pose = invert(from_quaternion(poses[name][:4], poses[name][4:], scalar_first=True))
            frames.append(posed_frame(image, intrinsics_matrix(*camera), None, pose, str(scene / name)))
        return frames


@functools.lru_cache(maxsize=256)
def _rows(path: Path, count: int) -> Mapping[str, np.ndarray]:
    """Frame's path -> its `count` numbers, in the order of the file."""
    rows = {}
    with reading(path, f"lines of a frame's path and {count} numbers"):
        for line in read_lines(path):
            name, *numbers = line.split()
            if name.startswith("#"):
                continue
            if len(numbers) != count:
                raise ValueError(f"{len(numbers)} numbers after {name}")
            rows[name] = np.array([float(number) for number in numbers])
    return rows
