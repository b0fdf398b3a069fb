"""The files of JSON beside prepared shards, and the check of shards against them; `shards.py` says which there are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.worker_pool import map_in_processes

FORMAT = 1
INDEX, SETTINGS = "index.json", "settings.json"


def read_index(output: Path) -> dict[str, Any]:
    """The index of prepared shards. Raises DataError where there is none, or one of another version."""
    path = Path(output) / INDEX
    if not path.exists():
        began = (Path(output) / SETTINGS).exists()
        why = "its preparation has not come to its end: run it again" if began else f"expected {INDEX} of data.prepare"
        raise DataError(f"{path}: there is no such file; {why}")
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: expected an index of format {FORMAT}, as data.prepare writes it")
    return index


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
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, sort_keys=True, indent=None if path.name == INDEX else 1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
