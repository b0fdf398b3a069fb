"""Masks of moving things, and videos in DAVIS's layout."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from omnistream_jax.data.benchmarks.mask_files import PALETTE
from omnistream_jax.data.benchmarks.world_masks import WorldSequence
from omnistream_jax.data.world import WorldClips


def random_clip(seed: int, known: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, truth), uint8 [T, H, W]: ellipses and boxes that move, vanish, appear, lie apart and overlap.

    Only integers are drawn, so that every NumPy draws the same. With `known` the largest number is in the first mask,
    which says how many objects there are.
    """
    rng = np.random.default_rng(seed)
    frames, height, width = (int(rng.integers(low, high)) for low, high in ((4, 9), (24, 90), (24, 120)))
    truth, prediction = np.zeros((2, frames, height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    count = int(rng.integers(1, 5))
    for number in range(1, count + 1):
        y, x, dy, dx = (int(rng.integers(low, high)) for low, high in ((0, height), (0, width), (-6, 7), (-6, 7)))
        half = rng.integers(1, 16, size=2)
        ball, error = bool(rng.integers(2)), int(rng.integers(0, 4))
        seen, found = (rng.integers(4, size=frames) > 0 for _ in range(2))
        seen[0] |= known and number == count
        if rng.integers(6) == 0 and number < count:
            seen[: frames // 2] = False  # it appears
        if rng.integers(6) == 0:
            found[:] = False
        for t in range(frames):
            for masks, visible, shift in ((truth, seen[t], 0), (prediction, found[t], error)):
                v, u = np.abs(rows - y - dy * t - shift), np.abs(columns - x - dx * t + shift)
                inside = (v * half[1]) ** 2 + (u * half[0]) ** 2 <= (half[0] * half[1]) ** 2
                inside = inside if ball else (v <= half[0]) & (u <= half[1])
                if visible:
                    masks[t][inside] = number
    if known and not (truth[0] == count).any():
        truth[0, 0, 0] = count
    return prediction, truth


def world_sequences(count: int = 2, frames: int = 5, size: int = 64) -> list[WorldSequence]:
    clips = WorldClips("heldout", 50, frames=frames, size=size)
    found = (WorldSequence(clips, index, 0.01) for index in range(50))
    return [sequence for _, sequence in zip(range(count), (each for each in found if each.objects > 1), strict=False)]


def write_png(path: Path, mask: np.ndarray) -> None:
    """As DAVIS stores annotations; by Pillow alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.ravel().tolist())
    image.save(path)


def write_davis(root: Path, sequences: Sequence[WorldSequence]) -> Path:
    """Videos of the world in the layout of DAVIS-2017."""
    for sequence in sequences:
        for index in range(len(sequence)):
            picture = root / "JPEGImages" / "480p" / sequence.name / f"{index:05d}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sequence.frame(index)).save(picture, quality=95)
            write_png(root / "Annotations" / "480p" / sequence.name / f"{index:05d}.png", sequence.mask(index))
    listed = root / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{sequence.name}\n" for sequence in sequences))
    return root
