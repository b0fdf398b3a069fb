"""The room of world_cases along any rays, for cameras that are no simple pinholes; it imports nothing of ours."""

import numpy as np
from world_cases import HALF_ROOM, World


def hit(directions: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each direction [..., 3] fits between origin and wall, and the wall's colour there, uint8 [..., 3]."""
    with np.errstate(divide="ignore"):
        times = ((np.sign(directions) * HALF_ROOM - origin) / directions).min(-1)
    points = origin + times[..., None] * directions
    return times, np.rint(127.5 + 100 * np.sin(2.0 * points)).astype(np.uint8)


def pinhole_rays(intrinsics: np.ndarray, height: int, width: int, step: float = 1.0) -> np.ndarray:
    """Rays of depth 1, [H, W, 3], through the centres of cells `step` pixels wide."""
    u, v = np.meshgrid((np.arange(width) + 0.5) * step, (np.arange(height) + 0.5) * step)
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T


def seen(intrinsics: np.ndarray, poses: np.ndarray, height: int, width: int) -> World:
    """The room through a pinhole camera at poses [T, 4, 4]."""
    rays = pinhole_rays(intrinsics, height, width)
    views = [hit(rays @ pose[:3, :3].T, pose[:3, 3]) for pose in poses]
    return World(np.stack([view[1] for view in views]), np.stack([view[0] for view in views]), intrinsics, poses)
