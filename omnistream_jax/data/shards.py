"""Posed sequences written as ArrayRecord shards; `shard_output.py` says which files there are.

A record (data/records.py) holds `chunk` frames in order of a sequence (its last one fewer), or for photographs without
order up to so many that see the same things. Frames that cannot be read are left out and counted. No byte depends on
timing, workers, the place of the source, or earlier runs that were killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnistream_jax.data import records
from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.records import ImageOptions
from omnistream_jax.data.schema import PosedFrame
from omnistream_jax.data.shard_index import POSED
from omnistream_jax.data.shard_output import (
    ShardWriter,
    SourceSettings,
    kept_plan,
    opened_output,
    write_index,
    write_missing,
)
from omnistream_jax.data.source_check import WHOLE, NamedSource, Skipped
from omnistream_jax.data.worker_pool import map_in_processes


@dataclasses.dataclass(frozen=True)
class Settings(SourceSettings):
    """What the shards depend on, beside the source.

    Attributes:
      chunk: frames of a record.
      shard_frames: a shard is closed after the sequence with which it has so many.
      image: how frames are stored.
    """

    chunk: int = 32
    shard_frames: int = 2048
    image: ImageOptions = dataclasses.field(default_factory=ImageOptions)

    def check(self) -> None:
        """Raises UsageError for values that make no sense."""
        for name in ("chunk", "shard_frames"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        self.image.check()


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

    def told(self, contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the index tells of the contents of its shards."""
        entries = [
            {"shard": number} | entry for number, content in enumerate(contents) for entry in content["sequences"]
        ]
        return {
            "chunk": self.settings.chunk,
            "frames": sum(entry["frames"] for entry in entries),
            "depth_error": records.DEPTH_ERROR,
            "sequences": entries,
        }


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
    with opened_output(output, dataclasses.asdict(settings)):
        job = _plan(Job(source, output, settings), workers)
        sizes = [sum(job.sequences[index][1] for index in part) for part in job.parts]
        write_missing(output, _WriteShard(job), sizes, workers)
        return write_index(output, POSED, source, settings, len(job.parts), "frame", job.told)


# Planning


def _plan(job: Job, workers: int) -> Job:
    """Counts the frames of all sequences, or takes the counts of an earlier run, and parts them into shards."""
    names = [job.source.sequence(index) for index in range(len(job.source.reader))]

    def count() -> list[dict[str, Any]]:
        counts = dict(map_in_processes(_CountFrames(job.source), range(len(names)), workers))
        return [{"name": name, "frames": counts[index]} for index, name in enumerate(names)]

    plan = kept_plan(job.output, names, "sequences", count)
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


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    """A `shard_output.WriteShard`."""

    job: Job

    def __call__(self, shard: int, writer: ShardWriter, skipped: Skipped) -> tuple[dict[str, Any], int]:
        found = [_write_sequence(self.job, index, writer, skipped) for index in self.job.parts[shard]]
        entries = [entry for entry in found if entry is not None]
        return {"sequences": entries}, sum(entry["frames"] for entry in entries)


def _write_sequence(job: Job, index: int, writer: ShardWriter, skipped: Skipped) -> dict[str, Any] | None:
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


def _write_in_order(job: Job, index: int, writer: ShardWriter, skipped: Skipped) -> int:
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
    job: Job, index: int, seen: Sequence[Sequence[int]], writer: ShardWriter, skipped: Skipped
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
