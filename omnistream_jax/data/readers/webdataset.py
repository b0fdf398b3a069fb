"""WebDataset tars (as img2dataset and PE-Video write them): random access to the files of their records.

A record is the regular files of one tar whose names agree up to the first dot of the file name: 000012.jpg,
000012.txt and 000012.json. Tars are uncompressed. Nothing is ever unpacked: files are read where they lie.

The index is made when a source is opened, by reading the headers and skipping the bodies, and is kept in memory; no
file is written. It takes about 25 microseconds a file in the tars (75 seconds for a million records of three files,
when the disk keeps up) and 16 bytes a record and part plus the record's name, in every data worker. A tar with
millions of records, or thousands of tars, is a matter of minutes to hours: open a part of them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.files import reading

MAX_BYTES = 1 << 28
"""Largest file of a record that is read whole; videos are read piece by piece."""


@dataclasses.dataclass(frozen=True, eq=False)
class TarRecords:
    """The records of some tars, in the order of the tars and of their files. Made by `index_tars`.

    Attributes:
      tars: paths.
      parts: names of a record's files, such as "image" and "json".
      tar: uint32 [N], which tar each record lies in, ascending.
      keys: bytes [N], the records' names.
      offsets: int64 [N, parts], where each file begins in its tar; -1: the record has none.
      sizes: int64 [N, parts], bytes.
    """

    tars: tuple[str, ...]
    parts: tuple[str, ...]
    tar: np.ndarray
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.tar)

    def describe(self, index: int) -> str:
        """The tar's path and the record's name, with a colon between them."""
        return f"{self.tars[self.tar[index]]}:{self.key(index)}"

    def key(self, index: int) -> str:
        """The record's name."""
        return bytes(self.keys[index]).decode("utf-8", "surrogateescape")

    def take(self, indices: np.ndarray) -> TarRecords:
        """Only these records; `indices` ascend."""
        return dataclasses.replace(
            self,
            tar=self.tar[indices],
            keys=self.keys[indices],
            offsets=self.offsets[indices],
            sizes=self.sizes[indices],
        )

    def open(self, index: int, part: str) -> BinaryIO:
        """One file of a record, to read and seek in; close it.

        Raises:
          DataError: the record has no such file, or the tar is gone.
        """
        column = self.parts.index(part)
        offset, size = int(self.offsets[index, column]), int(self.sizes[index, column])
        if offset < 0:
            raise DataError(f"{self.describe(index)}: has no {part} file")
        path = self.tars[self.tar[index]]
        with reading(path, "the tar that was indexed"):
            return io.BufferedReader(_Window(open(path, "rb", buffering=0), offset, size))

    def read(self, index: int, part: str) -> bytes:
        """The bytes of one file of a record.

        Raises:
          DataError: the record has no such file, it is larger than MAX_BYTES, or it was cut off since.
        """
        size = int(self.sizes[index, self.parts.index(part)])
        if size > MAX_BYTES:
            raise DataError(f"{self.describe(index)}: its {part} file has {size:,} bytes, at most {MAX_BYTES:,}")
        with self.open(index, part) as file:
            data = file.read()
        if len(data) != size:
            raise DataError(f"{self.describe(index)}: {len(data):,} bytes of its {part} file are there, not {size:,}")
        return data

    def read_json(self, index: int, part: str = "json") -> dict[str, Any]:
        """The JSON object in one file of a record. Raises DataError if it is another thing."""
        data = self.read(index, part)
        with reading(self.describe(index), f"a JSON object as its {part} file"):
            value = json.loads(data)
            if not isinstance(value, dict):
                raise ValueError(f"it is a {type(value).__name__}")
            return value


def index_tars(tars: Sequence[str | Path], parts: Mapping[str, Sequence[str]], required: str) -> TarRecords:
    """Finds the records of some tars without reading their contents.

    Args:
      tars: paths.
      parts: the files of a record that count: name -> suffixes in lower case, such as {"image": (".jpg", ".png")}.
      required: the part without which a record is left out.

    Raises:
      DataError: a tar is missing, compressed, damaged or cut off, holds a link or a name that leads out of it, or has
        two files for one part of a record.
    """
    suffixes = {suffix: column for column, names in enumerate(parts.values()) for suffix in names}
    needed = list(parts).index(required)
    tables = [_index_tar(Path(path), suffixes, len(parts), needed) for path in tars]
    keys, places = zip(*tables, strict=True) if tables else ((), ())
    numbers = np.repeat(np.arange(len(tables), dtype=np.uint32), [len(table) for table in keys])
    joined = np.concatenate([np.zeros((0, len(parts), 2), np.int64), *places])
    return TarRecords(
        tars=tuple(str(path) for path in tars),
        parts=tuple(parts),
        tar=numbers,
        keys=np.concatenate([np.zeros(0, "S1"), *keys]),
        offsets=np.ascontiguousarray(joined[..., 0]),
        sizes=np.ascontiguousarray(joined[..., 1]),
    )


def find_tars(folder: Path, expected: str) -> list[Path]:
    """The tars directly in a folder, sorted by name. Raises DataError, saying what was expected, if there are none."""
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise DataError(f"{folder}: holds no .tar file; expected {expected}")
    return tars


def _index_tar(path: Path, suffixes: Mapping[str, int], parts: int, needed: int) -> tuple[np.ndarray, np.ndarray]:
    """Names [n] of the records of one tar, and offset and size [n, parts, 2] of their files."""
    records: dict[str, list[tuple[int, int]]] = {}
    with reading(path, "a whole tar file that is not compressed"), tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isdir():
                continue
            key, suffix = _split_name(path, member)
            column = suffixes.get(suffix)
            if column is None:
                continue
            places = records.setdefault(key, [(-1, 0)] * parts)
            if places[column][0] >= 0:
                raise DataError(f"{path}: record {key!r} has two files for one part, {suffix} being the second")
            places[column] = member.offset_data, member.size
        _check_end(tar)
    whole = {key: places for key, places in records.items() if places[needed][0] >= 0}
    names = [key.encode("utf-8", "surrogateescape") for key in whole]
    places = np.array(list(whole.values()), np.int64).reshape(len(whole), parts, 2)
    return np.array(names, "S") if names else np.zeros(0, "S1"), places


def _split_name(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    """A record's name, and the suffix of its file in lower case; "" for files that begin with a dot."""
    if not member.isreg() or member.sparse is not None:
        raise DataError(f"{path}: {member.name!r} is a link or a special file; expected regular files only")
    name = posixpath.normpath(member.name)
    if name.startswith(("/", "../")) or name == "..":
        raise DataError(f"{path}: the name {member.name!r} leads out of the archive")
    folder, file = posixpath.split(name)
    stem, dot, suffix = file.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower() if stem else ""


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end of the tar; the true end is a block of zeros or of the file."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged")


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.RawIOBase, start: int, size: int):
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"seeking to {base + offset}, before the beginning")
        self._place = base + offset
        return self._place

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._place)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view)
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
