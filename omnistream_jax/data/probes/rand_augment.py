"""RandAugment and random erasing of a clip: all of its frames change alike.

RandAugment (Cubuk et al. 2020, arXiv:1909.13719) in the form that names like "rand-m7-n4-mstd0.5-inc1" stand for in
V-JEPA 2's evaluations: n of 15 operations are drawn with replacement, each is left out half of the time, and its
magnitude, of at most 10, is drawn around m with deviation mstd; with inc1 a higher magnitude changes more.
Random erasing: Zhong et al. 2020, arXiv:1708.04896, in the mode in which each pixel is noise of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from omnistream_jax.data.errors import DataError

HIGHEST = 10.0
"""Of the magnitudes."""
SKIPPED_SHARE = 0.5
GREY = (128, 128, 128)
"""What comes in from beyond the picture's edge."""
SOLARISE_ADD_BELOW = 128
LARGEST_TURN, LARGEST_SHEAR, LARGEST_SHIFT = 30.0, 0.3, 0.45  # degrees; slope; share of the side
LARGEST_ENHANCEMENT = 0.9  # a factor of 1 changes nothing
LARGEST_ADDITION = 110
POSTER_BITS = 4

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
_ERASING_TRIES = 100

Change = tuple[str, float]
"""An operation of OPERATIONS and its argument; 0.0 where it takes none."""


def _affine(picture: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    """Pixel (x, y) of the result is taken from (a x + b y + c, d x + e y + f)."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC, fillcolor=GREY
    )


def _solarise_add(picture: Image.Image, addition: float) -> Image.Image:
    table = [min(255, value + int(addition)) if value < SOLARISE_ADD_BELOW else value for value in range(256)]
    return picture.point(table * 3)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda picture, _: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _: ImageOps.equalize(picture),
    "invert": lambda picture, _: ImageOps.invert(picture),
    "rotate": lambda picture, degrees: picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=GREY),
    "posterize": lambda picture, bits: ImageOps.posterize(picture, int(bits)),
    "solarize": lambda picture, threshold: ImageOps.solarize(picture, int(threshold)),
    "solarize_add": _solarise_add,
    "color": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    "contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    "brightness": lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    "sharpness": lambda picture, factor: ImageEnhance.Sharpness(picture).enhance(factor),
    "shear_x": lambda picture, slope: _affine(picture, (1, slope, 0, 0, 1, 0)),
    "shear_y": lambda picture, slope: _affine(picture, (1, 0, 0, slope, 1, 0)),
    "translate_x": lambda picture, share: _affine(picture, (1, 0, share * picture.width, 0, 1, 0)),
    "translate_y": lambda picture, share: _affine(picture, (1, 0, 0, 0, 1, share * picture.height)),
}
"""RGB pictures and an argument -> pictures of the same size."""

_ARGUMENTS: dict[str, Callable[[float, float], float]] = {
    "rotate": lambda share, sign: sign * LARGEST_TURN * share,
    "posterize": lambda share, _: POSTER_BITS - int(POSTER_BITS * share),
    "solarize": lambda share, _: 256 - int(256 * share),
    "solarize_add": lambda share, _: int(LARGEST_ADDITION * share),
    "shear_x": lambda share, sign: sign * LARGEST_SHEAR * share,
    "shear_y": lambda share, sign: sign * LARGEST_SHEAR * share,
    "translate_x": lambda share, sign: sign * LARGEST_SHIFT * share,
    "translate_y": lambda share, sign: sign * LARGEST_SHIFT * share,
    **dict.fromkeys(
        ("color", "contrast", "brightness", "sharpness"), lambda share, sign: 1.0 + sign * LARGEST_ENHANCEMENT * share
    ),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """How strongly and how often clips are changed.

    Attributes:
      magnitude: m, 0 to 10.
      operations: n, drawn for a clip.
      deviation: mstd, of the magnitude of each operation.

    Raises:
      DataError: a field is out of range.
    """

    magnitude: float
    operations: int
    deviation: float

    def __post_init__(self):
        if not 0 <= self.magnitude <= HIGHEST or self.operations < 0 or not 0 <= self.deviation < math.inf:
            raise DataError(f"rand_augment: {self}; expected a magnitude of 0 to 10, and no negative numbers")

    def draw(self, rng: np.random.Generator) -> tuple[Change, ...]:
        """The changes of one clip, in their order."""
        names = list(OPERATIONS)
        changes = []
        for place in rng.integers(len(names), size=self.operations):
            if rng.random() < SKIPPED_SHARE:
                continue
            magnitude = float(np.clip(rng.normal(self.magnitude, self.deviation), 0.0, HIGHEST))
            sign = -1.0 if rng.random() < 0.5 else 1.0
            changes.append((names[place], argument(names[place], magnitude, sign)))
        return tuple(changes)


def argument(operation: str, magnitude: float, sign: float) -> float:
    """What an operation of OPERATIONS is called with.

    Args:
      operation: its name.
      magnitude: 0 to 10.
      sign: 1.0 or -1.0, for what goes either way.
    """
    return _ARGUMENTS[operation](magnitude / HIGHEST, sign) if operation in _ARGUMENTS else 0.0


def parse_rand_augment(name: str) -> RandAugment | None:
    """What a name such as "rand-m7-n4-mstd0.5-inc1" stands for; None for "".

    Raises:
      DataError: the name is another, or its magnitude is above 10.
    """
    if not name:
        return None
    match = re.fullmatch(r"rand-m(\d+)-n(\d+)-mstd(\d+(?:\.\d+)?)-inc1", name)
    if not match:
        raise DataError(f"rand_augment: {name!r}, expected a name like 'rand-m7-n4-mstd0.5-inc1', or ''")
    return RandAugment(float(match[1]), int(match[2]), float(match[3]))


def apply_changes(frames: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
    """Changes all frames alike: uint8 [T, H, W, 3] to uint8 [T, H, W, 3]."""
    if not changes:
        return frames
    pictures = []
    for frame in frames:
        picture = Image.fromarray(frame)
        for name, value in changes:
            picture = OPERATIONS[name](picture, value)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def erase_box(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fills a random box, the same in all frames, with noise of deviation 1, each frame and pixel its own.

    Its area is 2 to 33 % of the picture's and its height / width 0.3 to 3.3, log-uniform. Where no such box fits in
    100 tries (a very long picture), nothing is erased.

    Args:
      frames: floats [T, H, W, 3], normalised; they are changed in place.
      rng: all randomness comes from it.

    Returns:
      `frames`.
    """
    count, height, width, channels = frames.shape
    for _ in range(_ERASING_TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(*map(math.log, ERASED_ASPECT)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            noise = rng.standard_normal((count, rows, columns, channels), dtype=np.float32)
            frames[:, top : top + rows, left : left + columns] = noise
            break
    return frames
