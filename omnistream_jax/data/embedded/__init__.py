"""Real photographs, real video and a tokenizer that come with the package: a first training needs no download.

NOTICE, at the root of the repository, gives the origin and the licence of each file. The held-out files are never
trained on: they serve evaluation and pictures.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.video import open_video

KINDS = ("images", "videos")
SPLITS = ("train", "heldout")
HELDOUT_CLIP = "plant.mp4"
"""36 frames of a desk with plants, 320 x 240, from a camera held in the hand."""
TOKENIZER = Path(str(resources.files(__name__))) / "tokenizer.json"
"""Made by make_tokenizer.py."""


def embedded_files(kind: str, split: str) -> list[Path]:
    """The embedded files of a kind ("images" or "videos") and a split ("train" or "heldout"), sorted by name."""
    if kind not in KINDS:
        raise DataError(f"embedded files: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise DataError(f"embedded files: split is {split!r}, expected one of {', '.join(SPLITS)}")
    folder = Path(str(resources.files(__name__))) / kind / split
    files = sorted(path for path in folder.glob("*") if path.suffix in (".jpg", ".mp4"))
    if not files:
        raise DataError(f"{folder}: the files that come with the package are missing; install it again")
    return files


def heldout_clip(frames: int, height: int, width: int, name: str = HELDOUT_CLIP) -> np.ndarray:
    """A clip of an embedded held-out video: `frames` frames spread evenly over it, cropped centrally and resized.

    Args:
      frames: how many; the spacing is as wide as fits, in whole frames.
      height: of the result in pixels.
      width: of the result in pixels.
      name: which held-out video.

    Returns:
      uint8 [frames, height, width, 3], RGB.

    Raises:
      DataError: there is no such video, or it has fewer frames.
    """
    paths = {path.name: path for path in embedded_files("videos", "heldout")}
    if name not in paths:
        raise DataError(f"held-out clip: no embedded video {name!r}, expected one of {', '.join(paths)}")
    with open_video(paths[name]) as video:
        if not 1 <= frames <= video.frame_count:
            raise DataError(f"{video.path}: {frames} frames were asked for, 1 to {video.frame_count} can be had")
        stride = (video.frame_count - 1) // (frames - 1) if frames > 1 else 1
        clip = video.read(range(0, (frames - 1) * stride + 1, stride))
    box = _central_box(*clip.shape[1:3], aspect=width / height)
    resized = [Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC, box=box) for f in clip]
    return np.stack([np.asarray(frame) for frame in resized])


def _central_box(height: int, width: int, aspect: float) -> tuple[float, float, float, float]:
    """The largest central (left, top, right, bottom) with width / height = aspect."""
    box_width = min(width, height * aspect)
    box_height = box_width / aspect
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
