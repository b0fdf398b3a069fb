"""Photographs for self-supervision: DataComp and ImageNet-21K, as `data/sources.py` wants its sources.

DataComp (Gadre et al. 2023), as its download script leaves it through img2dataset [from memory, not verified on it]:

    shards/00000000.tar         000000000.jpg, .txt (the caption), .json (uid, url, ...); the folder shards may be root
    shards/00000000.parquet     the same as a table, with what could not be downloaded
    SUBSET.npy                  uids that a filter keeps, dtype "u8,u8": the two halves of the 32 hexadecimal digits

ImageNet-21K (Ridnik et al. 2021 for "P") [from memory, not verified on it]:

    WNID/WNID_N.JPEG                                 winter21_whole, the tar of each class unpacked
    imagenet21k_train/WNID/..., imagenet21k_val/...  the processed "P" version
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.files import reading
from omnistream_jax.data.readers.tables import match, record_ids
from omnistream_jax.data.readers.webdataset import TarRecords, find_tars, index_tars
from omnistream_jax.data.schema import Sample
from omnistream_jax.data.sources import IMAGE_SUFFIXES

IMAGE_PARTS: Mapping[str, tuple[str, ...]] = {"image": IMAGE_SUFFIXES, "json": (".json",), "text": (".txt",)}
"""The files of a record that img2dataset writes."""

EXPECTED_WHOLE, EXPECTED_P = {"train": 13_153_500}, {"train": 11_060_223, "val": 522_500}
"""Images of winter21, and of its "P" version."""


@dataclasses.dataclass(frozen=True, eq=False)
class TarImages:
    """Photographs in WebDataset tars, a `sources.Source`; has no labels."""

    name: str
    records: TarRecords
    max_frames: ClassVar[int | None] = 1

    def __len__(self) -> int:
        return len(self.records)

    def describe(self, index: int) -> str:
        """The tar's path and the record's name in it."""
        return self.records.describe(index)

    def sample(self, index: int, rng: np.random.Generator, frames: int = 1, stride: tuple[int, int] = (1, 1)) -> Sample:
        """See `sources.ImageSource.sample`."""
        path = self.describe(index)
        _check_frames(path, frames)
        return Sample(frames=read_record_image(self.records, index)[None], path=path)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassFolders:
    """Photographs in one folder a class, a `sources.Source`.

    Attributes:
      name: how messages call it.
      root: the folder of the classes' folders.
      labels: the classes' names, sorted.
      label_ids: int32 [N], the class of each photograph.
      files: bytes [N], names in the class's folder: Python's own strings would take gigabytes.
      EXPECTED: split -> images that are published.
    """

    name: str
    root: str
    labels: tuple[str, ...]
    label_ids: np.ndarray
    files: np.ndarray
    EXPECTED: Mapping[str, int]
    max_frames: ClassVar[int | None] = 1

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        """The photograph's path."""
        return os.path.join(self.root, self.labels[self.label_ids[index]], os.fsdecode(bytes(self.files[index])))

    def label(self, index: int) -> int:
        """The photograph's class, an index into `labels`."""
        return int(self.label_ids[index])

    def sample(self, index: int, rng: np.random.Generator, frames: int = 1, stride: tuple[int, int] = (1, 1)) -> Sample:
        """See `sources.ImageSource.sample`."""
        path = self.describe(index)
        _check_frames(path, frames)
        return Sample(frames=read_image(path)[None], path=path)


def open_datacomp(root: str | os.PathLike, split: str = "train", subset: str | os.PathLike | None = None) -> TarImages:
    """The images of DataComp that were downloaded.

    Args:
      root: the folder that the download script filled, or its folder `shards`.
      split: "train": there is no other.
      subset: a .npy file of the uids to keep; None keeps all.

    Raises:
      DataError: the layout is another; the message says what was expected.
    """
    if split != "train":
        raise DataError(f"split: {split!r}, expected train: DataComp has no other")
    shards, records = open_img2dataset(Path(root))
    if subset is not None:
        kept = _read_uids(Path(subset))
        records = records.take(np.flatnonzero(match(record_ids(records, "uid"), kept) >= 0))
    if not len(records):
        raise DataError(f"{shards}: its tars hold no image" + (f" of {subset}" if subset is not None else ""))
    return TarImages("datacomp", records)


