"""Reading everything in a data set: what can be used, and what cannot and why."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.base import PosedSource
from omnistream_jax.data.schema import CaptionedImage, PosedFrame
from omnistream_jax.data.sources import Source
from omnistream_jax.data.worker_pool import map_in_processes

if TYPE_CHECKING:
    from omnistream_jax.data.readers.captions import CaptionSource

WHOLE = "a whole sequence: "
"""Before the reason for which no frame of a sequence was tried."""

_READ_AT_ONCE = 8  # frames: at full size a whole record's would not fit beside those of other workers
_BLOCK = 64  # images, videos or captions that a worker checks at a time


class Skipped:
    """What was left out: how often for each reason, and the first message of each.

    Attributes:
      reasons: {reason: {"count", "first"}}.
    """

    def __init__(self, reasons: Mapping[str, Mapping[str, Any]] | None = None):
        self.reasons = {reason: dict(entry) for reason, entry in (reasons or {}).items()}

    def add(self, error: DataError, message: str, kind: str = "") -> None:
        """Counts an error, told as `message`, under its reason; `kind` stands before the reason."""
        self._count(kind + (error.reason or _without_particulars(message)), message, 1)

    def merge(self, other: Skipped) -> None:
        """Adds another's counts."""
        for reason, entry in other.reasons.items():
            self._count(reason, entry["first"], entry["count"])

    def _count(self, reason: str, message: str, count: int) -> None:
        entry = self.reasons.setdefault(reason, {"count": 0, "first": message})
        entry["count"] += count

    @property
    def count(self) -> int:
        """Over all reasons."""
        return sum(entry["count"] for entry in self.reasons.values())

    def lines(self) -> list[str]:
        """For a person, the most frequent reason first."""
        entries = sorted(self.reasons.items(), key=lambda item: (-item[1]["count"], item[0]))
        return [f"skipped {entry['count']}: {reason}; the first: {entry['first']}" for reason, entry in entries]


def _without_particulars(message: str) -> str:
    """A message without the file that it begins with, what stands in brackets, and its numbers."""
    text = (message.partition(": ")[2] or message).partition(" (")[0]
    return re.sub(r"(?<![\w-])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?![\w-])", "N", text)


@dataclasses.dataclass(frozen=True)
class NamedSource:
    """A reader and the folder that it reads, without which names and messages are told: it may lie elsewhere next time.

    Attributes:
      reader: of the published layout; of a posed data set, where nothing else is said.
      root: its folder.
    """

    reader: PosedSource | Source | CaptionSource
    root: Path

    def relative(self, text: str) -> str:
        """A path or a message without the folder."""
        return text.replace(f"{self.root}{os.sep}", "")

    def sequence(self, index: int) -> str:
        """The name of a sequence."""
        return self.relative(self.reader.describe(index))

    def read_each(self, index: int, numbers: Sequence[int], skipped: Skipped) -> Iterator[tuple[int, PosedFrame]]:
        """The frames of a sequence that can be used, with their numbers; what cannot is counted in `skipped`."""
        for start in range(0, len(numbers), _READ_AT_ONCE):
            some = numbers[start : start + _READ_AT_ONCE]
            for number, frame in self._read(index, some, skipped):
                if frame.depth is not None and not frame.valid.any():
                    error = DataError(f"{frame.path}: no pixel of its depth is valid", reason="depth is empty")
                    skipped.add(error, self.relative(str(error)))
                else:
                    yield number, frame

    def _read(self, index: int, numbers: Sequence[int], skipped: Skipped) -> list[tuple[int, PosedFrame]]:
        try:
            return list(zip(numbers, self.reader.read(index, numbers), strict=True))
        except DataError as error:
            if len(numbers) == 1:
                skipped.add(error, self.relative(str(error)))
                return []
        return [found for number in numbers for found in self._read(index, [number], skipped)]


def check_source(source: NamedSource, workers: int = 1) -> tuple[int, Skipped]:
    """Reads every frame of every sequence.

    Returns:
      How many frames can be used, and what cannot.
    """
    found = dict(map_in_processes(_CheckSequence(source), range(len(source.reader)), workers))
    skipped = Skipped()
    for index in sorted(found):
        skipped.merge(Skipped(found[index][1]))
    return sum(frames for frames, _ in found.values()), skipped


@dataclasses.dataclass(frozen=True)
class _CheckSequence:
    source: NamedSource

    def __call__(self, index: int) -> tuple[int, dict[str, Any]]:
        skipped, frames = Skipped(), 0
        try:
            count = self.source.reader.frame_count(index)
            if count == 0:
                raise DataError(f"{self.source.sequence(index)}: it has no frame", reason="no frame")
            frames = sum(1 for _ in self.source.read_each(index, range(count), skipped))
        except DataError as error:
            skipped.add(error, self.source.relative(str(error)), kind=WHOLE)
        return frames, skipped.reasons


def check_records(source: NamedSource, workers: int = 1) -> tuple[int, Skipped]:
    """Reads every image or captioned image, and one frame of every video.

    Returns:
      How many records can be used, and what cannot.
    """
    blocks = range(0, len(source.reader), _BLOCK)
    found = dict(map_in_processes(_CheckBlock(source), blocks, workers))
    skipped = Skipped()
    for start in blocks:
        skipped.merge(Skipped(found[start]))
    return len(source.reader) - skipped.count, skipped


@dataclasses.dataclass(frozen=True)
class _CheckBlock:
    source: NamedSource

    def __call__(self, start: int) -> dict[str, Any]:
        skipped = Skipped()
        for index in range(start, min(start + _BLOCK, len(self.source.reader))):
            try:
                _use(self.source.reader, index)
            except DataError as error:
                skipped.add(error, self.source.relative(str(error)))
        return skipped.reasons


def _use(reader: Source | CaptionSource, index: int) -> None:
    if hasattr(reader, "read"):
        read_caption(reader, index)
    else:
        reader.sample(index, np.random.default_rng(index), 1, (1, 1))


def read_caption(reader: CaptionSource, index: int) -> CaptionedImage:
    """Reads a captioned image. Raises DataError where training could not use it, for its text also."""
    from omnistream_jax.data.captions import check_text  # imports Grain, which takes seconds in each worker

    sample = reader.read(index)
    check_text(sample)
    return sample
