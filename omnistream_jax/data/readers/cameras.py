"""Conventions of cameras that data sets use, turned into ours (data/schema.py). NumPy, float64."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

_FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])


def intrinsics_matrix(fx: float, fy: float, cx: float, cy: float, *, centre: float = 0.5) -> np.ndarray:
    """[3, 3]; `centre` is where the file's convention puts the middle of the first pixel: 0.5 as ours, or 0."""
    return np.array([[fx, 0.0, cx + 0.5 - centre], [0.0, fy, cy + 0.5 - centre], [0.0, 0.0, 1.0]])


def rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """[4, 4] of a rotation [3, 3] and a translation [3]."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


def invert(matrix: np.ndarray) -> np.ndarray:
    """World-to-camera from camera-to-world and back, for rigid motions [..., 4, 4]."""
    return np.linalg.inv(np.asarray(matrix, np.float64))


def from_quaternion(quaternion: np.ndarray, translation: np.ndarray, *, scalar_first: bool) -> np.ndarray:
    """[4, 4] of a quaternion (w, x, y, z) if `scalar_first`, else (x, y, z, w), of any length above 0."""
    rotation = Rotation.from_quat(quaternion, scalar_first=scalar_first).as_matrix()
    return rigid(rotation, translation)


def from_opengl(cam_to_world: np.ndarray) -> np.ndarray:
    """A camera that looks along -z with y up (OpenGL, Blender, nerfstudio) as one of ours; the world stays."""
    return np.asarray(cam_to_world, np.float64) @ _FLIP_YZ


def ray_to_z_depth(distance: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Distance along each pixel's ray [H, W] -> depth along the camera's axis [H, W]."""
    height, width = distance.shape
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    return distance / np.sqrt(x**2 + y**2 + 1)


def quarter_turns(
    turns: int, intrinsics: np.ndarray, cam_to_world: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """The camera of np.rot90(image, turns): turned counter-clockwise.

    Args:
      turns: quarters of a full turn, any integer.
      intrinsics: [3, 3] of the image as it is, which is `width` x `height`.
      cam_to_world: [4, 4] of the image as it is.

    Returns:
      (intrinsics [3, 3], cam_to_world [4, 4]) of the turned image.
    """
    intrinsics, cam_to_world = np.array(intrinsics, np.float64), np.array(cam_to_world, np.float64)
    # one turn: column u and row v go to column v and row width - u, so the axes x and y become y and -x
    turned_to_old = np.array([[0.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    for _ in range(turns % 4):
        (fx, _, cx), (_, fy, cy) = intrinsics[:2]
        intrinsics = intrinsics_matrix(fy, fx, cy, width - cx)
        cam_to_world = cam_to_world @ turned_to_old
        width, height = height, width
    return intrinsics, cam_to_world


def far_outliers(depth: np.ndarray, percentile: float) -> np.ndarray:
    """bool [H, W], True where depth [H, W] lies above a percentile of its finite, positive values."""
    known = np.isfinite(depth) & (depth > 0)
    if not known.any():
        return np.zeros(depth.shape, bool)
    return known & (depth > np.percentile(depth[known], percentile))
