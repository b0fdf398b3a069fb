"""Checked camera poses of benchmarks, float64."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.cameras import from_quaternion, rigid
from omnistream_jax.data.readers.files import read_numbers, reading


def checked_pose(matrix: np.ndarray, path: object) -> np.ndarray:
    """A pose [4, 4] with its rotation made orthonormal, as going through a quaternion does in the published evaluators.

    Files keep six digits or so. Raises DataError, naming `path`, where it is no rotation and translation.
    """
    rotation = matrix[:3, :3]
    if not np.isfinite(matrix).all():
        raise DataError(f"{path}: its pose is not finite (tracking was lost)", reason="pose is not finite")
    if not (np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2) and np.linalg.det(rotation) > 0):
        raise DataError(f"{path}: its pose is no rotation and translation", reason="pose is not rigid")
    return rigid(Rotation.from_matrix(rotation).as_matrix(), matrix[:3, 3])


def read_tum_trajectory(path: object) -> tuple[np.ndarray, np.ndarray]:
    """A trajectory in TUM's format: rows of `timestamp tx ty tz qx qy qz qw`, camera-to-world.

    Returns:
      timestamps float64 [N] in seconds, and cam_to_world [N, 4, 4], as stored.

    Raises:
      DataError: the file is missing, a row has other columns, a number is not finite or a quaternion is zero.
    """
    rows = read_numbers(path, 8)
    with reading(path, "rows of timestamp tx ty tz qx qy qz qw, with unit quaternions"):
        if not np.isfinite(rows).all():
            raise ValueError("a number is not finite")
        poses = [from_quaternion(row[4:], row[1:4], scalar_first=False) for row in rows]
    return rows[:, 0], np.stack(poses)
