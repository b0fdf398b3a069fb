"""ADE20K's 150 classes (Zhou et al. 2017; the archive ADEChallengeData2016) for linear segmentation, as DINOv3 has it:

    images/{training,validation}/NAME.jpg             20,210 and 2,000 pictures
    annotations/{training,validation}/NAME.png        8-bit, 0: not labelled, 1 to 150: the classes
    ADE20K_object150_{train,val}.txt                  lines "training/NAME.jpg"; without a list all pictures are taken

root is the folder that holds images, or the one above it if it is called ADEChallengeData2016. Labels come out as 0 to
149, and 255 where there is none.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnistream_jax.data.benchmarks.layout import files_of, first_with
from omnistream_jax.data.errors import DataError, require_field
from omnistream_jax.data.images import MAX_PIXELS, read_image
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.probes.colours import DEVIATION, MEAN
from omnistream_jax.data.readers.files import read_lines, reading

FOLDERS = {"train": "training", "val": "validation"}
COUNTS = {"train": 20_210, "val": 2_000}
CLASSES = 150
IGNORED = 255
_NAMED = 3  # files that a message names at most
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 0.5
_CROP_TRIES = 10


@dataclasses.dataclass(frozen=True)
class AdeImages:
    """The pictures of a split, in the order of their names.

    Attributes:
      root: folder that holds images and annotations.
      split: "train" or "val".
      names: "training/NAME.jpg".
      listed: whether the names are those of the published list, or those of the folder.
    """

    root: Path
    split: str
    names: tuple[str, ...]
    listed: bool

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"ADE20K ({self.split})"

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> str:
        """The picture's path."""
        return str(self.root / "images" / self.names[index])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One picture, uint8 [H, W, 3], and its labels, uint8 [H, W]: 0 to 149, 255 where there is none.

        Raises:
          DataError: a file is missing or damaged, their sizes differ, or a label is above 150.
        """
        picture = read_image(self.describe(index), upright=False)  # as DINOv3; labels lie on it as it is stored
        path = _labels_path(self.root, self.names[index])
        labels = _read_labels(path)
        if labels.shape != picture.shape[:2]:
            height, width = picture.shape[:2]
            found = f"{labels.shape[1]} x {labels.shape[0]}"
            raise DataError(f"{path}: {found} pixels, its picture has {width} x {height}", reason="another size")
        return picture, labels

    def settings(self) -> dict[str, Any]:
        """JSON values: folder, counts, and whether all pictures are there ("complete")."""
        names = f"ADE20K_object150_{self.split}.txt" if self.listed else f"images/{FOLDERS[self.split]}"
        expected = COUNTS[self.split]
        counts = {"images": len(self), "expected_images": expected, "complete": len(self) == expected}
        return {"root": str(self.root), "list": names, **counts}


def open_ade20k(root: str | Path, split: str, *, incomplete: bool = False) -> AdeImages:
    """The pictures of a split; all of them must have their labels.

    Args:
      root: as the head of this file says.
      split: "train" or "val".
      incomplete: take fewer or more than the published ones.

    Raises:
      DataError: another layout, files that are missing, or other counts than the published ones.
    """
    if split not in FOLDERS:
        raise DataError(f"split: {split!r}, expected one of {', '.join(FOLDERS)}")
    folder = FOLDERS[split]
    root = first_with(Path(root), ("", "ADEChallengeData2016"), [f"images/{folder}"], f"images/{folder} of ADE20K")
    path = root / f"ADE20K_object150_{split}.txt"
    listed = path.is_file()
    names = (
        read_lines(path) if listed else [f"{folder}/{file.name}" for file in files_of(root / "images" / folder, ".jpg")]
    )
    where = path if listed else root / "images" / folder
    if not names or (not incomplete and len(names) != COUNTS[split]):
        raise DataError(
            f"{where}: {len(names):,} pictures, the published split has {COUNTS[split]:,}; "
            "config.allow_incomplete takes what is there, for numbers that cannot be compared"
        )
    pairs = [(root / "images" / name, _labels_path(root, name)) for name in names]
    missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise DataError(f"{where}: {len(missing):,} of its files are missing: {named}", reason="file is missing")
    return AdeImages(root, split, tuple(sorted(names)), listed)


def _labels_path(root: Path, name: str) -> Path:
    return (root / "annotations" / name).with_suffix(".png")


def _read_labels(path: Path) -> np.ndarray:
    with reading(path, "an 8-bit PNG of one channel"), Image.open(path, formats=("PNG",)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are allowed")
        if image.mode not in ("L", "P"):
            raise ValueError(f"it has mode {image.mode}")
        labels = np.asarray(image)
    if labels.max(initial=0) > CLASSES:
        raise DataError(f"{path}: a label is {labels.max()}, expected 0 to {CLASSES}", reason="label is out of range")
    return labels - np.uint8(1)  # 0 becomes 255


def resize_short_side(picture: np.ndarray, side: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] bilinearly, antialiased, to a short side; the long one is rounded half up."""
    height, width = short_side_size(*picture.shape[:2], side)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of a picture when its short side is `side`."""
    if height > width:
        return int(side * height / width + 0.5), side
    return side, int(side * width / height + 0.5)


@dataclasses.dataclass(frozen=True)
class AdeAugmentation:
    """What changes at random in training, in this order.

    Attributes:
      short_side: of the resized picture, in pixels, before `scale`.
      scale: smallest and largest factor of it.
      crop: height and width of the random crop, in pixels; smaller pictures are padded at the right and below, with
        the mean colour and no label.
      category_ratio: a crop is drawn again while one class has this share of its labelled pixels or more, or is alone;
        ten times at most. 1: any crop will do.
      flip_probability: of being mirrored.
      distortion: whether brightness, contrast, saturation and hue change, each in half of the samples.

    Raises:
      DataError: a field does not fit; the message names it.
    """

    short_side: int
    scale: tuple[float, float]
    crop: int
    category_ratio: float
    flip_probability: float
    distortion: bool

    def __post_init__(self):
        fits = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]
        require_field(fits, "scale", self.scale, "(smallest, largest), above 0")
        require_field(int(self.short_side * self.scale[0]) >= 1, "short_side", self.short_side, "1 pixel or more")
        require_field(self.crop >= 1, "crop", self.crop, "1 pixel or more")
        require_field(0 < self.category_ratio <= 1, "category_ratio", self.category_ratio, "a share, above 0, to 1")
        fits = 0 <= self.flip_probability <= 1
        require_field(fits, "flip_probability", self.flip_probability, "a probability, 0 to 1")

    def apply(self, rng: np.random.Generator, picture: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One random view.

        Args:
          rng: all randomness comes from it.
          picture: uint8 [H, W, 3].
          labels: uint8 [H, W], 255 where there is none.

        Returns:
          float32 [crop, crop, 3], normalised, and uint8 [crop, crop].
        """
        side = int(self.short_side * rng.uniform(*self.scale))
        labels = resize_nearest(labels, *short_side_size(*labels.shape, side))
        picture = resize_short_side(picture, side)
        place = self._draw_crop(rng, labels)
        picture, labels = picture[place], labels[place]
        if rng.random() < self.flip_probability:
            picture, labels = picture[:, ::-1], labels[:, ::-1]
        if self.distortion:
            picture = distort_colours(rng, np.ascontiguousarray(picture))
        pixels = (picture.astype(np.float32) / 255 - MEAN) / DEVIATION
        missing = [(0, self.crop - side) for side in labels.shape]
        return np.pad(pixels, [*missing, (0, 0)]), np.pad(labels, missing, constant_values=IGNORED)

    def _draw_crop(self, rng: np.random.Generator, labels: np.ndarray) -> tuple[slice, slice]:
        """The first crop that will do, or the last that was drawn, which is not looked at any more."""
        place = self._crop(rng, labels.shape)
        if self.category_ratio < 1:
            for _ in range(_CROP_TRIES):
                counts = np.bincount(labels[place].ravel(), minlength=IGNORED + 1)[:IGNORED]
                if np.count_nonzero(counts) > 1 and counts.max() < self.category_ratio * counts.sum():
                    break
                place = self._crop(rng, labels.shape)
        return place

    def _crop(self, rng: np.random.Generator, shape: tuple[int, int]) -> tuple[slice, slice]:
        starts = [int(rng.integers(max(side - self.crop, 0) + 1)) for side in shape]
        return tuple(slice(start, start + self.crop) for start in starts)


