"""What `python -m omnistream_jax.data.prepare` wrote of any posed data set; `data/shard_output.py` describes the files.

Frames are those of the published layout: images to the loss of JPEG, depth within a relative error of 1e-4 (exact where
it was published in millimetres), cameras exact; larger ones scaled to the short side that was asked for.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnistream_jax.data import records
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.schema import PosedFrame, SequenceInfo
from omnistream_jax.data.shard_index import POSED, open_index, read_record

_KNOWN_NEIGHBOURS = 64  # sequences of a process


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """A line of the index.

    Attributes:
      first: the number of its first record in its shard.
      sets: without order, the frames of each of its records; then one record more tells the neighbours.
    """

    name: str
    info: SequenceInfo
    shard: int
    first: int
    frames: int
    sets: tuple[tuple[int, ...], ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A `readers.base.PosedSource` over prepared shards. A shard is opened when a frame of it is first read.

    Attributes:
      name: that of the data set's own reader.
      root: the folder that was the output of the preparation.
      split: of the data set.
    """

    name: str
    root: Path
    split: str
    _chunk: int
    _shards: tuple[tuple[str, int], ...]  # file and records
    _sequences: tuple[_Sequence, ...]

    @classmethod
    def open(cls, root: Path, split: str = "train") -> Prepared:
        """The sequences of finished shards. Raises DataError where there are none, or those of another split."""
        root = Path(root)
        index, shards = open_index(root, split, POSED)
        return cls(index["source"], root, split, index["chunk"], shards, tuple(map(_sequence, index["sequences"])))

    def __len__(self) -> int:
        return len(self._sequences)

    def describe(self, index: int) -> str:
        """The shard and the name that the sequence has in the data set."""
        sequence = self._sequences[index]
        return f"{self._path(sequence)}: {sequence.name}"

    def info(self, index: int) -> SequenceInfo:
        """As the data set's own reader tells it."""
        return self._sequences[index].info

    def frame_count(self, index: int) -> int:
        """How many frames of a sequence were prepared."""
        return self._sequences[index].frames

    def neighbours(self, index: int, frame: int) -> Sequence[int] | None:
        """For sequences without order: the frames that see what this one sees, most first."""
        sequence = self._sequences[index]
        if sequence.sets is None:
            return None
        position = sequence.first + len(sequence.sets)
        return _neighbours(self._path(sequence), self._shards[sequence.shard][1], position)[frame]

    def read(self, index: int, frames: Sequence[int]) -> list[PosedFrame]:
        """Reads some frames of a sequence; see `PosedSource.read`. Each record that they lie in is read once."""
        sequence = self._sequences[index]
        wrong = [frame for frame in frames if not 0 <= frame < sequence.frames]
        if wrong:
            raise DataError(f"{self.describe(index)}: has {sequence.frames} frames, frame {wrong[0]} was asked for")
        places = [self._place(sequence, frame) for frame in frames]
        found = {number: self._record(sequence, number) for number in sorted({number for number, _ in places})}
        where = self.describe(index)
        return [found[number].frame(slot, where) for number, slot in places]

    def _place(self, sequence: _Sequence, frame: int) -> tuple[int, int]:
        """The record of the sequence that holds a frame, and the frame's place in it."""
        if sequence.sets is None:
            return divmod(frame, self._chunk)
        for number, members in enumerate(sequence.sets):
            slot = bisect.bisect_left(members, frame)
            if slot < len(members) and members[slot] == frame:
                return number, slot
        raise DataError(f"{self._path(sequence)}: the index does not say where frame {frame} of {sequence.name} is")

    def _record(self, sequence: _Sequence, number: int) -> records.Record:
        path, position = self._path(sequence), sequence.first + number
        data = read_record(path, self._shards[sequence.shard][1], position)
        return records.decode_record(data, f"{path}, record {position}")

    def _path(self, sequence: _Sequence) -> str:
        return str(self.root / self._shards[sequence.shard][0])


def _sequence(entry: dict[str, Any]) -> _Sequence:
    sets = tuple(map(tuple, entry["sets"])) if "sets" in entry else None
    return _Sequence(
        entry["name"], SequenceInfo(**entry["info"]), entry["shard"], entry["first"], entry["frames"], sets
    )


@functools.lru_cache(maxsize=_KNOWN_NEIGHBOURS)
def _neighbours(path: str, count: int, position: int) -> list[list[int]]:
    return records.decode_neighbours(read_record(path, count, position), f"{path}, record {position}")
