"""Images that img2dataset downloaded, each with the row of annotations that belongs to it.

The row stands in the record's own JSON, where the columns were kept at the download (--save_additional_columns): the
quick form, one small read. Or it stands in the data set's Parquet files and is found by an id: see readers/tables.py
for what that costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.captions import Prompt
from omnistream_jax.data.readers.images import open_img2dataset, read_record_image
from omnistream_jax.data.readers.tables import ParquetRows, match, open_parquet, record_ids
from omnistream_jax.data.readers.webdataset import TarRecords
from omnistream_jax.data.schema import CaptionedImage


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotatedImages:
    """A `CaptionSource` of data/readers/captions.py but for `prompt`, the meaning of a row. Made by `open_annotated`.

    Attributes:
      name: how messages call it.
      records: the images.
      images: int64 [N], the record of each row's image.
      table: the annotations; None: they stand in the records' JSON.
      rows: int64 [N], rows of the table.
    """

    name: str
    records: TarRecords
    images: np.ndarray
    table: ParquetRows | None
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        """The tar's path and the image's name in it."""
        return self.records.describe(self.images[index])

    def read(self, index: int) -> CaptionedImage:
        """Reads one. Raises DataError, naming the row, where it cannot be used."""
        image = int(self.images[index])
        if self.table is None:
            row, where = self.records.read_json(image), self.describe(index)
        else:
            number = int(self.rows[index])
            row, where = self.table.row(number), self.table.describe(number)
        prompt = self.prompt(row, where)
        return prompt.with_image(read_record_image(self.records, image), self.describe(index))

    def prompt(self, row: dict[str, Any], where: str) -> Prompt:
        """What is asked about an image, and the answer. Raises DataError, beginning with `where`, where it is none."""
        raise NotImplementedError


def open_annotated(
    folder: Path, tables: Sequence[Path], columns: Sequence[str], key: str
) -> tuple[TarRecords, np.ndarray, ParquetRows | None, np.ndarray]:
    """Images and the rows that belong to them: `records`, `images`, `table` and `rows` of AnnotatedImages.

    Args:
      folder: of img2dataset's tars.
      tables: the Parquet files; none: the annotations stand in the records' JSON.
      columns: what a row is made of.
      key: the column by which images and rows find each other.

    Raises:
      DataError: the layout is another, or not one image belongs to a row.
    """
    shards, records = open_img2dataset(folder)
    if not len(records):
        raise DataError(f"{shards}: its tars hold no image")
    if not tables:
        first = records.read_json(0)
        if absent := [column for column in columns if column not in first]:
            raise DataError(
                f"{records.describe(0)}: its JSON has no {' and no '.join(map(repr, absent))}, and no Parquet files of "
                f"the data set were found; download with img2dataset --save_additional_columns, or add these files"
            )
        everything = np.arange(len(records))
        return records, everything, None, everything
    table = open_parquet(tables, columns, ids=(key,))
    place = match(table.ids(key), record_ids(records, key))
    rows = np.flatnonzero(place >= 0)
    if not len(rows):
        raise DataError(f"{shards}: none of its {len(records)} images has the {key} of a row in {tables[0].parent}")
    return records, place[rows], table, rows
