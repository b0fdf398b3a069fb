"""What all preparations share: a folder of ArrayRecord shards that a run which was killed goes on with.

    OUTPUT/settings.json              what the shards depend on; another run with others is refused
    OUTPUT/plan.json                  what goes into them, listed once, each with its "name"; of pictures a digest
    OUTPUT/shards/00000.array_record  records, group_size:1
    OUTPUT/shards/00000.json          what is in it, its sha256, what was skipped and why; written after it
    OUTPUT/index.json                 all of those together; written when all shards are

`shards.py`, `video_shards.py` and `picture_shards.py` say what the records are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.shard_index import FORMAT, INDEX, SETTINGS, read_json, sha256, write_json
from omnistream_jax.data.source_check import NamedSource, Skipped
from omnistream_jax.data.worker_pool import map_in_processes
from omnistream_jax.utils.lock import WorkdirLock
from omnistream_jax.utils.progress import Progress

_PLAN = "plan.json"
_SAY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """Which data set the shards are of; what else they depend on is added by kind.

    Attributes:
      dataset: its name in the registry.
      split: as the data set calls it.
      options: further arguments of its reader.
    """

    dataset: str
    split: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ShardWriter:
    """An ArrayRecord file that counts its records; there is no file before the first."""

    def __init__(self, path: Path):
        self._path, self._file, self.records = path, None, 0

    def write(self, data: bytes) -> None:
        """Appends a record."""
        if self._file is None:
            self._file = ArrayRecordWriter(str(self._path), "group_size:1,uncompressed")  # what is in it is compressed
        self._file.write(data)
        self.records += 1

    def close(self) -> None:
        """Ends the file, and waits until the disk has it."""
        if self._file is not None:
            self._file.close()
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


WriteShard = Callable[[int, ShardWriter, Skipped], tuple[dict[str, Any], int]]
"""(shard, its file, what is skipped) -> what its JSON tells beside the file, and how many frames are in it."""


@contextlib.contextmanager
def opened_output(output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Makes the folder, locks it for the block, removes what a killed run left half written, stores the settings.

    Raises:
      UsageError: the folder holds something else, or shards of other settings.
      WorkdirLockedError: another run works in it.
    """
    _refuse_other_files(output)
    with WorkdirLock(output):
        (output / "shards").mkdir(exist_ok=True)
        for leftover in (*output.glob(".*.tmp*"), *output.glob("shards/.*.tmp*")):
            leftover.unlink(missing_ok=True)
        _remember(output, settings)
        yield


def _refuse_other_files(output: Path) -> None:
    if output.is_dir() and not (output / SETTINGS).exists():
        others = [name for name in sorted(os.listdir(output)) if name != "shards" and not name.startswith(".")]
        if others:
            raise UsageError(f"output: {output} holds other files ({others[0]}), expected a new or empty folder")
    elif output.exists() and not output.is_dir():
        raise UsageError(f"output: {output} is a file, expected a folder")


def _remember(output: Path, settings: Mapping[str, Any]) -> None:
    path, ours = output / SETTINGS, {"format": FORMAT} | json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, ours)
        return
    stored = read_json(path)
    differing = [name for name in sorted(stored.keys() | ours.keys()) if stored.get(name) != ours.get(name)]
    if differing:
        lines = "".join(f"\n  {name}: {stored.get(name)} -> {ours.get(name)}" for name in differing)
        raise UsageError(f"output: {output} holds shards of other settings; use those, or another folder:{lines}")