def resize_nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes [H, W] as PyTorch's F.interpolate(mode="nearest"): the pixel at floor(index x old / new)."""
    # PyTorch's scale is a float32.
    rows, columns = (
        np.minimum(np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int), old - 1)
        for old, new in zip(labels.shape, (height, width), strict=True)
    )
    return labels[np.ix_(rows, columns)]


def distort_colours(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """mmsegmentation's photometric distortion in DINOv3's form: uint8 [H, W, 3] to uint8 [H, W, 3].

    Each with probability 1/2: brightness +-32; contrast x 0.5 to 1.5, before or after the others; saturation x 0.5 to
    1.5; hue turned by up to half the circle either way (mmsegmentation's turns by a tenth).
    """

    def maybe(change, *limits: float) -> None:
        nonlocal picture
        if rng.random() < 0.5:
            picture = change(picture, rng.uniform(*limits))

    maybe(_brightness, -_BRIGHTNESS, _BRIGHTNESS)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        maybe(_contrast, *_CONTRAST)
    maybe(_saturation, *_SATURATION)
    maybe(_hue, -_HUE, _HUE)
    if not contrast_first:
        maybe(_contrast, *_CONTRAST)
    return picture


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)  # fractions are cut off, as in DINOv3's


def _brightness(picture: np.ndarray, added: float) -> np.ndarray:
    return _to_bytes(picture + np.float32(added))


