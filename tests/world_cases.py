"""A room with exact depth and known cameras, for the tests of readers; it imports nothing of ours.

The writers of the tests store it in a data set's layout by the conventions of that data set; what a reader finds must
be the room again. Axes: OpenCV's (x right, y down, z forward); pixel centres at + 0.5; z-depth in metres.
"""

import dataclasses
import itertools

import numpy as np

HALF_ROOM = np.array([3.0, 2.0, 4.0])  # the walls stand at x = -3, 3, y = -2, 2, z = -4, 4


@dataclasses.dataclass(frozen=True)
class World:
    """frames uint8 [T, H, W, 3], depth float64 [T, H, W], intrinsics [3, 3], cam_to_world [T, 4, 4]."""

    frames: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    cam_to_world: np.ndarray


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """[3, 3] of turns in radians about y, then x, then z of the camera."""
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


def camera_path(frames: int) -> np.ndarray:
    """[T, 4, 4], camera-to-world: a walk to the right and forward that turns. Frame 0 stands at (-1, 0.2, -1.5)."""
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for t in range(frames):
        poses[t, :3, :3] = rotation(0.3 + 0.05 * t, 0.1 - 0.02 * t, 0.03 * t)
        poses[t, :3, 3] = [-1.0 + 0.1 * t, 0.2 - 0.03 * t, -1.5 + 0.08 * t]
    return poses


def room(frames: int = 4, height: int = 48, width: int = 64, focal: float = 50.0) -> World:
    """The room seen along `camera_path`; the principal point lies off the centre, fy differs from fx."""
    intrinsics = np.array([[focal, 0, width / 2 + 1.5], [0, focal * 1.05, height / 2 - 2.0], [0, 0, 1]])
    poses = camera_path(frames)
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T  # of depth 1, in the camera's axes
    pictures, depths = [], []
    for pose in poses:
        directions, origin = rays @ pose[:3, :3].T, pose[:3, 3]
        with np.errstate(divide="ignore"):
            depth = ((np.sign(directions) * HALF_ROOM - origin) / directions).min(-1)
        points = origin + depth[..., None] * directions
        pictures.append(np.rint(127.5 + 100 * np.sin(2.0 * points)).astype(np.uint8))  # smooth: JPEG keeps it
        depths.append(depth)
    return World(np.stack(pictures), np.stack(depths), intrinsics, poses)


def assert_is_world(
    frames, world: World, *, numbers=None, depth_error=2e-3, colour_error=12.0, scale=1.0, pose_error=1e-4
) -> None:
    """PosedFrames equal the world's frames `numbers` (all, by default), in units of `scale` metres.

    `depth_error` is relative to the depth; `colour_error` is the mean difference that JPEG may make.
    """
    numbers = range(len(world.frames)) if numbers is None else numbers
    assert len(frames) == len(numbers)
    for frame, number in zip(frames, numbers, strict=True):
        assert frame.image.dtype == np.uint8
        difference = frame.image.astype(float) - world.frames[number]
        assert np.abs(difference).mean() <= colour_error
        np.testing.assert_allclose(frame.intrinsics, world.intrinsics, atol=2e-3)
        if frame.cam_to_world is not None:
            expected = world.cam_to_world[number].copy()
            expected[:3, 3] /= scale
            np.testing.assert_allclose(frame.cam_to_world, expected, atol=pose_error)
        if frame.depth is not None:
            assert frame.valid.mean() > 0.5
            expected = world.depth[number] / scale
            error = np.abs(frame.depth - expected)[frame.valid] / expected[frame.valid]
            assert error.max() <= depth_error
            assert not frame.depth[~frame.valid].any()


def assert_reprojects(frames) -> None:
    """Each frame's points, seen from the next frame, have that frame's depth where they land, to a pixel."""
    for a, b in itertools.pairwise(frames):
        height, width = a.depth.shape
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(a.intrinsics.astype(float)).T
        points = (a.depth[..., None] * rays)[a.valid] @ a.cam_to_world[:3, :3].T.astype(float) + a.cam_to_world[:3, 3]
        seen = (points - b.cam_to_world[:3, 3]) @ b.cam_to_world[:3, :3].astype(float)
        pixels = seen @ b.intrinsics.T.astype(float)
        column, row = (np.floor(pixels[:, i] / pixels[:, 2]).astype(int) for i in (0, 1))
        inside = (column > 0) & (column < width - 1) & (row > 0) & (row < height - 1) & (seen[:, 2] > 0)
        assert inside.mean() > 0.5
        column, row, depth = column[inside], row[inside], seen[inside, 2]
        around = np.stack([b.depth[row + i, column + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
        assert np.mean((depth >= 0.99 * around.min(0)) & (depth <= 1.01 * around.max(0))) > 0.98
