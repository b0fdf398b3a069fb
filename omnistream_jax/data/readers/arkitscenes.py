"""ARKitScenes (Baruch et al. 2021), the raw data set with the assets vga_wide, vga_wide_intrinsics, lowres_depth and
lowres_wide.traj:

    raw/{Training,Validation}/VIDEO/vga_wide/VIDEO_SECONDS.png               640 x 480, 30 a second
    raw/{Training,Validation}/VIDEO/vga_wide_intrinsics/VIDEO_SECONDS.pincam     width height fx fy cx cy
    raw/{Training,Validation}/VIDEO/lowres_depth/VIDEO_SECONDS.png           uint16 millimetres, 256 x 192, z-depth
    raw/{Training,Validation}/VIDEO/lowres_wide.traj    seconds, angle times axis [3], translation [3], world-to-camera

The trajectory has ten poses a second: a frame's is found between its neighbours, rotations along the shortest arc,
centres along a line. Seconds of files that belong together may differ by a thousandth. Frames outside the trajectory,
in a gap of more than half a second, or without depth or intrinsics are left out. Depth is brought to the size of the
image by its nearest pixel. Pixel centres lie at whole numbers, as Apple documents for its intrinsics.

Phones were held in any direction. All of a video is turned by quarters so that up is up. The table's sky_direction is
not used: CUT3R found it wrong in places, and the poses tell (the world's z points up).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix, quarter_turns, rigid
from omnistream_jax.data.readers.files import read_numbers, read_png16
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_FOLDERS = {"train": "Training", "val": "Validation"}
_MAX_GAP = 0.5  # seconds


class ARKitScenes(SequenceReader):
    """Rooms scanned with a tablet: video with the depth of its LiDAR."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False, frames_per_second=30.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 4520, "val": 551}  # of raw_train_val_splits.csv

    @classmethod
    def open(cls, root: Path, split: str = "train") -> ARKitScenes:
        """The videos of a split that are there. Raises DataError where the layout is another."""
        if split not in _FOLDERS:
            raise DataError(f"arkitscenes has no split {split!r}, expected one of {', '.join(_FOLDERS)}")
        folder = require(root, "raw", _FOLDERS[split], expected="the folder of the split's videos")
        found = [path.parent for path in folder.glob("*/lowres_wide.traj") if (path.parent / "vga_wide").is_dir()]
        names = [path.relative_to(root).as_posix() for path in found]
        expected = "VIDEO/lowres_wide.traj with VIDEO/vga_wide"
        return cls(f"arkitscenes ({split})", root, require_some(names, folder, expected))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        folder = self.root / sequence
        trajectory = _trajectory(folder / "lowres_wide.traj")
        others = [_by_time(folder / kind) for kind in ("lowres_depth", "vga_wide_intrinsics")]
        return [
            path.stem
            for time, path in _by_time(folder / "vga_wide").items()
            if trajectory.covers(time) and all(_at(files, time) is not None for files in others)
        ]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        trajectory = _trajectory(folder / "lowres_wide.traj")
        depths, cameras = (_by_time(folder / kind) for kind in ("lowres_depth", "vga_wide_intrinsics"))
        frames = []
        for name in names:
            path, time = folder / "vga_wide" / f"{name}.png", _seconds(name)
            image = read_image(path)
            height, width = image.shape[:2]
            camera = _at(cameras, time)
            numbers = read_numbers(camera, 6)[0]
            if tuple(numbers[:2]) != (width, height):
                raise DataError(
                    f"{camera}: {numbers[0]:g} x {numbers[1]:g} pixels, but {path.name} has {width} x {height}"
                )
            depth = _resized(read_png16(_at(depths, time)), height, width) / 1000.0
            intrinsics = intrinsics_matrix(*numbers[2:], centre=0.0)
            turns = trajectory.turns
            intrinsics, pose = quarter_turns(turns, intrinsics, trajectory.pose(time), width, height)
            image, depth = (np.ascontiguousarray(np.rot90(array, turns)) for array in (image, depth))
            frames.append(posed_frame(image, intrinsics, depth, pose, str(path)))
        return frames


@dataclasses.dataclass(frozen=True)
class _Trajectory:
    """times [N], strictly rising seconds; rotations camera-to-world over them; centres [N, 3] of the camera."""

    times: np.ndarray
    rotations: Slerp
    centres: np.ndarray
    turns: int  # counter-clockwise quarters that put up on top

    def covers(self, time: float) -> bool:
        """Whether a pose at that time is known, or lies between two that are not far apart."""
        after = int(np.searchsorted(self.times, time))
        if after == len(self.times) or (after == 0 and time < self.times[0]):
            return False
        return self.times[after] == time or self.times[after] - self.times[after - 1] <= _MAX_GAP

    def pose(self, time: float) -> np.ndarray:
        """Camera-to-world [4, 4]."""
        centre = [np.interp(time, self.times, self.centres[:, axis]) for axis in range(3)]
        return rigid(self.rotations(time).as_matrix(), np.array(centre))


@functools.lru_cache(maxsize=32)
def _trajectory(path: Path) -> _Trajectory:
    table = read_numbers(path, 7)
    table = table[np.isfinite(table).all(1)]
    times, first = np.unique(np.round(table[:, 0], 3), return_index=True)  # frames are named by thousandths
    if len(times) < 2:
        raise DataError(f"{path}: {len(times)} poses, expected rows of seconds, angle-axis and translation")
    cam_to_world = Rotation.from_rotvec(table[first, 1:4]).inv()
    centres = -cam_to_world.apply(table[first, 4:7])
    up = cam_to_world.inv().apply([0.0, 0.0, 1.0]).mean(0)  # of the world, among the camera's axes
    turns = int(np.argmax([-up[1], up[0], up[1], -up[0]]))  # up is at the top, right, bottom, left of the image
    return _Trajectory(times, Slerp(times, cam_to_world), centres, turns)


@functools.lru_cache(maxsize=96)
def _by_time(folder: Path) -> Mapping[float, Path]:
    """The files VIDEO_SECONDS.* of a folder by their seconds, in order."""
    files = {_seconds(path.stem): path for path in folder.glob("*_*.p*")}
    return dict(sorted(files.items()))


def _seconds(name: str) -> float:
    try:
        return float(name.rpartition("_")[2])
    except ValueError:
        raise DataError(f"{name}: expected a file named VIDEO_SECONDS") from None


def _at(files: Mapping[float, Path], time: float) -> Path | None:
    """The file of a time; of its neighbours by a thousandth, where there is none."""
    for shift in (0.0, -0.001, 0.001):
        found = files.get(round(time + shift, 3))
        if found is not None:
            return found
    return None


def _resized(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """[height, width] of [h, w], by the nearest pixel."""
    rows = ((np.arange(height) + 0.5) * depth.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * depth.shape[1] / width).astype(int)
    return depth[rows[:, None], columns]
