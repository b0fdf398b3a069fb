"""Held-out clips of the embedded rendered world as a set for video object segmentation: nothing to download."""

from __future__ import annotations

from typing import Any

import numpy as np

from omnistream_jax.data.benchmarks.masked import MaskedSequence, MaskedVideos
from omnistream_jax.data.errors import DataError, require_field
from omnistream_jax.data.world import WorldClips


class WorldSequence(MaskedSequence):
    """A scene; its objects are the things that its first frame shows large enough, numbered in the scene's order.

    The others count as no object, so that all that is followed can be seen in the first frame, as in DAVIS.
    """

    def __init__(self, clips: WorldClips, index: int, min_share: float):
        self._clips, self._index, self._min_share = clips, index, min_share
        self.name, self.size = f"scene_{index:05d}", (clips.size, clips.size)
        clip = clips.clip(index)
        things = range(1, len(clip.scene.things) + 1)
        followed = [thing for thing in things if (clip.ids[0] == thing).mean() >= min_share]
        self.objects = len(followed)
        numbers = np.zeros(256, np.uint8)
        numbers[followed] = np.arange(1, self.objects + 1)
        self._frames, self._masks = clip.images, numbers[clip.ids]

    def __len__(self) -> int:
        return self._clips.frames

    def frame(self, index: int) -> np.ndarray:
        """See MaskedSequence."""
        return self._frames[index]

    def mask(self, index: int) -> np.ndarray:
        """See MaskedSequence; without void."""
        return self._masks[index]

    def frame_name(self, index: int) -> str:
        """Its number, of five digits as in DAVIS."""
        return f"{index:05d}"

    def identity(self) -> list[Any]:
        """What the scene is rendered from."""
        return [self._clips.describe(self._index), self._clips.frames, self._clips.size, self._min_share]


def open_world(clips: int, frames: int, size: int, seed: int = 0, min_share: float = 0.01) -> MaskedVideos:
    """The first held-out scenes; those whose first frame shows nothing that is large enough are left out.

    Args:
      clips: scenes.
      frames: of each, 3 or more; whatever their number, they show the whole motion.
      size: height and width in pixels.
      seed: of the world.
      min_share: of the first frame's pixels, what a thing must cover in it to be followed.

    Raises:
      DataError: a field is out of range, or nothing is large enough.
    """
    require_field(0 < min_share < 1, "world.min_share", min_share, "a share above 0 and below 1")
    require_field(frames >= 3, "world.frames", frames, "3 or more: the first and the last are not scored")
    world = WorldClips("heldout", clips, frames=frames, size=size, seed=seed)
    sequences = tuple(WorldSequence(world, index, min_share) for index in range(clips))
    kept = tuple(sequence for sequence in sequences if sequence.objects)
    if not kept:
        raise DataError(f"world.min_share: {min_share}, but no thing covers as much of a first frame")
    numbers = {"frames": frames * len(kept), "objects": sum(sequence.objects for sequence in kept)}
    counts = {"sequences": len(kept), "scenes": clips, **numbers, "complete": True}
    return MaskedVideos("world", f"{world.name}, seed {seed}, {size} x {size} pixels", kept, counts)
