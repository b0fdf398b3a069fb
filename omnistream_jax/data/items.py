"""What a batch job works through: the videos and image folders of a folder tree or of a text list."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.sources import IMAGE_SUFFIXES, LIST_SUFFIX, VIDEO_SUFFIXES

STREAM_SUFFIXES = (*VIDEO_SUFFIXES, ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv", ".gif")
"""Files of a folder tree that are taken for videos; PyAV reads many more, which a text list may name."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One stream of frames.

    Attributes:
      name: its path relative to the input, with "/"; unique in the input.
      path: where it lies.
      kind: "video", one file; or "images", the pictures that lie directly in one folder, in the order of their names.
    """

    name: str
    path: str
    kind: Literal["video", "images"]


def list_items(source: str | os.PathLike) -> tuple[Item, ...]:
    """The items of an input, sorted by name.

    Args:
      source: a folder: every file in the tree with a suffix of STREAM_SUFFIXES is an item, and so is every folder that
        directly holds pictures; what begins with a dot is left out. Or a text list (.txt) that names one video file or
        one folder of pictures a line, relative to the list's folder. Or one video file.

    Raises:
      DataError: nothing is there, or nothing that could be an item; a list names an item twice.
    """
    path = Path(source)
    expected = f"expected a folder with videos or pictures, a {LIST_SUFFIX} list of them, or one video file"
    if not os.fspath(source) or not path.exists():
        raise DataError(f"input {os.fspath(source)!r}: there is no such file or folder; {expected}")
    if path.is_dir():
        items = list(_walk(path))
    elif path.suffix.lower() == LIST_SUFFIX:
        items = _read_list(path, expected)
    else:
        items = [Item(path.name, str(path), "video")]
    if not items:
        raise DataError(f"input {path}: holds no video and no picture; {expected}")
    return tuple(sorted(items, key=lambda item: item.name))


def image_files(folder: str | os.PathLike) -> list[str]:
    """Paths of the pictures directly in a folder by name, numbers in names by their value: 2.png before 10.png.

    Raises:
      DataError: the folder cannot be read, or holds no picture.
    """
    try:
        names = [name for name in os.listdir(folder) if _is_image(name)]
    except OSError as error:
        raise DataError(f"{os.fspath(folder)}: cannot be read as a folder of pictures ({error.strerror})") from error
    if not names:
        raise DataError(f"{os.fspath(folder)}: holds no picture ({' '.join(IMAGE_SUFFIXES)})")
    return [os.path.join(folder, name) for name in sorted(names, key=_by_numbers)]


def source_bytes(item: Item) -> int:
    """Bytes of an item's files; 0 where they cannot be read. Tells whether a source was exchanged."""
    try:
        files = image_files(item.path) if item.kind == "images" else [item.path]
        return sum(os.path.getsize(file) for file in files)
    except (OSError, DataError):
        return 0


def printable(text: str) -> str:
    """The text with bytes that are no UTF-8 (file names may hold any) spelt out as \\udcNN."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _by_numbers(name: str) -> tuple:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def _walk(root: Path) -> Iterator[Item]:
    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(root, followlinks=True, onerror=stop):
        above = {os.path.realpath(folder) for folder in (parent, *_folders_above(parent, root))}
        # A link that leads back to a folder above would never end.
        folders[:] = [
            folder
            for folder in folders
            if not folder.startswith(".") and os.path.realpath(os.path.join(parent, folder)) not in above
        ]
        for name in names:
            if name.lower().endswith(STREAM_SUFFIXES) and not name.startswith("."):
                path = os.path.join(parent, name)
                yield Item(printable(Path(path).relative_to(root).as_posix()), path, "video")
        if any(_is_image(name) for name in names):
            relative = Path(parent).relative_to(root).as_posix()
            own = root.resolve().name or "root"
            # The root's own pictures bear its name; the second form stays apart from a folder of that name in it.
            name = relative if relative != "." else (own if own not in folders else f"./{own}")
            yield Item(printable(name), parent, "images")


def _folders_above(folder: str, root: Path) -> list[str]:
    relative = Path(folder).relative_to(root)
    return [str(root / above) for above in relative.parents]


def _read_list(path: Path, expected: str) -> list[Item]:
    """Items of a text list. The files are not looked for here: one that is missing fails alone."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"input {path}: cannot be read as a text list ({error}); {expected}") from error
    items: dict[str, tuple[int, Item]] = {}
    for number, line in enumerate(lines, start=1):
        if not (entry := line.strip()):
            continue
        name, target = Path(entry).as_posix(), os.path.join(path.parent, entry)
        if name in items:
            raise DataError(f"input {path}, line {number}: {entry!r} stands in line {items[name][0]} already")
        items[name] = number, Item(name, target, "images" if os.path.isdir(target) else "video")
    return [item for _, item in items.values()]
