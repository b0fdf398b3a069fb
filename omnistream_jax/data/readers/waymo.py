"""Waymo Open Dataset, perception (Sun et al. 2020), version 1: a TFRecord file of `Frame` messages for each segment.

    individual_files_{training,validation}/*.tfrecord    (or individual_files/{training,validation}/)

A sequence is one of the five cameras of one segment, 20 s at 10 frames a second. Field numbers and geometry are those
of the public dataset.proto and its comments. Depth is sparse: the first returns of the laser on the roof, each at the
pixel that the data set says it is seen in (which accounts for the rolling shutter); where several fall into one pixel
the nearest counts. Depth is measured from where the camera stood in the middle of its exposure; the shutter's
remaining effect on it is ignored.
Images are drawn without their lens distortion, at the same focal length and centre; returns move with them.
The world is Waymo's, moved so that the vehicle stands at the origin when the segment begins: its own origin is up to
tens of kilometres away, where float32 keeps centimetres only.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix
from omnistream_jax.data.readers.files import reading
from omnistream_jax.data.readers.tfrecord import (
    Fields,
    message_fields,
    messages,
    numbers,
    one,
    read_record,
    record_spans,
)
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_CAMERAS = {"FRONT": 1, "FRONT_LEFT": 2, "FRONT_RIGHT": 3, "SIDE_LEFT": 4, "SIDE_RIGHT": 5}
_FOLDERS = {"train": "training", "val": "validation"}
_TOP_LASER = 1
_FROM_OPENCV = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""OpenCV's axes (right, down, forward) as Waymo's cameras have them: x forward, y left, z up."""


class Waymo(SequenceReader):
    """Five cameras on a car in traffic, with sparse depth from its laser."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True, frames_per_second=10.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 5 * 798, "val": 5 * 202}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> Waymo:
        """The segments of a split that are there. Raises DataError where the layout is another."""
        if split not in _FOLDERS:
            raise DataError(f"waymo has the splits train and val, not {split!r}")
        names = (f"individual_files_{_FOLDERS[split]}", f"individual_files/{_FOLDERS[split]}")
        files = [path.relative_to(root).as_posix() for name in names for path in (root / name).glob("*.tfrecord")]
        found = [f"{file}/{camera}" for file in files for camera in _CAMERAS]
        return cls(f"waymo ({split})", root, require_some(found, root, f"{names[0]}/*.tfrecord"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        return [str(row) for row in range(len(record_spans((self.root / sequence).parent)))]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        file, camera = (self.root / sequence).parent, Path(sequence).name
        origin, frames = _origin(file), []
        for name in names:
            path = f"{self.root / sequence}, frame {name}"
            with reading(path, "a Frame message of the Waymo Open Dataset"):
                frame = message_fields(read_record(file, *record_spans(file)[int(name)]))
                frames.append(_posed_frame(frame, _CAMERAS[camera], origin, path))
        return frames


@functools.lru_cache(maxsize=256)
def _origin(file: Path) -> np.ndarray:
    """[4, 4] that moves the world to where the vehicle stands in the segment's first frame."""
    spans = record_spans(file)
    if not spans:
        raise DataError(f"{file}: holds no frame")
    with reading(file, "a Frame message of the Waymo Open Dataset"):
        moved = np.eye(4)
        moved[:3, 3] = -_transform(message_fields(read_record(file, *spans[0])), 3)[:3, 3]
        return moved


def _posed_frame(frame: Fields, camera: int, origin: np.ndarray, path: str) -> PosedFrame:
    """What one camera saw. Frame: 1 context (2 cameras, 3 lasers), 3 pose, 4 images, 5 lasers."""
    context = message_fields(one(frame, 1))
    calibration, view = _named(messages(context, 2), camera), _named(messages(frame, 4), camera)
    intrinsics = numbers(calibration, 2, "<f8")
    if intrinsics.shape != (9,):
        raise ValueError(f"{intrinsics.size} intrinsics of a camera, not 9")
    camera_to_world = origin @ _transform(view, 3) @ _transform(calibration, 3) @ _FROM_OPENCV
    size = int(one(calibration, 5)), int(one(calibration, 4))
    image = _undistorted(_jpeg(one(view, 2), size), intrinsics)
    laser = _named(messages(frame, 5), _TOP_LASER)
    points, pixels = _returns(laser, _named(messages(context, 3), _TOP_LASER), _transform(frame, 3), camera)
    points = points @ origin[:3, :3].T + origin[:3, 3]
    depth = ((points - camera_to_world[:3, 3]) @ camera_to_world[:3, :3])[:, 2]
    depth = _splat(depth, _undistort_pixels(pixels, intrinsics), size)
    return posed_frame(image, intrinsics_matrix(*intrinsics[:4]), depth, camera_to_world, path)


