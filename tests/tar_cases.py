"""Tars as img2dataset and others write them, through the standard library alone."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

from omnistream_jax.data.embedded import embedded_files


def photograph(name: str) -> bytes:
    """The file of an embedded photograph."""
    files = [*embedded_files("images", "train"), *embedded_files("images", "heldout")]
    return next(file for file in files if file.stem == name).read_bytes()


def video(name: str) -> bytes:
    """The file of an embedded video."""
    files = [*embedded_files("videos", "train"), *embedded_files("videos", "heldout")]
    return next(file for file in files if file.stem == name).read_bytes()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shard(path: Path, names: dict[str, str], rows: dict[str, dict] | None = None, beside: bool = False) -> Path:
    """A shard as img2dataset leaves it.

    Args:
      path: the tar.
      names: key of each record -> embedded photograph.
      rows: key -> further fields of its JSON.
      beside: also the Parquet table beside the tar, with one more row whose download failed.
    """
    files = {}
    rows = rows or {}
    for key, name in names.items():
        row = {"key": key, "status": "success", "caption": f"a picture of {name}", **rows.get(key, {})}
        files |= {f"{key}.jpg": photograph(name), f"{key}.json": json.dumps(row).encode(), f"{key}.txt": b"caption"}
    if beside:
        extra = {column: [rows[key][column] for key in names] for column in next(iter(rows.values()))}
        columns = {"key": [*names, "999999999"], **{column: [*each, None] for column, each in extra.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
    return write_tar(path, files)
