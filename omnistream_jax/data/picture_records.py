"""The records of prepared images and captions: a picture's file and what is known of it (data/record_bytes.py).

    image      header {"format", "source", "name", "label", "label_name"}
    caption    header {"format", "source", "name", "instruction", "answer", "phrases", "path", "others"}, boxes float32
               [N, 4]; "others" is null where they are implied, and missing in shards of before there were any

both with picture uint8 [...], a file of any format that data/images.py reads. Boxes are shares of width and height.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from omnistream_jax.data.record_bytes import as_tensor, pack_fields, unpack


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """A prepared image.

    Attributes:
      source: the data set and its split.
      name: the image's in the data set: its path below the folder of the published layout.
      label: its class, None where that is not published.
      label_name: the name of its class, None where that is not published.
      picture: its file.
    """

    source: str
    name: str
    label: int | None
    label_name: str | None
    picture: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionRecord:
    """A prepared captioned image; `schema.CaptionedImage` says what instruction, answer, boxes and phrases are.

    Attributes:
      source: the data set and its split.
      name: the record's in the data set, as its reader describes it.
      instruction: a text.
      answer: a text.
      boxes: float32 [N, 4].
      phrases: N texts.
      path: of the picture's file, below the folder of the published layout.
      picture: its file.
      others: (instruction, answer) of each; None: those that `readers.captions.implied_texts` makes of the record.
    """

    source: str
    name: str
    instruction: str
    answer: str
    boxes: np.ndarray
    phrases: tuple[str, ...]
    path: str
    picture: bytes
    others: tuple[tuple[str, str], ...] | None = None


def encode_image(record: ImageRecord) -> bytes:
    """The bytes of a record, the same for the same values."""
    return pack_fields(record, picture=as_tensor(record.picture))


def decode_image(data: bytes, where: str) -> ImageRecord:
    """Reads a record; nothing is decoded yet. Raises DataError, naming `where`, for bytes that are none."""
    return unpack(
        data,
        where,
        "a prepared image",
        lambda header, tensors: ImageRecord(**header, picture=tensors["picture"].tobytes()),
    )


def encode_caption(record: CaptionRecord) -> bytes:
    """The bytes of a record, the same for the same values."""
    boxes = np.ascontiguousarray(record.boxes, np.float32).reshape(-1, 4)
    return pack_fields(record, boxes=boxes, picture=as_tensor(record.picture))


def decode_caption(data: bytes, where: str) -> CaptionRecord:
    """Reads a record; nothing is decoded yet. Raises DataError, naming `where`, for bytes that are none."""

    def make(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> CaptionRecord:
        header["phrases"] = tuple(header["phrases"])
        if (others := header.pop("others", None)) is not None:
            header["others"] = tuple((instruction, answer) for instruction, answer in others)
        return CaptionRecord(**header, boxes=tensors["boxes"], picture=tensors["picture"].tobytes())

    return unpack(data, where, "a prepared caption", make)
