"""Depth of the embedded rendered world, for linear probes: a `probes.depth.DepthSource`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from omnistream_jax.data.world import WorldClips


@dataclasses.dataclass(frozen=True)
class WorldDepth:
    """Clips with exact depth; nothing is unknown.

    Attributes:
      clips: the scenes, rendered when they are read.
    """

    clips: WorldClips

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.clips.name

    def __len__(self) -> int:
        return len(self.clips)

    def describe(self, index: int) -> str:
        """The scene's number; there is no file."""
        return self.clips.describe(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [T, H, W, 3], and float32 [T, H, W] in metres."""
        clip = self.clips.clip(index)
        return clip.images, clip.depth

    def settings(self) -> dict[str, Any]:
        """JSON values: what determines the scenes, of which none can be missing."""
        return {"world": dataclasses.asdict(self.clips), "complete": True}


def open_world_depth(split: str, scenes: int, frames: int, size: int, seed: int) -> WorldDepth:
    """The first scenes of a split.

    Args:
      split: "train" or "heldout", which share nothing.
      scenes: how many.
      frames: T of a clip, spread over the whole of its motion; 1: its first moment.
      size: height and width in pixels.
      seed: of the world.

    Raises:
      DataError: an argument is out of range.
    """
    return WorldDepth(WorldClips(split, scenes, frames, size, seed))
