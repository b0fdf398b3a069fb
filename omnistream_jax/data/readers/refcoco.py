"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016, Mao et al. 2016): phrases that single out an object of COCO.

    {refcoco,refcoco+}/refs(unc).p, refcocog/refs(umd).p    Python pickles: lists of {ref_id, ann_id, image_id, split,
                                                            sentences: [{sent, sent_id, raw, tokens}], ...}
    WHICH/instances.json                                    COCO's form: images (id, file_name, width, height) and
                                                            annotations (id, bbox: x, y, width, height in pixels)
    train2014/COCO_train2014_000000581857.jpg               COCO's images of 2014

The pickles are never unpickled: `convert_refs` turns one into refs(unc).json beside it (data/readers/safe_pickle.py),
and that is what is read. The fields are as the API of the authors uses them; not tried on the real files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.captions import locate_prompt
from omnistream_jax.data.readers.files import read_json, reading
from omnistream_jax.data.readers.safe_pickle import read_plain_pickle
from omnistream_jax.data.schema import CaptionedImage
from omnistream_jax.utils.files import write_json

SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
"""Who split each; refcocog's "google" split shares images between its parts and is not read."""

EXPECTED: Mapping[str, Mapping[str, int]] = {
    "refcoco": {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
    "refcoco+": {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
    "refcocog": {"train": 80_512, "val": 4_896, "test": 9_602},
}
"""Sentences of each split [from memory]; each is a record."""


@dataclasses.dataclass(frozen=True, eq=False)
class RefCoco:
    """Phrases and the boxes that they speak of, a `CaptionSource` of data/readers/captions.py. Made by `open_refcoco`.

    Attributes:
      name: how messages call it.
      images: COCO's folder of images.
      records: (ref_id, number of the sentence, sentence, id of the object) of each record.
      boxes: object -> (image's file name, its width and height, box x, y, width, height), all in pixels.
      EXPECTED: split -> sentences that are published.
    """

    name: str
    images: str
    records: tuple[tuple[int, int, Any, int], ...]
    boxes: Mapping[int, tuple[str, float, float, Any]]
    EXPECTED: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.records)

    def describe(self, index: int) -> str:
        """The data set and the number of the reference and of its sentence."""
        reference, number, _, _ = self.records[index]
        return f"{self.name}, ref_id {reference}, sentence {number}"

    def read(self, index: int) -> CaptionedImage:
        """Reads one. Raises DataError, naming the reference, where it cannot be used."""
        _, _, sentence, target = self.records[index]
        where = self.describe(index)
        if target not in self.boxes:
            raise DataError(f"{where}: its object {target} is not in instances.json")
        file, width, height, box = self.boxes[target]
        prompt = locate_prompt(sentence, _shares(box, width, height, where), where)
        path = os.path.join(self.images, file)
        return prompt.with_image(read_image(path), path)


def open_refcoco(
    root: str | os.PathLike,
    split: str = "train",
    which: str = "refcoco",
    images: str | os.PathLike | None = None,
) -> RefCoco:
    """One of the three; a record is a sentence.

    Args:
      root: the folder of the folders refcoco, refcoco+ and refcocog.
      split: "train", "val", and "testA" or "testB", for refcocog "test".
      which: "refcoco", "refcoco+" or "refcocog".
      images: COCO's folder train2014; None: that in root.

    Raises:
      DataError: the layout is another, or the pickle was not converted yet.
    """
    if which not in SPLIT_BY:
        raise DataError(f"which: {which!r}, expected one of {', '.join(SPLIT_BY)}")
    if split not in EXPECTED[which]:
        raise DataError(f"split: {split!r}, {which} has {', '.join(EXPECTED[which])}")
    root = require(Path(root), expected="the folder of refcoco, refcoco+ and refcocog")
    folder = require(root, which, expected="the folder of refs(...).json and instances.json")
    images = Path(images) if images is not None else root / "train2014"
    require(images, expected="COCO's images, train2014")
    path = folder / f"refs({SPLIT_BY[which]}).json"
    if not path.exists() and path.with_suffix(".p").exists():
        pickled = path.with_suffix(".p")
        raise DataError(
            f"{path}: is not there; make it of {pickled.name}, which is not unpickled, with\n  python -c 'from "
            f'omnistream_jax.data.readers.refcoco import convert_refs; convert_refs("{pickled}")\''
        )
    references = read_json(require(path, expected="the references, converted to JSON"))
    records = _sentences(references, split, path)
    boxes = _boxes(require(folder, "instances.json", expected="COCO's objects"))
    used = {target: boxes[target] for target in {record[3] for record in records} if target in boxes}
    return RefCoco(f"{which} ({split})", str(images), records, used, EXPECTED[which])


def convert_refs(source: str | os.PathLike, target: str | os.PathLike | None = None) -> int:
    """Turns a published pickle of references into JSON without unpickling it.

    Args:
      source: refs(unc).p or another.
      target: where the JSON goes; None: beside it. It is written aside and renamed.

    Returns:
      How many references there are.

    Raises:
      DataError: the file is no pickle, holds more than plain values, or these are no references.
    """
    source = Path(source)
    target = source.with_suffix(".json") if target is None else Path(target)
    references = read_plain_pickle(source)
    _sentences(references, "", source)
    with reading(target, "a place where it can be written"):
        write_json(target, references, indent=None)
    return len(references)


def _sentences(references: Any, split: str, path: Path) -> tuple[tuple[int, int, Any, int], ...]:
    """The records of a split. Empty sentences are kept: reading them is the error that is counted."""
    records = []
    if not isinstance(references, list):
        raise DataError(f"{path}: is a {type(references).__name__}, expected a list of references")
    for number, reference in enumerate(references):
        try:
            found = reference["split"] == split
            identity, target, sentences = reference["ref_id"], reference["ann_id"], reference["sentences"]
            texts = [sentence["sent"] for sentence in sentences]
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{path}, reference {number}: expected ref_id, ann_id, split and sentences with sent ({error!r})"
            ) from None
        if found:
            records += [(identity, place, text, target) for place, text in enumerate(texts)]
    if split and not records:
        raise DataError(f"{path}: holds no reference of the split {split}")
    return tuple(records)


def _boxes(path: Path) -> dict[int, tuple[str, float, float, Any]]:
    table = read_json(path)
    with reading(path, "COCO's images and annotations"):
        images = {image["id"]: (image["file_name"], image["width"], image["height"]) for image in table["images"]}
        for file, _, _ in images.values():
            if os.path.basename(file) != file:
                raise ValueError(f"the image's name {file!r} is a path")
        return {each["id"]: (*images[each["image_id"]], each["bbox"]) for each in table["annotations"]}


def _shares(box: Any, width: float, height: float, where: str) -> tuple[float, float, float, float]:
    """Corners as shares of the image, of a box (x, y, width, height) in pixels."""
    try:
        x, y, box_width, box_height = box
        return x / width, y / height, (x + box_width) / width, (y + box_height) / height
    except (TypeError, ValueError, ZeroDivisionError):
        raise DataError(
            f"{where}: its box is {box!r} in {width!r} x {height!r}, expected x, y, width, height", reason="box is none"
        ) from None
