"""InternVL-SA-1B-Caption (Hub OpenGVLab/InternVL-SA-1B-Caption): paragraphs about the images of SA-1B.

    internvl_sa1b_caption_11m_single_image_en.jsonl    {"image": "sa_000020/sa_223750.jpg", "conversations": [
        {"from": "human", "value": "<image>\nDescribe ..."}, {"from": "gpt", "value": "The image shows ..."}]}
    IMAGES/sa_000020.tar     sa_223750.jpg and .json (masks); or unpacked, IMAGES/sa_000020/sa_223750.jpg

The fields agree with a public reader; not tried on the real files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.captions import describe_prompt
from omnistream_jax.data.readers.files import reading
from omnistream_jax.data.readers.images import IMAGE_PARTS, read_record_image
from omnistream_jax.data.readers.tables import match
from omnistream_jax.data.readers.webdataset import TarRecords, index_tars
from omnistream_jax.data.schema import CaptionedImage

CAPTIONS_FILE = "internvl_sa1b_caption_11m_single_image_en.jsonl"
_IMAGE = re.compile(rb'"image"\s*:\s*"((sa_\d{6})/(sa_\d+)\.jpg)"')
_IN_FOLDER = -2
_UNREADABLE = -3


@dataclasses.dataclass(frozen=True, eq=False)
class Sa1bCaption:
    """Images and paragraphs, a `CaptionSource` of data/readers/captions.py. Made by `open_sa1b_caption`.

    Attributes:
      name: how messages call it.
      captions: the JSON lines.
      images: the folder of tars, or of folders.
      records: the images in tars.
      lines: int64 [N], 0-based numbers of lines.
      offsets: int64 [N], where each line begins.
      places: int64 [N], the record of each line's image; negative: it lies in a folder, or the line names none.
      missing: lines whose image is not there.
    """

    name: str
    captions: str
    images: Path
    records: TarRecords
    lines: np.ndarray
    offsets: np.ndarray
    places: np.ndarray
    missing: int

    def __len__(self) -> int:
        return len(self.lines)

    def describe(self, index: int) -> str:
        """The file of captions and the line, from 1 on."""
        return f"{self.captions}, line {self.lines[index] + 1}"

    def read(self, index: int) -> CaptionedImage:
        """Reads one. Raises DataError, naming the line, where it cannot be used."""
        where = self.describe(index)
        with reading(self.captions, "the file of captions"), open(self.captions, "rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.readline()
        row = _parse(line, where)
        found = _IMAGE.search(line)
        if not found or row.get("image") != found[1].decode():
            raise DataError(f"{where}: its image is {row.get('image')!r}, expected sa_000020/sa_223750.jpg")
        prompt = describe_prompt(_answer(row, where), where)
        place = int(self.places[index])
        if place >= 0:
            return prompt.with_image(read_record_image(self.records, place), self.records.describe(place))
        path = str(self.images / row["image"])  # the pattern lets it lead nowhere else
        return prompt.with_image(read_image(path), path)


def open_sa1b_caption(
    root: str | os.PathLike,
    split: str = "train",
    images: str | os.PathLike | None = None,
    captions: str = CAPTIONS_FILE,
) -> Sa1bCaption:
    """The captions whose images are there.

    Reads the file of captions once, in a minute or two for the 11 GB of the whole, and the headers of the tars.

    Args:
      root: the folder of the file of captions.
      split: "train": there is no other.
      images: SA-1B's folder; None: root / "images".
      captions: the file's name in root; it must be one of single images.

    Raises:
      DataError: the layout is another, or no image is there.
    """
    if split != "train":
        raise DataError(f"split: {split!r}, expected train: InternVL-SA-1B-Caption has no other")
    root = require(Path(root), expected="the folder of InternVL-SA-1B-Caption")
    path = require(root, captions, expected="the file of captions")
    folder = require(Path(images) if images is not None else root / "images", expected="the folder of SA-1B's images")
    tars = sorted(folder.glob("sa_*.tar"))
    folders = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    records = index_tars(tars, {"image": IMAGE_PARTS["image"]}, required="image")
    shards, names, offsets = _scan(path)
    wanted = np.char.add(np.char.add(shards, b"/"), names) if len(shards) else shards
    places = match(wanted, _names_with_shard(records))
    places[(places < 0) & np.isin(shards, np.array([name.encode() for name in folders] or [b""]))] = _IN_FOLDER
    places[names == b""] = _UNREADABLE
    kept = np.flatnonzero(places != -1)
    if not (places[kept] != _UNREADABLE).any():
        raise DataError(f"{folder}: holds no image that {path.name} names; expected sa_000020.tar or sa_000020/")
    missing = len(places) - len(kept)
    return Sa1bCaption("sa1b_caption", str(path), folder, records, kept, offsets[kept], places[kept], missing)


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard and name of each line's image (bytes [n], b"" where it names none), and where the line begins."""
    shards, names, offsets, place = [], [], [], 0
    with reading(path, "the file of captions"), open(path, "rb") as file:
        for line in file:
            found = _IMAGE.search(line)
            shards.append(found[2] if found else b"")
            names.append(found[3] if found else b"")
            offsets.append(place)
            place += len(line)
    return np.array(shards, "S9"), np.array(names, "S"), np.array(offsets, np.int64)


def _names_with_shard(records: TarRecords) -> np.ndarray:
    """bytes [N], "sa_000020/sa_223750" for sa_223750.jpg in sa_000020.tar, in whatever folder of the tar."""
    names = [
        f"{Path(records.tars[tar]).stem}/{records.key(index).rpartition('/')[2]}"
        for index, tar in enumerate(records.tar)
    ]
    return np.array(names, "S") if names else np.zeros(0, "S1")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    with reading(where, "a JSON object"):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"it is a {type(row).__name__}")
        return row


def _answer(row: dict[str, Any], where: str) -> Any:
    """What the model said in a conversation of one question."""
    turns = row.get("conversations")
    try:
        (human, answer) = turns
        if (human["from"], answer["from"]) != ("human", "gpt"):
            raise ValueError
        return answer["value"]
    except (TypeError, ValueError, KeyError):
        raise DataError(
            f"{where}: its conversations are {turns!r:.200}; expected a turn of human and one of gpt",
            reason="conversation cannot be read",
        ) from None
