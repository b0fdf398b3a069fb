"""Aria Synthetic Environments (Avetisyan et al. 2024), a fisheye camera on glasses in 100,000 made-up homes:

    SCENE/rgb/vignetteNNNNNNN.jpg      704 x 704, fisheye, lying on its side; 10 frames a second
    SCENE/depth/depthNNNNNNN.png       uint16 millimetres along the ray; 65535 not valid
    SCENE/trajectory.csv               a header, then a frame a row: graph_uid, two times, tx ty tz, qx qy qz qw,
                                       device-to-world
    calibration.json                   the camera, the same for all scenes; ours, written once as below

Where calibration.json is not there it is asked of the package projectaria_tools, which writes it like this:

    from projectaria_tools.projects import ase
    camera = ase.get_ase_rgb_calibration()
    json.dump({"model": "fisheye624", "image_size": camera.get_image_size().tolist(),
               "parameters": camera.get_projection_params().tolist(),
               "camera_to_device": camera.get_transform_device_camera().to_matrix().tolist()}, file)

Images are drawn as a pinhole camera of the same focal length sees them, 8/11 as wide as the fisheye image (512 pixels
of 704, as is usual: half of the view, 81 degrees across), and are turned upright, a quarter clockwise.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require_some
from omnistream_jax.data.readers.cameras import from_quaternion, intrinsics_matrix, ray_to_z_depth
from omnistream_jax.data.readers.files import need, read_json, read_png16, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_SAME_SURFACE = 0.02  # of the distance
_NOT_VALID = 65535
_UPRIGHT = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
"""The upright camera's axes in the camera that lies on its side: its x is the other's -y, its y the other's x."""


class AriaSynthetic(SequenceReader):
    """Rendered walks through furnished homes, seen from glasses."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False, frames_per_second=10.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 100_000}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> AriaSynthetic:
        """The scenes that are there. Raises DataError where the layout is another or the calibration is missing."""
        if split != "train":
            raise DataError(f"ase has only the split train, not {split!r}")
        found = [path.parent.name for path in root.glob("*/trajectory.csv")]
        sequences = require_some(found, root, "SCENE/trajectory.csv")
        _calibration(root)
        return cls("ase (train)", root, sequences)

    def _frame_names(self, sequence: str) -> Sequence[str]:
        poses = _device_poses(self.root / sequence / "trajectory.csv")
        shown = {path.stem.removeprefix("vignette") for path in (self.root / sequence / "rgb").glob("vignette*.jpg")}
        usable = np.isfinite(poses).all(1) & poses[:, 3:].any(1)
        names = [f"{row:07d}" for row in np.flatnonzero(usable)]
        return [name for name in names if name in shown]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        calibration, folder = _calibration(self.root), self.root / sequence
        poses = _device_poses(folder / "trajectory.csv")
        frames = []
        for name in names:
            path, depth_path = folder / f"rgb/vignette{name}.jpg", folder / f"depth/depth{name}.png"
            image, distance = read_image(path), read_png16(depth_path)
            for file, array in ((path, image), (depth_path, distance)):
                if array.shape[:2] != calibration.image_size[::-1]:
                    size = f"{array.shape[1]} x {array.shape[0]} pixels"
                    raise DataError(f"{file}: {size}, but the calibration is for {calibration.image_size}")
            image, distance, intrinsics = _rectify(image, distance, calibration)
            depth = ray_to_z_depth(distance / 1000.0, intrinsics)
            row = poses[int(name)]
            device_to_world = from_quaternion(row[3:], row[:3], scalar_first=False)
            pose = device_to_world @ np.array(calibration.camera_to_device) @ _UPRIGHT
            frames.append(posed_frame(image, intrinsics, depth, pose, str(path)))
        return frames


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The fisheye camera. Tuples, so that what is computed from it can be kept.

    Attributes:
      parameters: 15 of the model fisheye624: f, cx, cy (pixel centres at whole numbers), 6 radial, 2 tangential, 4 of
        a thin prism.
      image_size: width and height in pixels.
      camera_to_device: 4 x 4, from the camera as it lies.
    """

    parameters: tuple[float, ...]
    image_size: tuple[int, int]
    camera_to_device: tuple[tuple[float, ...], ...]


