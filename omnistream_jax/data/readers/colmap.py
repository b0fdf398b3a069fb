"""Text files of COLMAP (https://colmap.github.io/format.html): cameras.txt and images.txt.

Poses are world-to-camera with OpenCV's axes; pixel centres lie at + 0.5, as ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.cameras import from_quaternion, intrinsics_matrix
from omnistream_jax.data.readers.files import reading

_CAMERAS = "COLMAP's cameras.txt: CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]"
_IMAGES = "COLMAP's images.txt: two lines an image, IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME and X Y POINT3D_ID ..."

# The place of (fx, fy, cx, cy) among a model's parameters, and of OpenCV's coefficients (k1, k2, p1, p2; of a fisheye
# k1 to k4), in order, as many as the model has.
_MODELS = {
    "SIMPLE_PINHOLE": ((0, 0, 1, 2), ()),
    "PINHOLE": ((0, 1, 2, 3), ()),
    "SIMPLE_RADIAL": ((0, 0, 1, 2), (3,)),
    "RADIAL": ((0, 0, 1, 2), (3, 4)),
    "OPENCV": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "OPENCV_FISHEYE": ((0, 1, 2, 3), (4, 5, 6, 7)),
}


class ColmapCamera(NamedTuple):
    """A line of cameras.txt; params float64 [P] in the model's order, focal lengths and centre in pixels."""

    model: str
    width: int
    height: int
    params: np.ndarray


class ColmapImage(NamedTuple):
    """Two lines of images.txt; world_to_cam float64 [4, 4], point_ids int64 [N]: the 3D points seen, without -1."""

    camera_id: int
    world_to_cam: np.ndarray
    point_ids: np.ndarray


def read_cameras(path: Path) -> dict[int, ColmapCamera]:
    """The cameras by id. Raises DataError that names the file and the line."""
    cameras = {}
    for number, line in _lines(path, _CAMERAS):
        if not line or line.startswith("#"):
            continue
        with reading(f"{path}, line {number}", _CAMERAS):
            camera_id, model, width, height, *params = line.split()
            cameras[int(camera_id)] = ColmapCamera(model, int(width), int(height), np.array(params, np.float64))
    return cameras


def read_images(path: Path) -> dict[str, ColmapImage]:
    """The registered images by name, in the file's order. Raises DataError that names the file and the line."""
    images = {}
    lines = _lines(path, _IMAGES)
    for number, line in lines:
        if not line or line.startswith("#"):
            continue
        with reading(f"{path}, line {number}", _IMAGES):
            _, *pose, camera_id, name = line.split(maxsplit=9)
            quaternion, translation = np.array(pose[:4], np.float64), np.array(pose[4:7], np.float64)
            matrix = from_quaternion(quaternion, translation, scalar_first=True)
            _, points = next(lines, (0, ""))  # empty where an image sees no point
            seen = np.array(points.split(), np.float64).reshape(-1, 3)[:, 2].astype(np.int64)
            images[name] = ColmapImage(int(camera_id), matrix, seen[seen >= 0])
    return images


def intrinsics_of(camera: ColmapCamera, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What OpenCV needs to undistort a camera's images.

    Args:
      camera: of one of the models SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV, OPENCV_FISHEYE.
      path: the cameras.txt that it came from, for messages.

    Returns:
      (intrinsics [3, 3], pixel centres at + 0.5; coefficients [4], (k1, k2, p1, p2), of a fisheye (k1, k2, k3, k4)).

    Raises:
      DataError: another model, or parameters that are not as many as it has.
    """
    if camera.model not in _MODELS:
        raise DataError(f"{path}: a camera of model {camera.model}, expected one of {', '.join(_MODELS)}")
    pinhole, lens = _MODELS[camera.model]
    expected = max(pinhole + lens) + 1
    if len(camera.params) != expected:
        raise DataError(f"{path}: {camera.model} with {len(camera.params)} parameters, expected {expected}")
    coefficients = np.zeros(4)
    coefficients[: len(lens)] = camera.params[list(lens)]
    return intrinsics_matrix(*camera.params[list(pinhole)]), coefficients


def _lines(path: Path, expected: str) -> Iterator[tuple[int, str]]:
    with reading(path, expected), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.strip()
