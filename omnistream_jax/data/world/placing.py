"""Where things can be put in a room so that nothing touches and nothing is hidden from the camera."""

from __future__ import annotations

import numpy as np

GAP = 0.05
"""Metres left free between things and to the walls."""
CAMERA_GAP = 0.6
"""Metres left free around the camera's path."""
HIDDEN_SHARE = 0.7
"""Of two things, seen from the first pose, the centres are this share of their radii's sum apart or more."""


class Placing:
    """Bounding spheres put in a room one after another.

    Attributes:
      poses: camera-to-world [4, 4] at the start, the middle and the end of the clip.
      tangent: of half the field of view.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, poses: list[np.ndarray], tangent: float):
        self.poses = poses
        self.tangent = tangent
        self._low, self._high = low, high
        self._eyes = np.array([pose[:3, 3] for pose in poses])
        self._centres = np.zeros((0, 3))
        self._radii = np.zeros(0)
        self._swept = np.zeros((0, 3))
        self._swept_radius = 0.0

    def world_point(self, x: float, y: float, depth: float) -> np.ndarray:
        """[3], the point that the first pose sees at depth in the direction (x, y, 1)."""
        return self.poses[0][:3, :3] @ (depth * np.array([x, y, 1.0])) + self.poses[0][:3, 3]

    def reserve(self, centre: np.ndarray, radius: float, swept: np.ndarray) -> bool:
        """Puts what moves at `centre`, if everywhere it may pass, `swept` [N, 3], is free and in sight."""
        if not (self._in_room(swept, radius, radius) and self._clear_of_camera(swept, radius)):
            return False
        for pose in self.poses:
            direction, apparent = _projected(pose, swept, radius)
            if (np.abs(direction).max(-1) + 0.8 * apparent > self.tangent).any():
                return False
        self._swept, self._swept_radius = swept, radius
        self._centres, self._radii = centre[None], np.array([radius])
        return True

    def add(self, centre: np.ndarray, radius: float, half_height: float) -> bool:
        """Puts what does not move at `centre`, if there is room, it is in sight, and hides and is hidden by little."""
        here = centre[None]
        if not (self._in_room(here, radius, half_height) and self._clear_of_camera(here, radius)):
            return False
        direction, apparent = _projected(self.poses[0], here, radius)
        if np.abs(direction).max() > 0.9 * self.tangent:
            return False
        if (np.linalg.norm(self._centres - centre, axis=1) < self._radii + radius + GAP).any():
            return False
        if (np.linalg.norm(self._swept - centre, axis=1) < self._swept_radius + radius + GAP).any():
            return False
        others, widths = _projected(self.poses[0], self._centres, self._radii)
        if (np.linalg.norm(others - direction, axis=1) < HIDDEN_SHARE * (widths + apparent)).any():
            return False
        if self._hides_the_mover(here, radius):
            return False
        self._centres, self._radii = np.concatenate([self._centres, here]), np.append(self._radii, radius)
        return True

    def _hides_the_mover(self, here: np.ndarray, radius: float) -> bool:
        for pose in self.poses:
            direction, apparent = _projected(pose, here, radius)
            places, widths = _projected(pose, self._swept, self._swept_radius)
            depth = (here[0] - pose[:3, 3]) @ pose[:3, 2]
            behind = (self._swept - pose[:3, 3]) @ pose[:3, 2] > depth
            if (behind & (np.linalg.norm(places - direction, axis=1) < HIDDEN_SHARE * (widths + apparent))).any():
                return True
        return False

    def _in_room(self, centres: np.ndarray, radius: float, half_height: float) -> bool:
        """Whether spheres, or what is lower than its sphere, fit; on the floor it may stand without a gap."""
        reach = np.array([radius + GAP, half_height, radius + GAP])
        return bool(((centres >= self._low + reach) & (centres <= self._high - reach)).all())

    def _clear_of_camera(self, centres: np.ndarray, radius: float) -> bool:
        distances = np.linalg.norm(self._eyes[:, None] - centres[None], axis=-1)
        return bool((distances > radius + CAMERA_GAP).all())


def _projected(pose: np.ndarray, centres: np.ndarray, radii: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) / depth [N, 2] of centres seen from a pose, and their radii / depth [N]; far aside if behind it."""
    seen = (centres - pose[:3, 3]) @ pose[:3, :3]
    depth = np.maximum(seen[:, 2], 0.1)
    return seen[:, :2] / depth[:, None], radii / depth