def open_imagenet21k(root: str | os.PathLike, split: str = "train") -> ClassFolders:
    """ImageNet-21K, whole (split "train" only) or in the "P" version's splits "train" and "val".

    Raises:
      DataError: the layout is another; the message says what was expected.
    """
    root = require(Path(root), expected="the folder of ImageNet-21K")
    if split not in ("train", "val"):
        raise DataError(f"split: {split!r}, expected train or val")
    if any((root / f"imagenet21k_{part}").is_dir() for part in ("train", "val")):
        folder, expected = require(root, f"imagenet21k_{split}", expected="the split's folder of classes"), EXPECTED_P
    elif split == "train":
        folder, expected = root, EXPECTED_WHOLE
    else:
        raise DataError(f"{root}: has no imagenet21k_val; the whole of ImageNet-21K has only the split train")
    found = _list_classes(folder, r"n\d{8}", "WNID/WNID_N.JPEG, such as n00004475/...")
    return ClassFolders(f"imagenet21k ({split})", str(folder), *found, expected)


def open_img2dataset(root: Path) -> tuple[Path, TarRecords]:
    """The folder of tars that img2dataset wrote, root or shards in it, and their records that have an image.

    Raises:
      DataError: there are no tars, or they cannot be read.
    """
    shards = root / "shards" if (root / "shards").is_dir() else root
    return shards, index_tars(find_tars(shards, "img2dataset's 00000000.tar"), IMAGE_PARTS, required="image")


def read_record_image(records: TarRecords, index: int) -> np.ndarray:
    """uint8 [H, W, 3], the image of a record. Raises DataError that names it if it cannot be read."""
    with records.open(index, "image") as file:
        return read_image(records.describe(index), file=file)


def _list_classes(root: Path, pattern: str, expected: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """`labels`, `label_ids` and `files` of ClassFolders."""
    with reading(root, f"a folder of {expected}"):
        labels = sorted(
            entry.name for entry in os.scandir(root) if re.fullmatch(pattern, entry.name) and entry.is_dir()
        )
    files, label_ids = [np.zeros(0, "S1")], [np.zeros(0, np.int32)]
    for number, label in enumerate(labels):
        names = [entry for entry in os.listdir(root / label) if entry.lower().endswith(IMAGE_SUFFIXES)]
        if names:
            files.append(np.array(sorted(os.fsencode(entry) for entry in names), "S"))
            label_ids.append(np.full(len(names), number, np.int32))
    if len(files) == 1:
        raise DataError(f"{root}: holds no {expected}")
    return tuple(labels), np.concatenate(label_ids), np.concatenate(files)


def _read_uids(path: Path) -> np.ndarray:
    """bytes [n], 32 hexadecimal digits each, of DataComp's list of uids."""
    expected = "a .npy file of uids, dtype u8,u8"
    with reading(path, expected):
        pairs = np.load(path, allow_pickle=False)
        if pairs.dtype.names is None or [pairs.dtype[i] for i in range(len(pairs.dtype))] != [np.uint64] * 2:
            raise ValueError(f"its dtype is {pairs.dtype}")
        halves = np.stack([pairs[field] for field in pairs.dtype.names], axis=-1).astype(">u8")
        digits = halves.tobytes().hex().encode()
        return np.frombuffer(digits, "S32") if digits else np.zeros(0, "S32")


def _check_frames(path: str, frames: int) -> None:
    if frames != 1:
        raise DataError(f"{path}: a photograph has 1 frame, a clip of {frames} was asked for")
