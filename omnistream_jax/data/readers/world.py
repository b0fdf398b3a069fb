"""The embedded world by name (data/world): rendered when it is read, so there is no folder.

Where other data sets have their folder stands the split, "train" or "heldout", as in `world_videos:train`. Scenes are
as many as `LENGTHS` says unless a `length` is given; the first are the same for every length.
"""

from __future__ import annotations

from pathlib import Path

from omnistream_jax.data.embedded import SPLITS
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.world.sources import LENGTHS, WorldCaptions, WorldClips, WorldVideos


def open_world(
    root: Path,
    split: str = "train",
    length: int | None = None,
    frames: int = WorldClips.frames,
    size: int = WorldClips.size,
    seed: int = WorldClips.seed,
) -> WorldClips:
    """Posed RGB-D clips.

    Args:
      root: the split's name.
      split: not to be given: `root` says it.
      length: scenes; None: `LENGTHS` of the split.
      frames: of a clip.
      size: height and width in pixels.
      seed: of the scenes.

    Raises:
      DataError: there is no such split, or an argument is out of range.
    """
    split = _split(root, split)
    return WorldClips(split, _length(split, length), frames, size, seed)


def open_world_videos(
    root: Path,
    split: str = "train",
    length: int | None = None,
    frames: int = WorldVideos.frames,
    size: int = WorldVideos.size,
    seed: int = WorldVideos.seed,
    short_side: int | None = None,
    frame_rate: float | None = None,
) -> WorldVideos:
    """Videos with motion classes; arguments as of `open_world`, `short_side` and `frame_rate` as of WorldVideos."""
    split = _split(root, split)
    sampling = {"short_side": short_side, "frame_rate": frame_rate}
    return WorldVideos(split, _length(split, length), frames, size, seed, **sampling)


def open_world_captions(
    root: Path,
    split: str = "train",
    length: int | None = None,
    size: int = WorldCaptions.size,
    seed: int = WorldCaptions.seed,
) -> WorldCaptions:
    """Pictures with captions, boxes and questions; arguments as of `open_world`."""
    split = _split(root, split)
    return WorldCaptions(split, _length(split, length), size=size, seed=seed)


def _split(root: Path, split: str) -> str:
    name = str(root)
    if name not in SPLITS:
        raise DataError(f"world: {name!r} is no split; it has no folder, in its place stands {' or '.join(SPLITS)}")
    if split not in ("train", name):  # "train" is what callers pass on who were given none
        raise DataError(f"world: split is {split!r} and in the folder's place stands {name!r}; give the latter only")
    return name


def _length(split: str, length: int | None) -> int:
    return LENGTHS[split] if length is None else length
