"""The room of world_cases seen along any rays, and rays of lenses; it imports nothing of ours."""

import numpy as np
from world_cases import HALF_ROOM, World


def look(rays: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What lies on rays [H, W, 3] of depth 1 in the camera's axes: (uint8 [H, W, 3], z-depth [H, W])."""
    directions, origin = rays @ pose[:3, :3].T, pose[:3, 3]
    with np.errstate(divide="ignore"):
        depth = ((np.sign(directions) * HALF_ROOM - origin) / directions).min(-1)
    points = origin + depth[..., None] * directions
    return np.rint(127.5 + 100 * np.sin(2.0 * points)).astype(np.uint8), depth


def pinhole_rays(intrinsics: np.ndarray, width: int, height: int) -> np.ndarray:
    """[H, W, 3], pixel centres at + 0.5."""
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T


def radial_rays(intrinsics: np.ndarray, lens, width: int, height: int) -> np.ndarray:
    """Through a lens with Brown's distortion (k1, k2, p1, p2), undone by iteration from the pinhole's rays."""
    k1, k2, p1, p2 = lens
    bent = pinhole_rays(intrinsics, width, height)[..., :2]
    x, y = bent[..., 0].copy(), bent[..., 1].copy()
    for _ in range(50):
        r = x * x + y * y
        radial = 1 + k1 * r + k2 * r * r
        dx, dy = 2 * p1 * x * y + p2 * (r + 2 * x * x), p1 * (r + 2 * y * y) + 2 * p2 * x * y
        x, y = (bent[..., 0] - dx) / radial, (bent[..., 1] - dy) / radial
    return np.stack([x, y, np.ones_like(x)], -1)


def fisheye_rays(intrinsics: np.ndarray, lens, width: int, height: int) -> np.ndarray:
    """Through Kannala and Brandt's fisheye: a ray at the angle a lies a (1 + k1 a^2 + ... + k4 a^8) off the centre."""
    bent = pinhole_rays(intrinsics, width, height)[..., :2]
    distance = np.linalg.norm(bent, axis=-1)
    angle = distance.copy()
    for _ in range(50):
        angle = distance / (1 + sum(k * angle ** (2 * i) for i, k in enumerate(lens, start=1)))
    stretch = np.where(distance > 1e-9, np.tan(angle) / np.maximum(distance, 1e-9), 1.0)
    return np.concatenate([bent * stretch[..., None], np.ones_like(distance)[..., None]], -1)


def seen_along(rays: np.ndarray, intrinsics: np.ndarray, poses: np.ndarray) -> World:
    """A World of what is seen along the same rays from every pose."""
    pictures, depths = zip(*(look(rays, pose) for pose in poses), strict=True)
    return World(np.stack(pictures), np.stack(depths), intrinsics, poses)


def assert_sees_the_room(frames, poses, *, colour_error=1.5, depth_error=None) -> None:
    """Each PosedFrame, of whatever intrinsics, shows the room as a pinhole of these intrinsics sees it from its pose.

    `colour_error` bounds the mean difference, `depth_error` the mean relative one; None: the frames have no depth.
    """
    assert len(frames) == len(poses)
    for frame, pose in zip(frames, poses, strict=True):
        np.testing.assert_allclose(frame.cam_to_world, pose, atol=1e-4)
        height, width = frame.image.shape[:2]
        picture, depth = look(pinhole_rays(frame.intrinsics.astype(float), width, height), pose)
        assert np.abs(frame.image.astype(float) - picture).mean() <= colour_error
        assert (frame.depth is None) == (depth_error is None)
        if depth_error is not None:
            assert frame.valid.mean() > 0.98
            assert np.abs(frame.depth / depth - 1)[frame.valid].mean() <= depth_error
