"""Posed sequences written as ArrayRecord shards.

    OUTPUT/settings.json              what the shards depend on; another run with others is refused
    OUTPUT/plan.json                  the sequences and how many frames each has, counted once
    OUTPUT/shards/00000.array_record  records of data/records.py, group_size:1
    OUTPUT/shards/00000.json          what is in it, its sha256, what was skipped and why; written after it
    OUTPUT/index.json                 all of those together; written when all shards are

A record holds `chunk` frames in order of a sequence (its last one fewer), or for photographs without order up to so
many that see the same things. Frames that cannot be read are left out and counted. No byte depends on timing, workers,
the place of the source, or earlier runs that were killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from omnistream_jax.data import records
from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.records import ImageOptions
from omnistream_jax.data.schema import PosedFrame
from omnistream_jax.data.shard_index import FORMAT, INDEX, SETTINGS, read_json, sha256, write_json
from omnistream_jax.data.source_check import WHOLE, NamedSource, Skipped
from omnistream_jax.data.worker_pool import map_in_processes
from omnistream_jax.utils.lock import WorkdirLock
from omnistream_jax.utils.progress import Progress

_SAY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shards depend on, beside the source.

    Attributes:
      dataset: its name in the registry.
      split: as the data set calls it.
      options: further arguments of its reader.
      chunk: frames of a record.
      shard_frames: a shard is closed after the sequence with which it has so many.
      image: how frames are stored.
    """

    dataset: str
    split: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chunk: int = 32
    shard_frames: int = 2048
    image: ImageOptions = dataclasses.field(default_factory=ImageOptions)

    def check(self) -> None:
        """Raises UsageError for values that make no sense."""
        for name in ("chunk", "shard_frames"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.image.short_side < 0:
            raise UsageError(f"short_side: expected a number of pixels, or 0 to keep it, got {self.image.short_side}")
        if not 1 <= self.image.quality <= 95:
            raise UsageError(f"quality: expected 1 to 95, got {self.image.quality}")


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same for all shards of a run.

    Attributes:
      sequences: (name, frames) of each sequence of the reader.
      parts: of each shard the range of its sequences.
    """

    source: NamedSource
    output: Path
    settings: Settings
    sequences: tuple[tuple[str, int], ...] = ()
    parts: tuple[range, ...] = ()


def write_shards(source: NamedSource, output: Path, settings: Settings, workers: int = 1) -> dict[str, Any]:
    """Writes the shards that are not there yet, and the index.

    Args:
      source: the data set in its published layout.
      output: made where it is missing.
      settings: see `Settings`.
      workers: processes, with a shard each.

    Returns:
      The index.

    Raises:
      UsageError: the output holds something else, or shards of other settings or of another source.
      DataError: no frame could be read, or a worker died; the same call goes on from there.
      WorkdirLockedError: another run works in the output.
    """
    settings.check()
    output = Path(output)
    _refuse_other_files(output)
    with WorkdirLock(output):
        (output / "shards").mkdir(exist_ok=True)
        for leftover in (*output.glob(".*.tmp"), *output.glob("shards/.*.tmp")):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        _remember(output, settings)
        job = _plan(Job(source, output, settings), workers)
        todo = [shard for shard in range(len(job.parts)) if _finished(output, shard) is None]
        _say(f"{len(job.parts)} shards, {len(job.parts) - len(todo)} finished already, {len(todo)} to do")
        _write_missing(job, todo, workers)
        return _write_index(job)


# Planning


def _refuse_other_files(output: Path) -> None:
    if output.is_dir() and not (output / SETTINGS).exists():
        others = [name for name in sorted(os.listdir(output)) if name != "shards" and not name.startswith(".")]
        if others:
            raise UsageError(f"output: {output} holds other files ({others[0]}), expected a new or empty folder")
    elif output.exists() and not output.is_dir():
        raise UsageError(f"output: {output} is a file, expected a folder")


def _remember(output: Path, settings: Settings) -> None:
    path, ours = output / SETTINGS, {"format": FORMAT} | json.loads(json.dumps(dataclasses.asdict(settings)))
    if not path.exists():
        write_json(path, ours)
        return
    stored = read_json(path)
    differing = [name for name in sorted(stored.keys() | ours.keys()) if stored.get(name) != ours.get(name)]
    if differing:
        lines = "".join(f"\n  {name}: {stored.get(name)} -> {ours.get(name)}" for name in differing)
        raise UsageError(f"output: {output} holds shards of other settings; use those, or another folder:{lines}")


def _plan(job: Job, workers: int) -> Job:
    """Counts the frames of all sequences, or takes the counts of an earlier run, and parts them into shards."""
    path = job.output / "plan.json"
    names = [job.source.sequence(index) for index in range(len(job.source.reader))]
    if path.exists():
        plan = read_json(path)
        if [entry["name"] for entry in plan] != names:
            before = {entry["name"] for entry in plan}
            raise UsageError(
                f"output: {job.output} was begun from a source of {len(plan)} sequences; "
                f"{len(before - set(names))} of them are gone now, {len(set(names) - before)} are new: "
                "use that source, or another folder"
            )
    else:
        counts = dict(map_in_processes(_CountFrames(job.source), range(len(names)), workers))
        plan = [{"name": name, "frames": counts[index]} for index, name in enumerate(names)]
        write_json(path, plan)
    sequences = tuple((entry["name"], entry["frames"]) for entry in plan)
    return dataclasses.replace(job, sequences=sequences, parts=_parts(sequences, job.settings.shard_frames))


@dataclasses.dataclass(frozen=True)
class _CountFrames:
    source: NamedSource

    def __call__(self, index: int) -> int:
        try:
            return self.source.reader.frame_count(index)
        except DataError:
            return 0  # it is asked again when its shard is written, which tells why


def _parts(sequences: Sequence[tuple[str, int]], shard_frames: int) -> tuple[range, ...]:
    parts, start, frames = [], 0, 0
    for index, (_, count) in enumerate(sequences):
        frames += count
        if frames >= shard_frames or index == len(sequences) - 1:
            parts.append(range(start, index + 1))
            start, frames = index + 1, 0
    return tuple(parts)


# Writing


def _write_missing(job: Job, todo: Sequence[int], workers: int) -> None:
    sizes = {str(shard): sum(job.sequences[index][1] for index in job.parts[shard]) for shard in todo}
    progress = Progress(sizes, _SAY_SECONDS)
    with contextlib.closing(map_in_processes(_WriteShard(job), todo, workers)) as finished:
        for shard, frames in finished:
            progress.end(str(shard), failed=False)
            progress.advance(str(shard), frames, 1.0)
    if todo:
        progress.tell()


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    """Writes a shard, and then what is in it; returns how many frames."""

    job: Job

    def __call__(self, shard: int) -> int:
        folder = self.job.output / "shards"
        aside, path = folder / f".{shard:05d}.{os.getpid()}.tmp", folder / f"{shard:05d}.array_record"
        writer, skipped = _Writer(aside), Skipped()
        try:
            found = [_write_sequence(self.job, index, writer, skipped) for index in self.job.parts[shard]]
            writer.close()
        except RuntimeError as error:  # of ArrayRecord
            raise DataError(f"{path}: cannot be written ({error})") from error
        entries = [entry for entry in found if entry is not None]
        content = {"file": None, "records": writer.records, "sequences": entries, "skipped": skipped.reasons}
        if writer.records:
            content |= {"file": f"shards/{path.name}", "bytes": aside.stat().st_size, "sha256": sha256(aside)}
            aside.replace(path)
        write_json(folder / f"{shard:05d}.json", content)
        return sum(entry["frames"] for entry in entries)


class _Writer:
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


def _write_sequence(job: Job, index: int, writer: _Writer, skipped: Skipped) -> dict[str, Any] | None:
    """What the index tells of the sequence; None if no frame of it could be read."""
    name, count = job.sequences[index]
    first = writer.records
    try:
        info = job.source.reader.info(index)
        if count == 0:
            job.source.reader.frame_count(index)  # tells why, if that is why
            raise DataError(f"{name}: it had no frame when they were counted", reason="no frame")
        # Who sees what is asked before anything is written, so that a sequence is not left half written.
        seen = None if info.ordered else [list(job.source.reader.neighbours(index, number)) for number in range(count)]
    except DataError as error:
        skipped.add(error, job.source.relative(str(error)), kind=WHOLE)
        return None
    if seen is None:
        kept, sets = _write_in_order(job, index, writer, skipped), {}
    else:
        kept, sets = _write_overlap_sets(job, index, seen, writer, skipped)
    if not kept:
        return None
    return {"name": name, "info": dataclasses.asdict(info), "first": first, "frames": kept} | sets


def _write_in_order(job: Job, index: int, writer: _Writer, skipped: Skipped) -> int:
    kept, chunk = 0, []
    for _, frame in job.source.read_each(index, range(job.sequences[index][1]), skipped):
        chunk.append(records.scaled(frame, job.settings.image.short_side))
        kept += 1
        if len(chunk) == job.settings.chunk:
            writer.write(_record(job, index, chunk))
            chunk = []
    if chunk:
        writer.write(_record(job, index, chunk))
    return kept


def _write_overlap_sets(
    job: Job, index: int, seen: Sequence[Sequence[int]], writer: _Writer, skipped: Skipped
) -> tuple[int, dict[str, Any]]:
    """How many frames were kept, and their numbers among those, record by record; who sees what is a record more."""
    sets = []
    for numbers in overlap_sets(seen, job.settings.chunk):
        found = list(job.source.read_each(index, numbers, skipped))
        if found:
            frames = [records.scaled(frame, job.settings.image.short_side) for _, frame in found]
            writer.write(_record(job, index, frames))
            sets.append([number for number, _ in found])
    kept = {number: new for new, number in enumerate(sorted(number for numbers in sets for number in numbers))}
    if kept:
        neighbours = [[kept[other] for other in seen[number] if other in kept] for number in kept]
        writer.write(records.encode_neighbours(neighbours))
    return len(kept), {"sets": [[kept[number] for number in numbers] for numbers in sets]}


def overlap_sets(neighbours: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Parts the frames of a sequence into sets of up to `size` that see the same things.

    Each set grows from the lowest frame that is left, by the neighbours of its members in turn, most seen first.
    """
    left, sets = dict.fromkeys(range(len(neighbours))), []
    while left:
        members = [next(iter(left))]
        del left[members[0]]
        for member in members:  # which grows meanwhile
            for other in neighbours[member]:
                if len(members) < size and other in left:
                    members.append(other)
                    del left[other]
        sets.append(sorted(members))
    return sets


def _record(job: Job, index: int, frames: Sequence[PosedFrame]) -> bytes:
    return records.encode_record(
        frames,
        source=job.source.reader.name,
        sequence=job.sequences[index][0],
        paths=[job.source.relative(frame.path) for frame in frames],
        options=job.settings.image,
    )


# What is in the output


def _finished(output: Path, shard: int) -> dict[str, Any] | None:
    """What is in a shard; None unless it is there and whole by its size."""
    path = output / "shards" / f"{shard:05d}.json"
    if not path.exists():
        return None
    content = read_json(path)
    if content["file"] is None:
        return content
    file = output / content["file"]
    return content if file.exists() and file.stat().st_size == content["bytes"] else None


def _write_index(job: Job) -> dict[str, Any]:
    shards, sequences, skipped = [], [], Skipped()
    for shard in range(len(job.parts)):
        content = _finished(job.output, shard)
        skipped.merge(Skipped(content["skipped"]))
        if content["file"] is not None:
            sequences += [{"shard": len(shards)} | entry for entry in content["sequences"]]
            shards.append({name: content[name] for name in ("file", "records", "bytes", "sha256")})
    if not sequences:
        raise DataError(f"{job.source.root}: no frame could be read; " + "; ".join(skipped.lines()))
    index = {
        "format": FORMAT,
        "source": job.source.reader.name,
        "dataset": job.settings.dataset,
        "split": job.settings.split,
        "chunk": job.settings.chunk,
        "frames": sum(entry["frames"] for entry in sequences),
        "depth_error": records.DEPTH_ERROR,
        "shards": shards,
        "sequences": sequences,
        "skipped": skipped.reasons,
    }
    write_json(job.output / INDEX, index)
    return index


def _say(line: str) -> None:
    print(line, flush=True)
