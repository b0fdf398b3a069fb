"""Finding the folders and files of a benchmark; each function says what was expected where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from omnistream_jax.data.errors import DataError


def first_with(root: Path, folders: Sequence[str], names: Iterable[str], expected: str) -> Path:
    """The first of root's `folders` ("" is root itself) in which one of `names` lies.

    Raises:
      DataError: there is none; the message names root and what was expected there.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; expected {expected}", reason="folder is missing")
    names = list(names)
    for folder in folders:
        if any((root / folder / name).exists() for name in names):
            return root / folder
    raise DataError(f"{root}: holds no {expected}", reason="layout is another")


def files_of(folder: Path, suffix: str, key: Callable[[Path], Any] | None = None) -> list[Path]:
    """The files of a folder with a suffix, sorted by name or by `key`; hidden ones (._frame_0001.png) are none."""
    return sorted((path for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")), key=key)


def partners(paths: Sequence[Path], folder: Path, suffix: str, what: str) -> list[Path]:
    """The file of each path's stem in another folder.

    Raises:
      DataError: one is missing; the message names it, and says of what file it should have been the `what`.
    """
    found = [folder / f"{path.stem}{suffix}" for path in paths]
    for path, partner in zip(paths, found, strict=True):
        if not partner.is_file():
            raise DataError(
                f"{partner}: there is no such file; expected the {what} of {path}", reason="file is missing"
            )
    return found
