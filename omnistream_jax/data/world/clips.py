"""Rendered scenes: frames with everything that is known of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from omnistream_jax.data.world.render import render
from omnistream_jax.data.world.scenes import Scene
from omnistream_jax.data.world.textures import world_textures

VISIBLE_SHARE = 0.002
"""Of a frame's pixels; what covers less counts as not to be seen."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One thing as one frame shows it.

    Attributes:
      thing: its place in `Scene.things`.
      box: (x1, y1, x2, y2), the smallest around its pixels, as shares of width and height from the top left.
      depth: the median of its pixels, metres.
    """

    thing: int
    box: tuple[float, float, float, float]
    depth: float


@dataclasses.dataclass(frozen=True)
class WorldClip:
    """Frames of a scene; axes and units as data/schema.py has them.

    Attributes:
      scene: what is shown.
      shares: float64 [T], of the scene's clip that have gone by at each frame, 0 to 1.
      images: uint8 [T, H, W, 3].
      depth: float32 [T, H, W], metres, valid everywhere.
      ids: uint8 [T, H, W]: 0 the room, i + 1 where `scene.things[i]` is seen.
      intrinsics: float32 [3, 3].
      cam_to_world: float32 [T, 4, 4].
    """

    scene: Scene
    shares: np.ndarray
    images: np.ndarray
    depth: np.ndarray
    ids: np.ndarray
    intrinsics: np.ndarray
    cam_to_world: np.ndarray

    def seen(self, frame: int) -> list[Seen]:
        """What can be seen in a frame, in the order of `scene.things`."""
        ids, depth = self.ids[frame], self.depth[frame]
        height, width = ids.shape
        found = []
        for thing in range(len(self.scene.things)):
            mask = ids == thing + 1
            if mask.sum() < VISIBLE_SHARE * mask.size:
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
            found.append(Seen(thing, tuple(map(float, box)), float(np.median(depth[mask]))))
        return found

    def rays(self) -> np.ndarray:
        """float32 [T, H, W, 6], origin and direction of each pixel's ray in the axes of the first of these frames.

        Directions have length 1 along their own camera's axis: point = origin + depth * direction.
        """
        height, width = self.depth.shape[1:]
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(self.intrinsics.astype(np.float64)).T
        poses = np.linalg.inv(self.cam_to_world[0].astype(np.float64)) @ self.cam_to_world
        rays = np.empty((*self.depth.shape, 6), np.float32)
        rays[..., :3] = poses[:, None, None, :3, 3]
        rays[..., 3:] = np.einsum("tij,hwj->thwi", poses[:, :3, :3], pixels)
        return rays


def render_clip(scene: Scene, shares: Sequence[float], size: int) -> WorldClip:
    """Renders a scene at some shares of its clip (0 to 1, in any order), size x size pixels."""
    texels, intrinsics = world_textures(scene.split).texels, scene.camera.intrinsics(size)
    poses = [scene.camera.cam_to_world(share) for share in shares]
    pictures = [
        render(scene.room, scene.light, scene.solids(share), texels, intrinsics, pose, size)
        for share, pose in zip(shares, poses, strict=True)
    ]
    images, depth, ids = (np.stack(part) for part in zip(*pictures, strict=True))
    poses = np.stack(poses).astype(np.float32)
    return WorldClip(scene, np.asarray(shares, float), images, depth, ids, intrinsics.astype(np.float32), poses)
