"""Files that have their name only when they are whole."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_aside(
    path: str | os.PathLike, aside: str | os.PathLike | None = None, *, durable: bool = False
) -> Iterator[Path]:
    """Where to write a file: it is renamed to `path` at the end of the block, and removed if an exception leaves it.

    So whatever bears the name is whole, an earlier file stays until then, and several processes may write at once.

    Args:
        path: of the file, in a folder that exists; replaced if it exists.
        aside: where to write, on the file system of `path`; None: a hidden name of its own beside it, with its suffix
            and ".tmp" in front of that.
        durable: whether the disk has the content before the name, for machines that stop at any moment.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    temporary = beside if aside is None else Path(aside)
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(
    path: str | os.PathLike, value: Any, *, indent: int | None = 1, sort_keys: bool = False, durable: bool = False
) -> None:
    """Writes JSON and a newline with `written_aside`, whose arguments see; the others are those of `json.dumps`."""
    text = json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n"
    with written_aside(path, durable=durable) as aside:
        aside.write_text(text, encoding="utf-8")
