"""BLIP3-OCR-200M (Xue et al. 2024; Hub Salesforce/blip3-ocr-200m): text that PaddleOCR found in images of DataComp-1B.

    {001..050}.parquet    uid, url, key, captions, ...; not needed where the tars' JSON has captions
    images                DataComp's shards (readers/images.py), joined by uid; or img2dataset's of these Parquet files,
                          with --save_additional_columns '["uid", "captions"]': much quicker (readers/annotated.py)

captions is JSON text: a list of {"text", "granularity", "include_datacomp_raw_cap"}. Granularity 5 is read, in the form
without DataComp's own caption, which gives each piece of text and its corners in shares of width and height:

    <ocr>MACK SHOP</ocr><bbox>[0.192, 0.037][0.817, 0.203]</bbox>

(the example of the paper's appendix; the fields agree with a public reader; not tried on the real files).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.annotated import AnnotatedImages, open_annotated
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.captions import Prompt, transcribe_prompt

GRANULARITY = 5
_NUMBER = r"\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*"
_PIECE = re.compile(
    rf"<ocr>(.*?)</ocr>\s*<bbox>\[{_NUMBER},{_NUMBER}\]\s*,?\s*\[{_NUMBER},{_NUMBER}\]</bbox>", re.DOTALL
)


@dataclasses.dataclass(frozen=True, eq=False)
class Blip3Ocr(AnnotatedImages):
    """Images and their text. Made by `open_blip3_ocr`.

    Attributes:
      with_boxes: the answer gives a box with each piece of text.
    """

    with_boxes: bool = True

    def prompt(self, row: dict[str, Any], where: str) -> Prompt:
        """The text in the image."""
        return transcribe_prompt(read_pieces(row.get("captions"), where), where, with_boxes=self.with_boxes)


def open_blip3_ocr(
    root: str | os.PathLike,
    split: str = "train",
    images: str | os.PathLike | None = None,
    with_boxes: bool = True,
) -> Blip3Ocr:
    """The rows of BLIP3-OCR whose images were downloaded.

    Args:
      root: the folder of images and, if they are needed, of the Parquet files.
      split: "train": there is no other.
      images: the folder of tars; None: root / "images".
      with_boxes: answers give the box of each piece of text.

    Raises:
      DataError: the layout is another, or not one image belongs to a row.
    """
    if split != "train":
        raise DataError(f"split: {split!r}, expected train: BLIP3-OCR has no other")
    root = require(Path(root), expected="the folder of BLIP3-OCR")
    folder = Path(images) if images is not None else require(root, "images", expected="the folder of tars")
    tables = sorted(root.glob("*.parquet"))
    return Blip3Ocr("blip3_ocr", *open_annotated(folder, tables, ("captions",), "uid"), with_boxes)


def read_pieces(captions: object, where: str) -> list[tuple[str, tuple[float, ...]]]:
    """The pieces of text of a row's `captions`, each with its box (x1, y1, x2, y2).

    Raises:
      DataError: it is not as published; `where` names the row.
    """
    text = _finest_text(captions, where)
    pieces = [(match[1], tuple(float(number) for number in match.groups()[1:])) for match in _PIECE.finditer(text)]
    if len(pieces) != text.count("<ocr>"):
        raise DataError(
            f"{where}: expected <ocr>TEXT</ocr><bbox>[x1, y1][x2, y2]</bbox> in {text[:200]!r}",
            reason="captions cannot be read",
        )
    return pieces


def _finest_text(captions: object, where: str) -> str:
    try:
        entries = json.loads(captions)
        texts = [
            entry["text"]
            for entry in entries
            if entry["granularity"] == GRANULARITY and not entry["include_datacomp_raw_cap"]
        ]
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError(f"{len(texts)} entries")
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{where}: its captions hold no text of granularity {GRANULARITY} without DataComp's caption ({error})",
            reason="captions cannot be read",
        ) from None
    return texts[0]