def project_fisheye624(points: np.ndarray, parameters: Sequence[float]) -> np.ndarray:
    """Pixels of points before the camera, by Project Aria's model of that name.

    With a = x / z, b = y / z, r = |(a, b)| and theta = atan r: the equidistant image q = theta (1 + sum k_i
    theta^(2 i + 2)) (a, b) / r gets tangential terms 2 (q . p) q + |q|^2 p and thin-prism terms
    (s_0 |q|^2 + s_1 |q|^4, s_2 |q|^2 + s_3 |q|^4).

    Args:
      points: [..., 3] in the camera's axes, z > 0.
      parameters: see `Calibration`.

    Returns:
      float64 [..., 2], columns and rows; pixel centres at whole numbers.
    """
    focal, *centre = parameters[:3]
    radial, tangential, prism = np.array(parameters[3:9]), np.array(parameters[9:11]), np.array(parameters[11:15])
    slope = points[..., :2] / points[..., 2:]
    radius = np.linalg.norm(slope, axis=-1, keepdims=True)
    theta = np.arctan(radius)
    bent = 1 + sum(k * theta ** (2 * i + 2) for i, k in enumerate(radial))
    q = slope * bent * np.divide(theta, radius, out=np.ones_like(theta), where=radius > 0)
    square = (q**2).sum(-1, keepdims=True)
    moved = q + 2 * (q @ tangential)[..., None] * q + square * tangential
    moved = moved + square * prism[[0, 2]] + square**2 * prism[[1, 3]]
    return focal * moved + np.array(centre)


def _rectify(
    image: np.ndarray, distance: np.ndarray, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fisheye image and distance (uint16) -> upright pinhole image, distance (float32, 0 not valid), intrinsics."""
    columns, rows = _pinhole_maps(calibration)
    image = cv2.remap(image, columns, rows, cv2.INTER_LINEAR)
    known = ((distance > 0) & (distance < _NOT_VALID)).astype(np.float32)
    distance = distance.astype(np.float32) * known
    nearest = cv2.remap(distance, columns, rows, cv2.INTER_NEAREST)
    between = cv2.remap(distance, columns, rows, cv2.INTER_LINEAR)
    # Between two surfaces, or beside a hole, there is nothing at the mean of the distances.
    inside = (cv2.remap(known, columns, rows, cv2.INTER_LINEAR) == 1) & (
        np.abs(between - nearest) <= _SAME_SURFACE * nearest
    )
    distance = np.where(inside, between, nearest)
    height, width = distance.shape
    focal = calibration.parameters[0]
    intrinsics = intrinsics_matrix(focal, focal, height / 2, width / 2)
    return np.ascontiguousarray(np.rot90(image, -1)), np.rot90(distance, -1), intrinsics


@functools.lru_cache(maxsize=4)
def _pinhole_maps(calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """float32 [H, W] twice: the column and the row of the fisheye image that each pixel of the pinhole image shows."""
    width, height = (8 * size // 11 for size in calibration.image_size)
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    rays = np.stack([x, y, np.full_like(x, calibration.parameters[0])], -1)
    pixels = project_fisheye624(rays, calibration.parameters).astype(np.float32)
    return np.ascontiguousarray(pixels[..., 0]), np.ascontiguousarray(pixels[..., 1])


@functools.lru_cache(maxsize=4)
def _calibration(root: Path) -> Calibration:
    path = root / "calibration.json"
    stored = read_json(path) if path.exists() else _published(path)
    with reading(path, "model, image_size (2), parameters (15) and camera_to_device (4 x 4) of a fisheye camera"):
        if stored["model"] != "fisheye624":
            raise DataError(f"{path}: model is {stored['model']!r}, expected 'fisheye624'")
        parameters = np.asarray(stored["parameters"], np.float64).reshape(15)
        width, height = (int(size) for size in stored["image_size"])
        matrix = np.asarray(stored["camera_to_device"], np.float64).reshape(4, 4)
    return Calibration(tuple(parameters.tolist()), (width, height), tuple(map(tuple, matrix.tolist())))


def _published(path: Path) -> dict[str, Any]:
    try:
        published = need("projectaria_tools.projects.ase")
    except DataError:
        message = f"{path}: there is no such file, and projectaria_tools is not installed; expected the calibration"
        raise DataError(f"{message} that omnistream_jax/data/readers/ase.py says how to write") from None
    camera = published.get_ase_rgb_calibration()
    return {
        "model": "fisheye624",
        "image_size": camera.get_image_size(),
        "parameters": camera.get_projection_params(),
        "camera_to_device": camera.get_transform_device_camera().to_matrix(),
    }


@functools.lru_cache(maxsize=64)
def _device_poses(path: Path) -> np.ndarray:
    """[T, 7]: tx ty tz qx qy qz qw, device-to-world, a row a frame."""
    with reading(path, "a header and rows of graph_uid, two times, tx ty tz and qx qy qz qw"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row[3:10] for row in list(csv.reader(file))[1:] if row]
        return np.array(rows, np.float64).reshape(-1, 7)
