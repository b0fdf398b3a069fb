"""A point cloud that grows with a stream and stays small: one point per occupied voxel."""

from __future__ import annotations

import numpy as np

from omnistream_jax.data.errors import require_field

_BITS = 21  # of a voxel's number along an axis: three fit into an int64
_MASK = (1 << _BITS) - 1
_HALF = 1 << (_BITS - 1)  # is added to a number, so that none is negative
_CORNER = 8  # voxels meet at the origin: however large they become, so many can stay occupied


class VoxelCloud:
    """Points in voxels of a grid through the origin, at most `max_points` of them however long the stream.

    A voxel's point is the mean of all points that fell into it, in position and in colour, weighted by confidence:
    noise averages out, the order of points does not matter, and joining voxels is exact. When more voxels would be
    occupied than allowed, their side doubles, again and again until all fit, and the points of each eight become one,
    just as if the whole stream had been added with the larger side.

    Memory: 64 bytes a voxel, and up to three times as much for a moment while points are added.
    Nothing is forgotten: what moves leaves its trail.

    Args:
      voxel: the side at first, in the units of the points; above 0.
      max_points: 8 or more: so many voxels meet at the origin, and never become one.

    Attributes:
      unusable: points left out so far because the position or confidence is not finite, or the confidence not above 0.
      too_far: points left out because they lay more than 2**20 voxels from the origin along an axis.

    Raises:
      DataError: an argument is out of range.
    """

    def __init__(self, voxel: float, max_points: int):
        require_field(0 < voxel < np.inf, "voxel", voxel, "a side above 0, in the units of the points")
        require_field(max_points >= _CORNER, "max_points", max_points, f"{_CORNER} or more")
        self._voxel, self._max_points = float(voxel), int(max_points)
        self._keys = np.empty(0, np.int64)  # of the occupied voxels, sorted
        self._sums = np.empty((0, 7))  # of each: confidence * (x, y, z, red, green, blue, 1), summed
        self.unusable = self.too_far = 0

    def add(self, points: np.ndarray, colours: np.ndarray, confidence: np.ndarray | None = None) -> None:
        """Adds points to their voxels.

        Args:
          points: [N, 3] of any float type.
          colours: uint8 [N, 3].
          confidence: [N], how much each point counts; None: all alike.

        Raises:
          ValueError: the shapes do not fit each other.
        """
        points = np.asarray(points, np.float64)
        weight = np.ones(len(points)) if confidence is None else np.asarray(confidence, np.float64)
        if points.shape != (len(points), 3) or colours.shape != points.shape or weight.shape != points.shape[:1]:
            found = f"points {points.shape}, colours {colours.shape}, confidence {weight.shape}"
            raise ValueError(f"{found}: expected [N, 3], [N, 3] and [N]")
        if colours.dtype != np.uint8:
            raise ValueError(f"colours: {colours.dtype}, expected uint8")
        numbers, usable = self._numbers(points, weight)
        if not usable.all():
            numbers, points, colours, weight = (part[usable] for part in (numbers, points, colours, weight))
        rows = np.empty((len(points), 7))
        rows[:, :3], rows[:, 3:6], rows[:, 6] = points, colours, 1
        rows *= weight[:, None]
        self._insert(*_join(_keys_of(numbers), rows))

    def _numbers(self, points: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The voxels' numbers along each axis [N, 3], and which points count [N]; the others are counted here."""
        finite = np.isfinite(points).all(1) & np.isfinite(weight) & (weight > 0)
        with np.errstate(invalid="ignore", over="ignore"):
            numbers = np.floor(points / self._voxel)
        near = ((numbers >= -_HALF) & (numbers < _HALF)).all(1)
        self.unusable += int(np.count_nonzero(~finite))
        self.too_far += int(np.count_nonzero(finite & ~near))
        return numbers, finite & near

    def _insert(self, keys: np.ndarray, sums: np.ndarray) -> None:
        """Adds voxels, each once and in order."""
        while True:
            places = np.searchsorted(self._keys, keys)
            known = np.zeros(len(keys), bool)
            inside = places < len(self._keys)
            known[inside] = self._keys[places[inside]] == keys[inside]
            if len(self._keys) + np.count_nonzero(~known) <= self._max_points:
                break
            self._voxel *= 2
            self._keys, self._sums = _join(_doubled(self._keys), self._sums)
            keys, sums = _join(_doubled(keys), sums)
        self._sums[places[known]] += sums[known]
        self._keys = np.insert(self._keys, places[~known], keys[~known])
        self._sums = np.insert(self._sums, places[~known], sums[~known], axis=0)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def voxel(self) -> float:
        """The side now: the first one times a power of two."""
        return self._voxel

    @property
    def points(self) -> np.ndarray:
        """float32 [N, 3], ordered by voxel."""
        return (self._sums[:, :3] / self._sums[:, 6:]).astype(np.float32)

    @property
    def colours(self) -> np.ndarray:
        """uint8 [N, 3], in the order of `points`."""
        return np.rint(self._sums[:, 3:6] / self._sums[:, 6:]).astype(np.uint8)


def unproject(depth: np.ndarray, intrinsics: np.ndarray, cam_to_world: np.ndarray, stride: int = 1) -> np.ndarray:
    """The points of a depth picture, as data/schema.py has it: through pixel centres, z-depth.

    Args:
      depth: [H, W].
      intrinsics: [3, 3], in pixels of `depth`.
      cam_to_world: [4, 4], translation in the units of depth.
      stride: every stride-th row and column is taken, from 0 on.

    Returns:
      float64 [ceil(H / stride), ceil(W / stride), 3]; not finite where depth is not.
    """
    height, width = depth.shape
    rows, columns = np.arange(0, height, stride), np.arange(0, width, stride)
    u, v = np.meshgrid(columns + 0.5, rows + 0.5)
    pose = cam_to_world.astype(np.float64)
    # d = R K^-1 (u, v, 1): of unit depth.
    directions = np.stack([u, v, np.ones_like(u)], -1) @ (pose[:3, :3] @ np.linalg.inv(intrinsics.astype(np.float64))).T
    taken = depth[::stride, ::stride].astype(np.float64)
    return pose[:3, 3] + taken[..., None] * directions


def _keys_of(numbers: np.ndarray) -> np.ndarray:
    """int64 [N] of voxels' numbers along x, y and z [N, 3]; in the order of x, then y, then z."""
    x, y, z = (numbers.astype(np.int64) + _HALF).T
    return x << 2 * _BITS | y << _BITS | z


def _doubled(keys: np.ndarray) -> np.ndarray:
    """The keys of the voxels of twice the side in which voxels lie; floor(floor(a) / 2) = floor(a / 2)."""
    numbers = np.stack([keys >> 2 * _BITS, keys >> _BITS & _MASK, keys & _MASK], -1) - _HALF
    return _keys_of(numbers >> 1)


def _join(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys, each once and in order, and the sums of their rows."""
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))  # keys are never negative
    return keys[starts], np.add.reduceat(rows[order], starts, axis=0) if len(keys) else rows