def _contrast(picture: np.ndarray, factor: float) -> np.ndarray:
    return _to_bytes(picture * np.float32(factor))


def _saturation(picture: np.ndarray, factor: float) -> np.ndarray:
    gray = (picture @ np.array([0.2989, 0.587, 0.114], np.float32)).astype(np.uint8)[..., None]
    return _to_bytes(np.float32(factor) * picture + np.float32(1 - factor) * gray)


def _hue(picture: np.ndarray, turns: float) -> np.ndarray:
    hsv = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * turns)) % 360
    return _to_bytes(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * np.float32(256 - 1e-3))


@dataclasses.dataclass(frozen=True)
class AdeData(MixtureData[AdeImages]):
    """Training batches: "frames" float32 [B, 1, crop, crop, 3], normalised, and "labels" uint8 [B, 1, crop, crop].

    Attributes:
      augmentation: of each sample.
    """

    augmentation: AdeAugmentation = dataclasses.field(kw_only=True)

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        picture, labels = self.augmentation.apply(rng, *self.sources[place].read(index))
        return {"frames": picture[None], "labels": labels[None]}


@dataclasses.dataclass(frozen=True)
class AdeView:
    """Pictures resized to a short side, with labels at the size of the file; an `evals.probes.base.ValidationData`.

    Attributes:
      source: of the pictures.
      short_side: in pixels.
    """

    source: AdeImages
    short_side: int

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """ "frames" uint8 [1, h, w, 3] and "labels" uint8 [H, W], 255 where there is none. Raises DataError."""
        picture, labels = self.source.read(index)
        return {"frames": resize_short_side(picture, self.short_side)[None], "labels": labels}

    def settings(self) -> dict[str, Any]:
        """JSON values: where the pictures come from, how many, and their size."""
        return {**self.source.settings(), "short_side": self.short_side}
