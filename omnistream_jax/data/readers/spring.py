"""Spring (Mehl et al. 2023), rendered from the Blender movie of that name:

    train/NNNN/frame_left/frame_left_NNNN.png        1920 x 1080, numbered from 1
    train/NNNN/disp1_left/disp1_left_NNNN.dsp5       HDF5, key disparity: 3840 x 2160 samples, in pixels of the image
    train/NNNN/cam_data/intrinsics.txt               a frame a row: fx fy cx cy, in pixels of the image
    train/NNNN/cam_data/extrinsics.txt               a frame a row: 16 numbers, world-to-camera, OpenCV
    train/NNNN/maps/skymap_left/skymap_left_NNNN.png not zero where the sky is; a download of its own, read if there

depth = fx * 0.065 m / disparity. Each pixel of the image covers 2 x 2 samples. On a plane disparity is linear in the
image, so that their mean belongs to the pixel's centre; where they differ by more than 2 % of it an edge runs through
the pixel, and the first sample counts, as in the authors' own code. A disparity of 0, inf or NaN is not valid.
The test sequences have no disparity. From memory, not from the data: the layout of the sky maps, pixel centres at
+ 0.5 (the principal point of Blender's cameras is half the image's size).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix, invert
from omnistream_jax.data.readers.files import read_hdf5, read_numbers, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_BASELINE = 0.065  # metres
_SAME_SURFACE = 0.02  # of the disparity


class Spring(SequenceReader):
    """Scenes of an animated movie with exact depth and a moving camera."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 37}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> Spring:
        """The sequences that are there. Raises DataError where the layout is another."""
        if split != "train":
            raise DataError(f"spring has depth and cameras in the split train only, not in {split!r}")
        folder = require(root, "train", expected="the folder of sequences")
        found = [f"train/{path.parent.parent.name}" for path in folder.glob("*/cam_data/extrinsics.txt")]
        return cls("spring (train)", root, require_some(found, folder, "NNNN/cam_data/extrinsics.txt"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        folder = self.root / sequence
        intrinsics, extrinsics = _cameras(folder)
        finite = np.isfinite(intrinsics).all(1) & np.isfinite(extrinsics).all((1, 2))
        shown = {path.stem.removeprefix("frame_left_") for path in (folder / "frame_left").glob("frame_left_*.png")}
        names = [f"{row + 1:04d}" for row in np.flatnonzero(finite)]
        return [name for name in names if name in shown]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        intrinsics, extrinsics = _cameras(folder)
        frames = []
        for name in names:
            row = int(name) - 1
            path = folder / f"frame_left/frame_left_{name}.png"
            image = read_image(path)
            disparity = _disparity(folder / f"disp1_left/disp1_left_{name}.dsp5", image.shape[:2])
            with np.errstate(divide="ignore", invalid="ignore"):
                depth = intrinsics[row, 0] * _BASELINE / disparity
            sky = _sky(folder / f"maps/skymap_left/skymap_left_{name}.png", image.shape[:2])
            camera = intrinsics_matrix(*intrinsics[row])
            frames.append(posed_frame(image, camera, depth, invert(extrinsics[row]), str(path), sky=sky))
        return frames


@functools.lru_cache(maxsize=64)
def _cameras(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """[T, 4] of fx, fy, cx, cy and [T, 4, 4], world-to-camera."""
    intrinsics = read_numbers(folder / "cam_data" / "intrinsics.txt", 4)
    extrinsics = read_numbers(folder / "cam_data" / "extrinsics.txt", 16).reshape(-1, 4, 4)
    if len(intrinsics) != len(extrinsics):
        rows = f"{len(intrinsics)} rows, extrinsics.txt beside it {len(extrinsics)}"
        raise DataError(f"{folder / 'cam_data' / 'intrinsics.txt'}: {rows}; expected one a frame in both")
    return intrinsics, extrinsics


def _disparity(path: Path, size: tuple[int, int]) -> np.ndarray:
    """float64 [H, W] in pixels of the image, whose (H, W) is `size`, from the file's [2 H, 2 W]."""
    samples = read_hdf5(path, "disparity")
    if samples.shape != (2 * size[0], 2 * size[1]):
        raise DataError(f"{path}: shape {samples.shape}, expected twice the image's {size[0]} x {size[1]}")
    corners = np.stack([samples[i::2, j::2] for i in (0, 1) for j in (0, 1)]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf and NaN stay: neither compares as a surface
        surface = corners.max(0) - corners.min(0) <= _SAME_SURFACE * corners.min(0)
        return np.where(surface, corners.mean(0), corners[0])


def _sky(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """bool [H, W] from a map of the image's size or twice that; None where the maps were not downloaded."""
    if not path.parent.is_dir():
        return None
    with reading(path, "a sky map of one channel"), Image.open(path) as image:
        sky = np.asarray(image.convert("L")) > 0
    return sky[::2, ::2] if sky.shape == (2 * size[0], 2 * size[1]) else sky
