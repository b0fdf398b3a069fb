"""The motions of the embedded rendered world, for attentive probes: a `probes.action.ActionSource`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.probes.clip_views import Sampling
from omnistream_jax.data.world import MOTIONS, WorldVideos


@dataclasses.dataclass(frozen=True)
class WorldMotion:
    """Videos whose class is what their one moving thing does; rendered when they are read.

    A video has exactly the frames of a clip, spread over the whole of its motion.

    Attributes:
      videos: the scenes.
    """

    videos: WorldVideos

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.videos.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The motions."""
        return MOTIONS

    def __len__(self) -> int:
        return len(self.videos)

    def describe(self, index: int) -> str:
        """The scene's number; there is no file."""
        return self.videos.describe(index)

    def label(self, index: int) -> int:
        """The place of a scene's motion in MOTIONS."""
        return self.videos.label(index)

    def clips(self, index: int, sampling: Sampling, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The one clip that there is, uint8 [T, H, H, 3]; `rng` has nothing to draw.

        Raises:
          DataError: the sampling asks for another number of frames or of segments.
        """
        if (sampling.segments, sampling.frames) != (1, self.videos.frames):
            raise DataError(
                f"{self.name}: {sampling.segments} segments of {sampling.frames} frames, expected 1 of "
                f"{self.videos.frames}"
            )
        yield self.videos.clip(index).images

    def settings(self) -> dict[str, Any]:
        """As `ActionSource.settings`; no scene can be missing."""
        counts = {"videos": len(self), "classes": len(MOTIONS), "complete": True}
        return {"world": dataclasses.asdict(self.videos), **counts}


def open_world_motion(split: str, scenes: int, frames: int, size: int, seed: int) -> WorldMotion:
    """The first scenes of a split; every 11 of them hold each motion once.

    Args:
      split: "train" or "heldout", which share nothing.
      scenes: how many.
      frames: T of a clip.
      size: height and width in pixels.
      seed: of the world.

    Raises:
      DataError: an argument is out of range.
    """
    return WorldMotion(WorldVideos(split, scenes, frames, size, seed))
