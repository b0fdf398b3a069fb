"""Writes safetensors files: whole ones, and such whose tensors grow along their first axis without lying in memory."""

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omnistream_jax.utils.files import written_aside

_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file that whoever may read other new files may read, too.

    `save_file` lets its owner alone read it, and `save` would hold all tensors in memory once more.

    Args:
        path: of the file, in a folder that exists.
        tensors: by name.
        metadata: text by name.
    """
    path = Path(path)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


class TensorFileWriter:
    """Collects rows of named tensors in a scratch folder, and joins them into one safetensors file at the end.

    A header in front names every tensor's length, which is known last: so each tensor grows in a file of its own, and
    `finish` copies them behind the header. The disk holds a file twice for that moment.

    Args:
        folder: for scratch, on the file system of the final file; emptied first, removed in the end.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._tensors: dict[str, tuple[np.dtype, tuple[int, ...], Path]] = {}
        self._rows: dict[str, int] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Adds rows [n, ...] to a tensor; later rows have the shape and type of the first (ValueError if not)."""
        known = self._tensors.setdefault(name, (rows.dtype, rows.shape[1:], self._folder / str(len(self._tensors))))
        if known[:2] != (rows.dtype, rows.shape[1:]) or rows.dtype.name not in _CODES:
            raise ValueError(f"{name}: rows of {rows.dtype}{list(rows.shape[1:])}, expected {known[0]}{list(known[1])}")
        with known[2].open("ab") as file:
            file.write(rows.tobytes())
        self._rows[name] = self._rows.get(name, 0) + len(rows)

    def finish(self, path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
        """Writes the file aside, then renames it to `path`; the same rows and metadata give the same bytes."""
        # The widest types first, so that every tensor is aligned to its elements.
        names = sorted(self._tensors, key=lambda name: (-self._tensors[name][0].itemsize, name))
        header, offset = {"__metadata__": dict(sorted(metadata.items()))}, 0
        for name in names:
            dtype, shape, file = self._tensors[name]
            end = offset + file.stat().st_size
            header[name] = {
                "dtype": _CODES[dtype.name],
                "shape": [self._rows[name], *shape],
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        aside = self._folder / "joined"
        with written_aside(path, aside, durable=True), aside.open("wb") as joined:
            joined.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                with self._tensors[name][2].open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)
        self.discard()

    def discard(self) -> None:
        """Removes the scratch folder and what was collected."""
        shutil.rmtree(self._folder, ignore_errors=True)


def read_metadata(path: str | os.PathLike) -> dict[str, str] | None:
    """The metadata of a safetensors file, {} if it has none; None where there is no whole file of that kind."""
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return None
