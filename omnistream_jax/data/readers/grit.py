"""GRIT (Peng et al. 2023, Kosmos-2; Hub zzliang/GRIT): captions whose phrases have boxes, over images from the web.

    grit-20m/coyo_{0..20}_snappy.parquet    id, url, caption, width, height, noun_chunks, ref_exps, clip_similarity_*
    images/00000.tar                        img2dataset's, with --save_additional_columns '["id", "ref_exps", ...]'
    images/00000.parquet                    written by img2dataset beside each tar: key, id, ...

noun_chunks and ref_exps are lists of [first character, the one after the last, x1, y1, x2, y2, score] with boxes in
shares of width and height; ref_exps stretch noun chunks to whole expressions ("a dog" -> "a dog in a field"). The
fields agree with two public readers; the join has not been tried on the real files.

The data set's own download command keeps the annotations, so that each record's JSON has them: then grit-20m is not
needed, and reading is much quicker without it (readers/annotated.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.annotated import AnnotatedImages, open_annotated
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.captions import Prompt, grounded_prompt

EXPECTED = {"train": 20_471_550}
"""Pairs that are published [from memory]; many images are gone from the net."""

PHRASES = ("ref_exps", "noun_chunks")


@dataclasses.dataclass(frozen=True, eq=False)
class Grit(AnnotatedImages):
    """Captions with boxes. Made by `open_grit`.

    Attributes:
      phrases: which column says where phrases lie.
    """

    phrases: str = PHRASES[0]
    EXPECTED: ClassVar[Mapping[str, int]] = EXPECTED

    def prompt(self, row: dict[str, Any], where: str) -> Prompt:
        """The caption with the boxes of its phrases."""
        return grounded_prompt(row.get("caption"), _spans(row.get(self.phrases), self.phrases, where), where)


def open_grit(
    root: str | os.PathLike,
    split: str = "train",
    images: str | os.PathLike | None = None,
    phrases: str = PHRASES[0],
) -> Grit:
    """GRIT's captions whose images were downloaded.

    Args:
      root: the folder of images and, if they are needed, of the Parquet files in grit-20m.
      split: "train": there is no other.
      images: the folder of img2dataset's tars; None: root / "images".
      phrases: "ref_exps" or "noun_chunks".

    Raises:
      DataError: the layout is another, or not one image belongs to an annotation.
    """
    if split != "train":
        raise DataError(f"split: {split!r}, expected train: GRIT has no other")
    if phrases not in PHRASES:
        raise DataError(f"phrases: {phrases!r}, expected {' or '.join(PHRASES)}")
    root = require(Path(root), expected="the folder of GRIT")
    folder = Path(images) if images is not None else require(root, "images", expected="img2dataset's folder of tars")
    tables = sorted((root / "grit-20m").glob("*.parquet"))
    if not tables and (root / "grit-20m").is_dir():
        raise DataError(f"{root / 'grit-20m'}: holds no .parquet file; expected GRIT's coyo_0_snappy.parquet")
    return Grit("grit", *open_annotated(folder, tables, ("caption", phrases), "id"), phrases)


def _spans(value: Any, column: str, where: str) -> Sequence[tuple[int, int, Sequence[float]]]:
    """(first, after the last, box) of a list of seven numbers each; img2dataset may have written it as text."""
    try:
        rows = json.loads(value) if isinstance(value, str) else value
        return [(row[0], row[1], row[2:6]) for row in ([float(number) for number in each] for each in rows)]
    except (TypeError, ValueError, IndexError):
        raise DataError(
            f"{where}: its {column} is {value!r:.200}, expected a list of [first, last, x1, y1, x2, y2, score]",
            reason="phrases cannot be read",
        ) from None
