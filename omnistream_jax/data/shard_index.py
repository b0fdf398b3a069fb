"""Prepared shards as they lie in their folder: the index, the check against it, and reading a record.

`shard_output.py` says which files there are.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.worker_pool import map_in_processes
from omnistream_jax.utils import files

FORMAT = 1
INDEX, SETTINGS = "index.json", "settings.json"
POSED, VIDEOS, IMAGES, CAPTIONS = "posed", "videos", "images", "captions"
PREPARED = {POSED: "prepared", VIDEOS: "prepared_videos", IMAGES: "prepared_images", CAPTIONS: "prepared_captions"}
"""kind -> the name under which the registry has its shards."""

_OPEN_SHARDS = 64  # of a process; each is an open file


def read_index(output: Path, kind: str | None = None) -> dict[str, Any]:
    """The index of prepared shards.

    Args:
      output: the folder that was the output of the preparation.
      kind: one of PREPARED; None takes any.

    Raises:
      DataError: there is no index, or one of another version or kind.
    """
    path = Path(output) / INDEX
    if not path.exists():
        began = (Path(output) / SETTINGS).exists()
        why = "its preparation has not come to its end: run it again" if began else f"expected {INDEX} of data.prepare"
        raise DataError(f"{path}: there is no such file; {why}")
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: expected an index of format {FORMAT}, as data.prepare writes it")
    if kind is not None and index.get("kind") != kind:
        name = PREPARED.get(index.get("kind"))
        other = f"; open it as dataset {name}" if name else ""
        raise DataError(f"{path}: is of the kind {index.get('kind')!r}, expected {kind!r}{other}")
    return index


def open_index(root: Path, split: str, kind: str) -> tuple[dict[str, Any], tuple[tuple[str, int], ...]]:
    """The index of finished shards, and (file, records) of each.

    Raises:
      DataError: there is none, of that split and kind, or a shard is missing.
    """
    index = read_index(root, kind)
    if index["split"] != split:
        raise DataError(f"{root}: holds the split {index['split']!r} of {index['dataset']}, {split!r} was asked for")
    shards = tuple((shard["file"], shard["records"]) for shard in index["shards"])
    missing = [file for file, _ in shards if not (root / file).is_file()]
    if missing:
        raise DataError(f"{root / missing[0]}: there is no such file; the index names {len(missing)} that are missing")
    return index, shards


@dataclasses.dataclass(frozen=True, eq=False)
class ShardRecords:
    """The records of finished shards, numbered over all of them. A shard is opened when one of it is first read.

    Attributes:
      root: the folder that was the output of the preparation.
      shards: (file, records) of each.
    """

    root: Path
    shards: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return sum(count for _, count in self.shards)

    def place(self, index: int) -> tuple[str, int, int]:
        """The shard that holds a record, how many records it has, and which of them it is."""
        index = range(len(self))[index]  # an IndexError beyond the end
        shard = bisect.bisect_right(self._ends, index)
        file, count = self.shards[shard]
        return str(self.root / file), count, index - (self._ends[shard] - count)

    def describe(self, index: int) -> str:
        """For messages."""
        path, _, position = self.place(index)
        return f"{path}, record {position}"

    def read(self, index: int) -> bytes:
        """A record. Raises DataError where its shard is damaged."""
        return read_record(*self.place(index))

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        """Of each shard, the index after its last record."""
        return tuple(itertools.accumulate(count for _, count in self.shards))


def read_record(path: str, count: int, position: int) -> bytes:
    """A record of a shard, which is opened when its first one is read. Raises DataError where it is damaged.

    Args:
      path: of the shard.
      count: how many records it has.
      position: which of them.
    """
    try:
        return _open(path, count)[position]
    except Exception as error:  # ArrayRecord's are of several types
        raise DataError(f"{path}: record {position} cannot be read ({error})", reason="shard is damaged") from error


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _open(path: str, count: int) -> ArrayRecordDataSource:
    return ArrayRecordDataSource([f"{path}[0:{count}]"])  # with their number told, the file is opened only to read


def check_shards(output: Path, workers: int = 1) -> list[str]:
    """Holds every shard against the size and sha256 that the index has of it.

    Returns:
      One message for each that differs.

    Raises:
      DataError: there is no index, or it cannot be read.
    """
    shards = read_index(output)["shards"]
    found = dict(map_in_processes(_CheckShard(Path(output), tuple(shards)), range(len(shards)), workers))
    return [found[number] for number in sorted(found) if found[number]]


@dataclasses.dataclass(frozen=True)
class _CheckShard:
    output: Path
    shards: tuple[dict[str, Any], ...]

    def __call__(self, number: int) -> str | None:
        shard = self.shards[number]
        path = self.output / shard["file"]
        if not path.exists():
            return f"{path}: there is no such file"
        if path.stat().st_size != shard["bytes"]:
            return f"{path}: has {path.stat().st_size} bytes, expected {shard['bytes']}"
        return None if sha256(path) == shard["sha256"] else f"{path}: its sha256 is not that of the index"


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The value of a file that `write_json` wrote. Raises DataError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: expected JSON as data.prepare writes it ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a file aside, waits until the disk has it, and renames it. Equal values give equal bytes."""
    files.write_json(path, value, indent=None if path.name == INDEX else 1, sort_keys=True, durable=True)
