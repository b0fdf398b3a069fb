"""File formats that data sets store; each function gives one DataError that names the file. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
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
        raise DataError(f"{path}: there is no such file; expected {expected}") from None
    except Exception as error:  # decoders raise what they like
        raise DataError(f"{path}: expected {expected}, but reading it failed ({error})") from error


def read_png16(path: str | Path) -> np.ndarray:
    """uint16 [H, W] of a 16-bit PNG."""
    with reading(path, "a 16-bit PNG of one channel"), Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are allowed")
        if not image.mode.startswith("I"):
            raise ValueError(f"it has mode {image.mode}")
        return np.asarray(image).astype(np.uint16)


def read_json(path: str | Path) -> Any:
    """The value of a JSON file, gzipped where its name ends with .gz or .jgz."""
    with reading(path, "a JSON file"):
        opener = gzip.open if str(path).endswith(("gz",)) else open
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)


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
