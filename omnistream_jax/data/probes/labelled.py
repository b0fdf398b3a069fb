"""Pictures with one class each: folders as published, and things of the embedded rendered world.

FOLDER/train/CLASS/*.JPEG      ImageNet-1K's and torchvision's ImageFolder layout; classes are numbered by the
FOLDER/val/CLASS/*.JPEG        alphabet of the folders' names
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from omnistream_jax.data.embedded import SPLITS
from omnistream_jax.data.errors import DataError, because, require_field
from omnistream_jax.data.images import read_image
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.probes.images import training_view, validation_view
from omnistream_jax.data.sources import IMAGE_SUFFIXES
from omnistream_jax.data.world.clips import Seen, render_clip
from omnistream_jax.data.world.scenes import SHAPES, build_scene

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
_SHOWN = 3  # names that a message lists


class LabelledSource(Protocol):
    """Pictures with a class each."""

    name: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the path of a picture."""

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """A picture, uint8 [H, W, 3], and its place in `classes`. Raises DataError that names the file."""

    def settings(self) -> dict[str, Any]:
        """JSON values: where they come from, how many there are, and "complete", as of `evals.probes.base`."""


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Photographs in folders, made by `image_folder`.

    Attributes:
      folder: that of the split.
      classes: names of the folders in it, by the alphabet.
      paths: of the files, from `folder` on.
      labels: the class of each.
      expected: how many files and classes are published; None where nobody says.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    expected: tuple[int, int] | None

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.folder)

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """The path of a file."""
        return str(self.folder / self.paths[index])

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """As `LabelledSource.read`; the picture as it is stored, for torchvision and DINOv3 do not turn it upright."""
        return read_image(self.describe(index), upright=False), self.labels[index]

    def settings(self) -> dict[str, Any]:
        """As `LabelledSource.settings`."""
        found, expected = (len(self), len(self.classes)), self.expected
        counts = {"images": found[0], "expected_images": expected and expected[0], "classes": found[1]}
        return {"folder": str(self.folder), **counts, "complete": expected in (None, found)}


def image_folder(
    folder: str | os.PathLike, split: str, classes: int, images: int | None, incomplete: bool = False
) -> LabelledImages:
    """One split of a data set in ImageFolder's layout; see the module.

    Args:
      folder: of the data set.
      split: "train" or "val".
      classes: how many folders are expected.
      images: how many files are expected; None: any number, of at most `classes` classes.
      incomplete: take any number, of at most `classes` classes; `settings` says whether they are complete.

    Raises:
      DataError: the layout is another, or the counts are not as expected; the message names the folder.
    """
    root = Path(folder) / split
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; expected {split}/CLASS/IMAGE in {folder}")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise DataError(f"{root}: expected a folder for each class, found none")
    paths, labels = [], []
    for label, name in enumerate(names):
        files = sorted(entry.name for entry in os.scandir(root / name) if entry.name.lower().endswith(IMAGE_SUFFIXES))
        if not files:
            raise DataError(f"{root / name}: expected image files ({', '.join(IMAGE_SUFFIXES)}), found none")
        paths += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    expected = None if images is None else (images, classes)
    exact = images is not None and not incomplete
    if (len(paths), len(names)) != expected if exact else len(names) > classes:
        wanted = f"{images:,} images of {classes:,} classes" if exact else f"at most {classes:,} classes"
        hint = "; allow_incomplete=True takes them as they are" if exact else ""
        raise DataError(f"{root}: {len(paths):,} images of {len(names):,} classes, expected {wanted}{hint}")
    return LabelledImages(root, tuple(names), tuple(paths), tuple(labels), expected)


def check_same_classes(train: LabelledSource, validation: LabelledSource) -> None:
    """Raises DataError where two splits have classes of other names, whose numbers would not mean the same."""
    if train.classes != validation.classes:
        odd = sorted(set(train.classes) ^ set(validation.classes))
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise DataError(
            f"{train.name} and {validation.name} have other classes: {', '.join(odd[:_SHOWN])}{more} in one alone"
        )


