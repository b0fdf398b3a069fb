"""The file of a picture as it is published, wherever a reader finds it: in a tar, in a folder, in a TFDS example."""

from __future__ import annotations

import os

import numpy as np

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.annotated import AnnotatedImages
from omnistream_jax.data.readers.captions import CaptionSource
from omnistream_jax.data.readers.files import reading
from omnistream_jax.data.readers.images import ClassFolders, TarImages
from omnistream_jax.data.readers.refcoco import RefCoco
from omnistream_jax.data.readers.sa1b import Sa1bCaption
from omnistream_jax.data.readers.tfds import TfdsSource
from omnistream_jax.data.readers.webdataset import MAX_BYTES
from omnistream_jax.data.sources import Source
from omnistream_jax.data.world.sources import WorldCaptions

READERS = (TarImages, ClassFolders, TfdsSource, AnnotatedImages, RefCoco, Sa1bCaption, WorldCaptions)
"""Whose pictures are known."""


def check_reader(reader: Source | CaptionSource) -> None:
    """Raises UsageError for a reader of which `picture_file` knows nothing, or that reads videos."""
    if not isinstance(reader, READERS):
        raise UsageError(f"dataset {reader.name}: its reader gives no files of pictures that could be stored")
    if getattr(reader, "max_frames", 1) != 1:
        raise UsageError(f"dataset {reader.name}: its records are videos, stored as lists of pictures; expected images")


def picture_file(reader: Source | CaptionSource, index: int, path: str) -> bytes | None:
    """The file of a record's picture, as it is published; None in the embedded world, which renders its pictures.

    Args:
      reader: one of READERS.
      index: of the record.
      path: what the reader calls the picture: where it lies in a folder, its file.

    Raises:
      DataError: the file cannot be read, or is larger than MAX_BYTES.
    """
    match reader:
        case TarImages():
            return reader.records.read(index, "image")
        case AnnotatedImages():
            return reader.records.read(int(reader.images[index]), "image")
        case Sa1bCaption() if reader.places[index] >= 0:
            return reader.records.read(int(reader.places[index]), "image")
        case ClassFolders() | RefCoco() | Sa1bCaption():
            return _read(path)
        case TfdsSource():
            return np.asarray(reader.examples[index][reader.feature], object).item()
        case WorldCaptions():
            return None
    raise TypeError(f"{type(reader).__name__} is none of READERS")


def _read(path: str) -> bytes:
    with reading(path, "the file of a picture"), open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise DataError(
                f"{path}: has {size:,} bytes, at most {MAX_BYTES:,} are allowed", reason="file is too large"
            )
        return file.read()
