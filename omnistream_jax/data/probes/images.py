"""Views of photographs for classification, to torchvision's definitions.

Resizing is Pillow's bicubic filter with antialiasing, from the crop alone.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)  # width / height, log-uniform


def random_resized_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float] = (0.08, 1.0)
) -> tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop, of whole pixels: left, top, right, bottom.

    A share of the area and an aspect are drawn ten times; where no box fits, it is the largest central one of an
    allowed aspect.

    Args:
      rng: all randomness comes from it.
      height, width: of the picture.
      scale: smallest and largest share of its area.
    """
    low, high = (math.log(aspect) for aspect in _ASPECT)
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = width, height
    if width / height < _ASPECT[0]:
        box_height = round(width / _ASPECT[0])
    elif width / height > _ASPECT[1]:
        box_width = round(height * _ASPECT[1])
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def training_view(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """RandomResizedCrop (bicubic) and a mirror half of the time: uint8 [H, W, 3] to [size, size, 3]."""
    box = random_resized_box(rng, *image.shape[:2])
    view = _resized(Image.fromarray(image).crop(box), size, size)
    return view[:, ::-1] if rng.random() < 0.5 else view


def validation_view(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """Short side to `resize` (bicubic), then the central `size` x `size`: uint8 [H, W, 3] to [size, size, 3].

    Args:
      image: any size.
      resize: at least `size`.
      size: of the view.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    view = _resized(Image.fromarray(image), int(resize * width / short), int(resize * height / short))
    top, left = round((view.shape[0] - size) / 2), round((view.shape[1] - size) / 2)
    return view[top : top + size, left : left + size]


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    if image.size == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
