"""Parquet tables of annotations, and how their rows find their images in tars.

Parquet is made for reading in order: one row costs the decoding of its whole row group, two seconds for one of
100,000 rows of 4 kB. The groups last read are kept (CACHE_BYTES in each process): tables up to that size, and tables
read in order, are quick; larger ones drawn from at random are not.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.files import reading
from omnistream_jax.data.readers.webdataset import TarRecords

CACHE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetRows:
    """The rows of some Parquet files, one after another. Made by `open_parquet`.

    Attributes:
      paths: the files.
      columns: what `row` reads.
      groups: int64 [G, 2], the file and the number there of each row group.
      starts: int64 [G + 1], the first row of each row group, and the number of rows.
    """

    paths: tuple[str, ...]
    columns: tuple[str, ...]
    groups: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def describe(self, index: int) -> str:
        """The file and the row's 0-based number in it."""
        file, first = self._file_of(index)
        return f"{self.paths[file]}, row {index - first}"

    def row(self, index: int) -> dict[str, Any]:
        """The values of `columns` in one row."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, number = (int(value) for value in self.groups[group])
        table = _CACHE.row_group(self.paths[file], number, self.columns)
        return table.slice(index - int(self.starts[group]), 1).to_pylist()[0]

    def ids(self, column: str) -> np.ndarray:
        """A column of whole numbers or of ASCII text as bytes [rows]; b"" where it is empty."""
        parts = [np.zeros(0, "S1")]
        for path in self.paths:
            with reading(path, f"a Parquet file with a column {column!r}"):
                parts.append(_as_bytes(pyarrow.parquet.read_table(path, columns=[column]).column(column)))
        return np.concatenate(parts)

    def _file_of(self, index: int) -> tuple[int, int]:
        """The file that a row lies in, and the row with which it begins."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file = int(self.groups[group, 0])
        return file, int(self.starts[np.searchsorted(self.groups[:, 0], file)])


def open_parquet(paths: Sequence[str | Path], columns: Sequence[str], ids: Sequence[str] = ()) -> ParquetRows:
    """Opens Parquet files by their footers alone.

    Args:
      paths: the files.
      columns: what rows are made of.
      ids: further columns that must be there.

    Raises:
      DataError: a file is no Parquet, or lacks a column; the message names both.
    """
    groups, sizes = [], []
    for number, path in enumerate(paths):
        with reading(path, "a Parquet file"):
            footer = pyarrow.parquet.read_metadata(path)
            names = footer.schema.to_arrow_schema().names
            counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        for column in (*columns, *ids):
            if column not in names:
                raise DataError(f"{path}: has no column {column!r}, only {', '.join(names)}")
        groups += [(number, group) for group in range(len(counts))]
        sizes += counts
    return ParquetRows(
        paths=tuple(str(path) for path in paths),
        columns=tuple(columns),
        groups=np.array(groups, np.int64).reshape(-1, 2),
        starts=np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]).astype(np.int64),
    )


def record_ids(records: TarRecords, column: str) -> np.ndarray:
    """A column that img2dataset kept beside the images (--save_additional_columns), as bytes [records].

    It is read from the table that img2dataset writes beside each tar (00000.parquet by 00000.tar), else from each
    record's JSON, which reads all of them.

    Raises:
      DataError: the column is in neither.
    """
    bounds = np.searchsorted(records.tar, np.arange(len(records.tars) + 1))
    parts = [np.zeros(0, "S1")]
    for number, tar in enumerate(records.tars):
        indices = range(bounds[number], bounds[number + 1])
        beside = Path(tar).with_suffix(".parquet")
        found = _ids_beside(beside, records, indices, column) if beside.exists() else None
        parts.append(_ids_inside(records, indices, column) if found is None else found)
    return np.concatenate(parts)


def match(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """int64 [wanted]: where each of the wanted ids (bytes) lies among the found ones; -1 where it does not."""
    if not len(found):
        return np.full(len(wanted), -1)
    order = np.argsort(found, kind="stable")
    ranked = found[order]
    place = np.minimum(np.searchsorted(ranked, wanted), len(found) - 1)
    return np.where((ranked[place] == wanted) & (wanted != b""), order[place], -1)


def _ids_beside(path: Path, records: TarRecords, indices: range, column: str) -> np.ndarray | None:
    """From the table beside a tar; None where it lacks the column."""
    with reading(path, "the Parquet file that img2dataset writes beside a tar"):
        if column not in pyarrow.parquet.read_schema(path).names:
            return None
        table = pyarrow.parquet.read_table(path, columns=["key", column])
        keys, values = (_as_bytes(table.column(name)) for name in ("key", column))
    place = match(records.keys[indices.start : indices.stop], keys)
    return np.where(place >= 0, values[place], b"")


def _ids_inside(records: TarRecords, indices: range, column: str) -> np.ndarray:
    values = []
    for index in indices:
        row = records.read_json(index)
        if column not in row:
            raise DataError(
                f"{records.describe(index)}: its JSON has no {column!r}, and there is no Parquet file with it beside "
                f"the tar; download with img2dataset --save_additional_columns '[\"{column}\"]'"
            )
        values.append(str(row[column]).encode())
    return np.array(values, "S") if values else np.zeros(0, "S1")


def _as_bytes(column: pyarrow.ChunkedArray) -> np.ndarray:
    if not (pyarrow.types.is_integer(column.type) or _is_text(column.type)):
        raise ValueError(f"it has type {column.type}, expected whole numbers or text")
    texts = column.cast(pyarrow.string()).fill_null("").to_numpy()
    return texts.astype("S") if len(texts) else np.zeros(0, "S1")


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


class _RowGroups:
    """Row groups of this process, the last used kept up to CACHE_BYTES (at least one)."""

    def __init__(self):
        self._tables: collections.OrderedDict[tuple, pyarrow.Table] = collections.OrderedDict()

    def row_group(self, path: str, number: int, columns: tuple[str, ...]) -> pyarrow.Table:
        key = path, number, columns
        if key not in self._tables:
            with reading(path, "a Parquet file"):
                self._tables[key] = _open_file(path).read_row_group(number, columns=list(columns), use_threads=False)
        self._tables.move_to_end(key)
        while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > CACHE_BYTES:
            self._tables.popitem(last=False)
        return self._tables[key]


@functools.lru_cache(maxsize=64)
def _open_file(path: str) -> pyarrow.parquet.ParquetFile:
    return pyarrow.parquet.ParquetFile(path)


_CACHE = _RowGroups()