@dataclasses.dataclass(frozen=True)
class WorldObjects:
    """Crops around one thing of each scene of the embedded world; its class is its shape. Nothing is stored.

    The scene, the moment and the thing are drawn by (seed, split, index). The crop is a square around the thing's box
    with a margin, moved to lie within the frame; other things may show in it.

    Attributes:
      split: "train" or "heldout", which share neither scenes nor textures.
      length: how many scenes.
      render_size: side of a rendered frame in pixels.
      margin: on each side of the box, as a share of its longer side.
      smallest: longer side of the smallest boxes that are drawn, in pixels; where a frame shows none, its largest.
      seed: 0 or more.

    Raises:
      DataError: a field is out of range.
    """

    split: str
    length: int
    render_size: int = 96
    margin: float = 0.25
    smallest: int = 12
    seed: int = 0
    classes: ClassVar[tuple[str, ...]] = tuple(SHAPES)

    def __post_init__(self):
        require_field(self.split in SPLITS, "split", self.split, " or ".join(SPLITS))
        require_field(self.length >= 1, "scenes", self.length, "1 or more")
        require_field(16 <= self.render_size <= 1024, "render_size", self.render_size, "16 to 1024")
        require_field(0 <= self.margin <= 4, "margin", self.margin, "0 to 4")
        require_field(1 <= self.smallest <= self.render_size, "smallest", self.smallest, "1 to render_size")
        require_field(self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"world objects ({self.split})"

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """The scene's number; there is no file."""
        return f"world ({self.split}), seed {self.seed}, scene {index}"

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """A crop, uint8 [S, S, 3] of any S, and the place of its shape in `classes`."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index, 0x0B1EC7])
        clip = render_clip(build_scene(self.seed, self.split, index), [rng.random()], self.render_size)
        seen = clip.seen(0)  # never empty: what moves is in sight
        large = [one for one in seen if self._side(one) >= self.smallest] or [max(seen, key=self._side)]
        one = large[rng.integers(len(large))]
        shape = clip.scene.things[one.thing].shape
        return self._crop(clip.images[0], one), self.classes.index(shape)

    def settings(self) -> dict[str, Any]:
        """As `LabelledSource.settings`."""
        return dataclasses.asdict(self) | {"images": len(self), "classes": len(self.classes), "complete": True}

    def _side(self, one: Seen) -> float:
        left, top, right, bottom = one.box
        return max(right - left, bottom - top) * self.render_size

    def _crop(self, image: np.ndarray, one: Seen) -> np.ndarray:
        size = self.render_size
        side = min(size, max(1, round(self._side(one) * (1 + 2 * self.margin))))
        centre = np.array([one.box[0] + one.box[2], one.box[1] + one.box[3]]) / 2 * size
        left, top = np.clip(np.rint(centre - side / 2), 0, size - side).astype(int)
        return image[top : top + side, left : left + side]


@dataclasses.dataclass(frozen=True)
class LabelledData(MixtureData[LabelledSource]):
    """Batches to train on: "frames" uint8 [B, 1, S, S, 3], "label" int32 [B]; views by `images.training_view`.

    Attributes:
      size: S, in pixels.
    """

    size: int = dataclasses.field(kw_only=True)

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        with because("image cannot be decoded"):
            image, label = self.sources[place].read(index)
        return {"frames": training_view(image, rng, self.size)[None], "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class LabelledViews:
    """Samples without anything random: "frames" uint8 [1, S, S, 3], "label" int32.

    Attributes:
      source: of the pictures.
      resize: their short side before the central crop, in pixels.
      size: S, in pixels.
    """

    source: LabelledSource
    resize: int
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """One picture in `images.validation_view`. Raises DataError that names its file."""
        image, label = self.source.read(index)
        return {"frames": validation_view(image, self.resize, self.size)[None], "label": np.int32(label)}

    def settings(self) -> dict[str, Any]:
        """Where they come from, how many there are, and their sizes."""
        return {**self.source.settings(), "resize": self.resize, "size": self.size}
