"""Textures of the world: square crops of the embedded real photographs, with their mipmaps, in one flat array.

Train and held-out parts share no pixel of a photograph. Materials that captions name must be known to both, so each
is cut from two rectangles of one photograph that do not touch; all else of the held-out part comes from the held-out
photographs, and all else of the train part from the train photographs without the held-out rectangles.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image

from omnistream_jax.data.embedded import SPLITS, embedded_files
from omnistream_jax.data.images import read_image

SIDE = 128
"""Side of a texture at its finest level, in texels."""
LEVELS = 6
CROPS_OF_A_PHOTOGRAPH = {"train": 3, "heldout": 8}
CROPS_OF_A_MATERIAL = 4
_GREY_MEAN, _GREY_DEVIATION = 0.8, 0.13  # of the luminance that colours are multiplied with

Box = tuple[float, float, float, float]

# Name -> photograph, rectangle of the train part, rectangle of the held-out part: (left, top, right, bottom) as shares.
MATERIALS: dict[str, tuple[str, Box, Box]] = {
    "circuits": ("board", (0, 0, 0.48, 1), (0.52, 0, 1, 1)),
    "stars": ("hubble", (0, 0, 0.48, 1), (0.52, 0, 1, 1)),
    "sweets": ("smarties", (0, 0.4, 0.5, 1), (0.52, 0.12, 1, 1)),
    "fur": ("dog", (0, 0.3, 0.35, 0.85), (0.45, 0.55, 0.85, 0.95)),
    "fruit": ("fruits", (0, 0, 0.52, 1), (0.6, 0.5, 1, 1)),
    "wood": ("coffee", (0, 0.2, 0.17, 0.6), (0.76, 0.7, 1, 1)),
    "leaves": ("squirrel", (0, 0, 0.36, 0.55), (0.6, 0, 1, 0.4)),
    "palace walls": ("home", (0.36, 0.7, 0.62, 1), (0.64, 0.6, 1, 1)),
}


@dataclasses.dataclass(frozen=True)
class Crop:
    """Where a texture was cut.

    Attributes:
      photograph: the file's name without suffix.
      box: (left, top, right, bottom) in its pixels.
    """

    photograph: str
    box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Textures:
    """All textures of one split.

    Attributes:
      texels: uint32 [layers * LAYER_TEXELS], red in the lowest byte, then green and blue; a layer holds its levels
        one after another, each row by row.
      crops: of each layer.
      photographs: layers in a photograph's own colours.
      greys: layers of luminance alone, for surfaces that have a colour.
      materials: name -> its layers.
    """

    texels: np.ndarray
    crops: tuple[Crop, ...]
    photographs: range
    greys: range
    materials: dict[str, range]


LEVEL_OFFSETS = np.cumsum([0] + [(SIDE >> level) ** 2 for level in range(LEVELS)]).astype(np.int32)
"""Where each level begins in a layer; the last entry is the size of a layer."""
LAYER_TEXELS = int(LEVEL_OFFSETS[-1])


@functools.cache
def world_textures(split: str) -> Textures:
    """The textures of a split ("train" or "heldout"); cut once a process, always the same.

    Raises:
      DataError: there is no such split, or the package's photographs are missing.
    """
    names = [path.stem for path in embedded_files("images", split)]
    paths = [*embedded_files("images", "train"), *embedded_files("images", split)]
    pictures = {path.stem: read_image(path) for path in paths}
    rng = np.random.default_rng(SPLITS.index(split))
    crops = [
        _crop(rng, name, pictures[name], _free_box(split, name))
        for name in names
        for _ in range(CROPS_OF_A_PHOTOGRAPH[split])
    ]
    materials: dict[str, range] = {}
    count = len(crops)
    cuts = [*crops, *crops]  # once in colour, once in grey
    for material, (name, *boxes) in MATERIALS.items():
        materials[material] = range(len(cuts), len(cuts) + CROPS_OF_A_MATERIAL)
        box = boxes[SPLITS.index(split)]
        cuts += [_crop(rng, name, pictures[name], box) for _ in range(CROPS_OF_A_MATERIAL)]
    squares = [_square(pictures[cut.photograph], cut) for cut in cuts]
    squares[count : 2 * count] = [_grey(square) for square in squares[count : 2 * count]]
    texels = np.concatenate([_pyramid(square) for square in squares])
    return Textures(texels, tuple(cuts), range(count), range(count, 2 * count), materials)


def _free_box(split: str, name: str) -> Box:
    """The part of a photograph that a split may cut surfaces from."""
    for photograph, train_box, _ in MATERIALS.values():
        if photograph == name and split == "train":
            return train_box
    return (0.0, 0.0, 1.0, 1.0)


def _crop(rng: np.random.Generator, name: str, picture: np.ndarray, box: Box) -> Crop:
    """A random square of 0.65 to 1 times the largest within a box."""
    height, width = picture.shape[:2]
    left, right = int(np.ceil(box[0] * width)), int(box[2] * width)
    top, bottom = int(np.ceil(box[1] * height)), int(box[3] * height)
    side = int(min(right - left, bottom - top) * rng.uniform(0.65, 1.0))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(top, bottom - side + 1))
    return Crop(name, (x, y, x + side, y + side))


def _square(picture: np.ndarray, crop: Crop) -> np.ndarray:
    """float32 [SIDE, SIDE, 3], 0 to 255. The crop is cut first: resampling must not look beyond it."""
    left, top, right, bottom = crop.box
    cut = Image.fromarray(picture[top:bottom, left:right])
    return np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)


def _grey(square: np.ndarray) -> np.ndarray:
    """The luminance, brought to one mean and contrast, so that a colour multiplied with it keeps its name."""
    luminance = square @ np.array([0.299, 0.587, 0.114], np.float32)
    normal = (luminance - luminance.mean()) / max(float(luminance.std()), 1.0)
    grey = np.clip(_GREY_MEAN + _GREY_DEVIATION * normal, 0.4, 1.0) * 255
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)


def _pyramid(square: np.ndarray) -> np.ndarray:
    """uint32 [LAYER_TEXELS] of a square and its halvings by means of 2 x 2."""
    levels = []
    for _ in range(LEVELS):
        colours = np.clip(np.rint(square), 0, 255).astype(np.uint32).reshape(-1, 3)
        levels.append(colours[:, 0] | colours[:, 1] << 8 | colours[:, 2] << 16)
        square = square.reshape(len(square) // 2, 2, len(square) // 2, 2, 3).mean((1, 3))
    return np.concatenate(levels)
