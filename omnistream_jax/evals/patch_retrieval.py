"""Retrieval of the matching patch under a known crop and flip: do patch features follow the content?

View 1 is a frame; view 2 is a crop of it, flipped left to right, resized back to the frame's size, with
another brightness and contrast. Each patch of view 2 looks for its most similar patch of view 1:

    view 1                     view 2 (crop [a b; c d], flipped)
    . . . . . .                b b a a
    . a b . . .      ->        b b a a
    . c d . . .                d d c c
    . . . . . .                d d c c

Because of the flip, features that know only their place in the frame cannot score.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

CROP_AREA = (0.5, 0.8)
PHOTOMETRIC_STRENGTH = 0.2


@dataclass(frozen=True)
class Crop:
    """A box in pixels of view 1, from its upper left corner; view 2 shows it flipped left to right."""

    top: float
    left: float
    height: float
    width: float


def second_view(
    frame: np.ndarray, generator: np.random.Generator, photometric: float = PHOTOMETRIC_STRENGTH
) -> tuple[np.ndarray, Crop]:
    """Draws a crop of the frame's own aspect ratio and makes view 2 of it.

    Args:
        frame: uint8 [H, W, 3].
        generator: the source of chance: crop area uniform in CROP_AREA, place uniform.
        photometric: contrast and brightness are multiplied by factors uniform in 1 +- this.

    Returns:
        view 2, uint8 [H, W, 3], and its crop.
    """
    height, width, _ = frame.shape
    side = np.sqrt(generator.uniform(*CROP_AREA))
    top, left = generator.uniform(0, 1 - side, size=2) * (height, width)
    crop = Crop(top=top, left=left, height=side * height, width=side * width)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    view = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(view, np.float32)[:, ::-1]
    contrast, brightness = generator.uniform(1 - photometric, 1 + photometric, size=2)
    mean = pixels.mean()
    pixels = ((pixels - mean) * contrast + mean) * brightness
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), crop


def matching_cells(crop: Crop, frame_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The patch of view 1 in which the centre of each patch of view 2 lies.

    Args:
        crop: how view 2 was made.
        frame_size: (H, W) in pixels, of both views.
        grid: (h, w) in patches, of both views.

    Returns:
        int [h, w, 2]: row and column in view 1's grid. The crop is inside view 1, so every patch has a match.
    """
    (frame_height, frame_width), (rows, columns) = frame_size, grid
    y = crop.top + (np.arange(rows) + 0.5) / rows * crop.height
    x = crop.left + (1 - (np.arange(columns) + 0.5) / columns) * crop.width
    row = np.floor(y / frame_height * rows).astype(int).clip(0, rows - 1)
    column = np.floor(x / frame_width * columns).astype(int).clip(0, columns - 1)
    return np.stack(np.meshgrid(row, column, indexing="ij"), axis=-1)


def patch_retrieval(
    features_fn: Callable[[np.ndarray], np.ndarray],
    frames: np.ndarray,
    seed: int = 0,
    photometric: float = PHOTOMETRIC_STRENGTH,
) -> dict[str, float]:
    """Scores patch features by retrieval within each frame, with cosine similarity.

    Args:
        features_fn: maps uint8 frames [N, H, W, 3] to patch features [N, h, w, D]; called once per view.
        frames: held-out frames, uint8 [N, H, W, 3]. Frame i gets the same view 2 for the same seed, whatever
            the other frames are.
        seed: >= 0, of the crops and of the photometric change.
        photometric: strength of the change of contrast and brightness, see `second_view`.

    Returns:
        Percentages over all patches of all frames:
        "retrieval_top1": the patch found is the one in which the centre of the patch of view 2 lies
            (chance: 100 / (h w));
        "retrieval_within1": it is that one or one of its up to 8 neighbours, the diagonal ones included.

    Raises:
        ValueError: frames that are not uint8 [N, H, W, 3], or features of another shape or not finite.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames: expected uint8 [N, H, W, 3], N >= 1, got {frames.dtype} {frames.shape}")
    views = [
        second_view(frame, np.random.default_rng([seed, index]), photometric) for index, frame in enumerate(frames)
    ]
    first = _checked(features_fn(frames), len(frames))
    second = _checked(features_fn(np.stack([view for view, _ in views])), len(frames))
    if first.shape != second.shape:
        raise ValueError(f"features_fn: the two views gave shapes {first.shape} and {second.shape}")
    distances = [
        _grid_distance(first[index], second[index], matching_cells(crop, frames.shape[1:3], first.shape[1:3]))
        for index, (_, crop) in enumerate(views)
    ]
    return {
        "retrieval_top1": 100 * float(np.mean(np.equal(distances, 0))),
        "retrieval_within1": 100 * float(np.mean(np.less_equal(distances, 1))),
    }


def _checked(features: np.ndarray, count: int) -> np.ndarray:
    """Patch features as float32 [N, h, w, D] of unit length."""
    features = np.asarray(features, np.float32)
    if features.ndim != 4 or len(features) != count:
        raise ValueError(f"features_fn: expected features [{count}, h, w, D], got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features_fn: expected finite features, got NaN or infinity")
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def _grid_distance(first: np.ndarray, second: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """[h, w]: Chebyshev distance in view 1's grid between what a patch of view 2 finds and its match."""
    rows, columns, width = first.shape
    similarity = second.reshape(-1, width) @ first.reshape(-1, width).T
    found = np.stack(np.unravel_index(similarity.argmax(axis=1), (rows, columns)), axis=-1)
    return np.abs(found.reshape(rows, columns, 2) - matches).max(axis=-1)