def _returns(laser: Fields, calibration: Fields, pose: np.ndarray, camera: int) -> tuple[np.ndarray, np.ndarray]:
    """First returns that a camera sees: points [N, 3] in Waymo's world, and [N, 2] column and row of their pixels.

    RangeImage: 2 ranges [H, W, 4], 3 camera projections [H, W, 6] (camera, column, row, twice), 4 vehicle-to-world of
    each cell [H, W, 6] (roll, pitch, yaw, x, y, z), without which the vehicle's `pose` holds for all. Row 0 is the
    highest beam; columns run from azimuth pi to -pi, against the turn of the laser about its mount.
    """
    image = message_fields(one(laser, 2))
    ranges = _matrix(image, 2, "<f4")[..., 0].astype(np.float64)
    seen = _matrix(image, 3, "varint").reshape(*ranges.shape, 2, 3)
    height, width = ranges.shape
    row, column, which = np.nonzero((seen[..., 0] == camera) & (ranges[..., None] > 0))
    inclinations = numbers(calibration, 2, "<f8")
    if not inclinations.size:
        low, high = numbers(calibration, 3, "<f8"), numbers(calibration, 4, "<f8")
        inclinations = low + (np.arange(height) + 0.5) / height * (high - low)
    if inclinations.shape != (height,):
        raise ValueError(f"{inclinations.size} beam inclinations for {height} rows of the range image")
    extrinsic = _transform(calibration, 5)
    azimuth = np.pi * (1 - (2 * column + 1) / width) - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    inclination, distance = inclinations[::-1][row], ranges[row, column]
    level = distance * np.cos(inclination)
    points = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), distance * np.sin(inclination)], -1)
    points = points @ extrinsic[:3, :3].T + extrinsic[:3, 3]
    if 4 in image:
        cells = _matrix(image, 4, "<f4").astype(np.float64)[row, column]
        points = Rotation.from_euler("ZYX", cells[:, [2, 1, 0]]).apply(points) + cells[:, 3:]
    else:
        points = points @ pose[:3, :3].T + pose[:3, 3]
    return points, seen[row, column, which, 1:]


def _splat(depth: np.ndarray, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Depths [N] at places [N, 2] -> [H, W], 0 where there is none."""
    column, row = np.floor(pixels).astype(int).T
    inside = (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0]) & (depth > 0)
    image = np.full(size, np.inf)
    np.minimum.at(image, (row[inside], column[inside]), depth[inside])
    return np.where(np.isfinite(image), image, 0.0)


def _undistorted(image: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    matrix = intrinsics_matrix(*intrinsics[:4])
    matrix[:2, 2] -= 0.5  # OpenCV has pixel centres at whole numbers
    return cv2.undistort(image, matrix, intrinsics[4:])


def _undistort_pixels(pixels: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Where the centres of pixels [N, 2] of the published image lie in the undistorted one."""
    matrix = intrinsics_matrix(*intrinsics[:4])
    if not len(pixels):
        return np.zeros((0, 2))
    return cv2.undistortPoints(pixels[:, None] + 0.5, matrix, intrinsics[4:], P=matrix)[:, 0]


def _jpeg(data: memoryview, size: tuple[int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.size[::-1] != size:
            raise ValueError(f"an image of {image.width} x {image.height} pixels, calibrated for {size[1]} x {size[0]}")
        return np.asarray(image.convert("RGB"))


def _named(found: Sequence[Fields], name: int) -> Fields:
    """The message whose field 1, its name, is `name`."""
    for message in found:
        if message.get(1, [0])[-1] == name:
            return message
    raise ValueError(f"a frame lacks the camera or laser of number {name}")


def _transform(message: Fields, number: int) -> np.ndarray:
    """[4, 4] of a field that holds a Transform."""
    values = numbers(message_fields(one(message, number)), 1, "<f8")
    if values.shape != (16,):
        raise ValueError(f"{values.size} numbers of a transform, not 16")
    return values.reshape(4, 4)


def _matrix(message: Fields, number: int, dtype: str) -> np.ndarray:
    """[H, W, C] of a field that holds a compressed MatrixFloat or MatrixInt32: 1 data, 2 shape (1 dims)."""
    matrix = message_fields(zlib.decompress(one(message, number)))
    shape = numbers(message_fields(one(matrix, 2)), 1, "varint")
    if len(shape) != 3:
        raise ValueError(f"a matrix of {len(shape)} dimensions, not 3")
    return numbers(matrix, 1, dtype).reshape(shape)