def kept_plan(
    output: Path, names: Sequence[str], noun: str, make: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """What goes into the shards: as an earlier run listed it, else make(), which is stored.

    Args:
      output: the folder.
      names: of all sequences or videos of the source.
      noun: what messages call them.
      make: gives an entry for each, with its "name".

    Raises:
      UsageError: the earlier run found others.
    """
    path = output / _PLAN
    if not path.exists():
        plan = make()
        write_json(path, plan)
        return plan
    plan = read_json(path)
    if [entry["name"] for entry in plan] != list(names):
        before = {entry["name"] for entry in plan}
        raise UsageError(
            f"output: {output} was begun from a source of {len(plan)} {noun}; "
            f"{len(before - set(names))} of them are gone now, {len(set(names) - before)} are new: "
            "use that source, or another folder"
        )
    return plan


def keep_names(output: Path, names: Iterable[str], labels: Sequence[str], noun: str) -> None:
    """Remembers by their digest what goes into the shards, where it may be millions.

    Args:
      output: the folder.
      names: of all items of the source, in order.
      labels: the names of its classes.
      noun: what messages call the items.

    Raises:
      UsageError: an earlier run found others.
    """
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(json.dumps(name).encode() + b"\n")  # as JSON: a name may hold what UTF-8 cannot
        count += 1
    path, ours = output / _PLAN, {"count": count, "names_sha256": digest.hexdigest(), "labels": list(labels)}
    if not path.exists():
        write_json(path, ours)
        return
    stored = read_json(path)
    if stored != ours:
        what = "labels" if stored.get("names_sha256") == ours["names_sha256"] else "names"
        raise UsageError(
            f"output: {output} was begun from a source of {stored.get('count')} {noun}; there are {count} now, with "
            f"other {what}: use that source, or another folder"
        )


def write_missing(output: Path, write: WriteShard, sizes: Sequence[int], workers: int) -> None:
    """Writes the shards that are not there yet.

    Args:
      output: the folder.
      write: fills one; see `WriteShard`. For more than one worker it must be of an importable type.
      sizes: of every shard, in any unit; for the progress.
      workers: processes, with a shard each.

    Raises:
      DataError: a shard cannot be written, or a worker died.
    """
    todo = [shard for shard in range(len(sizes)) if finished_shard(output, shard) is None]
    print(f"{len(sizes)} shards, {len(sizes) - len(todo)} finished already, {len(todo)} to do", flush=True)
    progress = Progress({str(shard): sizes[shard] for shard in todo}, _SAY_SECONDS)
    with contextlib.closing(map_in_processes(_WriteShard(output, write), todo, workers)) as finished:
        for shard, frames in finished:
            progress.end(str(shard), failed=False)
            progress.advance(str(shard), frames, 1.0)
    if todo:
        progress.tell()


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    """Writes a shard, and then what is in it; returns how many frames."""

    output: Path
    write: WriteShard

    def __call__(self, shard: int) -> int:
        folder = self.output / "shards"
        aside, path = folder / f".{shard:05d}.{os.getpid()}.tmp", folder / f"{shard:05d}.array_record"
        writer, skipped = ShardWriter(aside), Skipped()
        try:
            told, frames = self.write(shard, writer, skipped)
            writer.close()
        except RuntimeError as error:  # of ArrayRecord
            raise DataError(f"{path}: cannot be written ({error})") from error
        content = {"file": None, "records": writer.records, "skipped": skipped.reasons} | told
        if writer.records:
            content |= {"file": f"shards/{path.name}", "bytes": aside.stat().st_size, "sha256": sha256(aside)}
            aside.replace(path)
        write_json(folder / f"{shard:05d}.json", content)
        return frames


def finished_shard(output: Path, shard: int) -> dict[str, Any] | None:
    """What is in a shard; None unless it is there and whole by its size."""
    path = output / "shards" / f"{shard:05d}.json"
    if not path.exists():
        return None
    content = read_json(path)
    if content["file"] is None:
        return content
    file = output / content["file"]
    return content if file.exists() and file.stat().st_size == content["bytes"] else None


def _finished_contents(output: Path, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Skipped]:
    """Of `count` finished shards: what is in those with records, their lines in the index, and all that was skipped."""
    contents, lines, skipped = [], [], Skipped()
    for shard in range(count):
        content = finished_shard(output, shard)
        skipped.merge(Skipped(content["skipped"]))
        if content["file"] is not None:
            contents.append(content)
            lines.append({name: content[name] for name in ("file", "records", "bytes", "sha256")})
    return contents, lines, skipped


def write_index(
    output: Path,
    kind: str,
    source: NamedSource,
    settings: SourceSettings,
    shards: int,
    noun: str,
    told: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Writes the index of finished shards.

    Args:
      output: the folder.
      kind: one of `shard_index.PREPARED`.
      source: what was prepared.
      settings: of the preparation.
      shards: how many there are, with those without records.
      noun: what messages call a frame or an item of the source.
      told: what the index tells besides, by the contents of the shards that have records.

    Returns:
      The index.

    Raises:
      DataError: nothing could be read.
    """
    contents, lines, skipped = _finished_contents(output, shards)
    if not lines:
        raise DataError(f"{source.root}: no {noun} could be read; " + "; ".join(skipped.lines()))
    index = {
        "format": FORMAT,
        "kind": kind,
        "source": source.reader.name,
        "dataset": settings.dataset,
        "split": settings.split,
        "shards": lines,
        "skipped": skipped.reasons,
        **told(contents),
    }
    write_json(output / INDEX, index)
    return index
