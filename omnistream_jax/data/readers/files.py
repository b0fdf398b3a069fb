"""File formats that data sets store; each function gives one DataError that names the file. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import MAX_PIXELS


@contextlib.contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Whatever goes wrong inside as a DataError that names the file and what it should have been."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; expected {expected}", reason="file is missing") from None
    except Exception as error:  # decoders raise what they like
        raise DataError(
            f"{path}: expected {expected}, but reading it failed ({error})", reason="file cannot be read"
        ) from error


def read_png16(path: str | Path) -> np.ndarray:
    """uint16 [H, W] of a 16-bit PNG."""
    with reading(path, "a 16-bit PNG of one channel"), Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are allowed")
        if not image.mode.startswith("I"):
            raise ValueError(f"it has mode {image.mode}")
        return np.asarray(image).astype(np.uint16)


def read_json(path: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON file, gzipped where its name ends with .gz or .jgz; `object_hook` as in `json.load`."""
    with reading(path, "a JSON file"):
        opener = gzip.open if str(path).endswith(("gz",)) else open
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file, object_hook=object_hook)


def read_npy(path: str | Path) -> np.ndarray:
    """An array of a .npy file; one that holds pickled objects is refused."""
    with reading(path, "an array in a .npy file"):
        return np.load(path, allow_pickle=False)


def read_numbers(path: str | Path, columns: int | None = None) -> np.ndarray:
    """float64 [rows, columns] of a text file of numbers, with blanks or commas between them; # starts a comment."""
    with reading(path, f"rows of {columns or 'as many'} numbers"):
        lines = [line.split("#")[0].replace(",", " ").split() for line in Path(path).read_text().splitlines()]
        table = np.array([[float(field) for field in line] for line in lines if line])
        if table.ndim != 2 or (columns is not None and table.shape[1] != columns):
            raise ValueError(f"its shape is {table.shape}")
        return table


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty, stripped."""
    with reading(path, "a text file"):
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def need(module: str) -> ModuleType:
    """A package that only some data sets need, imported. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        message = f"this data set needs the package {module}, which is not installed: pip install -e '.[data]'"
        raise DataError(message) from None


def read_hdf5(path: str | Path, key: str) -> np.ndarray:
    """The data set `key` of an HDF5 file."""
    h5py = need("h5py")
    with reading(path, f"an HDF5 file with a data set named {key!r}"), h5py.File(path, "r") as file:
        return file[key][()]


def read_npz(path: str | Path, *keys: str) -> tuple[np.ndarray, ...]:
    """Some arrays of a .npz file, and only those; pickled objects are refused."""
    with reading(path, f"a .npz file with {', '.join(keys)}"), np.load(path, allow_pickle=False) as arrays:
        return tuple(arrays[key] for key in keys)


def read_csv(path: str | Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line, which must name `columns` and may name others."""
    with reading(path, f"a CSV file with the columns {', '.join(columns)}"), open(path, encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return list(rows)


def read_exr(path: str | Path) -> np.ndarray:
    """Float [H, W] of an OpenEXR file of one channel, whatever its name."""
    exr = need("OpenEXR")
    with reading(path, "an OpenEXR file of one channel"), open(path, "rb"):  # which tells a missing file
        low, high = exr.File(str(path), header_only=True).header()["dataWindow"]
        width, height = (int(side) for side in high - low + 1)
        if width * height > MAX_PIXELS:
            raise DataError(f"{path}: {width} x {height} pixels, at most {MAX_PIXELS:,} are allowed")
        channels = exr.File(str(path)).channels()
        if len(channels) != 1:
            raise ValueError(f"it has the channels {', '.join(channels)}")
        return next(iter(channels.values())).pixels


def read_pfm(path: str | Path) -> np.ndarray:
    """float32 [H, W] of a grey portable float map; the file stores the lowest row first."""
    with reading(path, "a portable float map of one channel (Pf)"), open(path, "rb") as file:
        kind, size, scale = (file.readline().split() for _ in range(3))
        width, height = (int(field) for field in size)
        if kind != [b"Pf"] or not 0 < width * height <= MAX_PIXELS:
            raise ValueError(f"its header says {kind} and {width} x {height}")
        order = "<f4" if float(scale[0]) < 0 else ">f4"
        return np.frombuffer(file.read(4 * width * height), order).reshape(height, width)[::-1].astype(np.float32)
