"""What videos, images and captions share: every item of a source that can be used becomes a record of its own.

A shard holds those of so many neighbours in the source's order; others are counted. `shard_output.py` says which files
there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.shard_output import ShardWriter
from omnistream_jax.data.source_check import NamedSource, Skipped


class Encoded(NamedTuple):
    """An item.

    Attributes:
      data: the bytes of its record.
      frames: how many frames are in it.
      entry: what its shard's JSON tells of it, where it tells of each.
    """

    data: bytes
    frames: int = 1
    entry: dict[str, Any] | None = None


Encode = Callable[[int], Encoded]
"""The index of an item -> its record. Raises DataError for what cannot be used. Of an importable type."""


@dataclasses.dataclass(frozen=True)
class WriteRecords:
    """A `shard_output.WriteShard` of a record for each item.

    Attributes:
      source: of the items.
      encode: makes their records.
      size: items of a shard.
      entries: under which name a shard's JSON tells of each; None: it does not.
    """

    source: NamedSource
    encode: Encode
    size: int
    entries: str | None = None

    def parts(self) -> list[range]:
        """The items of each shard."""
        count = len(self.source.reader)
        return [range(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def __call__(self, shard: int, writer: ShardWriter, skipped: Skipped) -> tuple[dict[str, Any], int]:
        """Writes a shard."""
        entries, frames = [], 0
        for index in self.parts()[shard]:
            try:
                found = self.encode(index)
            except DataError as error:
                skipped.add(error, self.source.relative(str(error)))
                continue
            writer.write(found.data)
            entries.append(found.entry)
            frames += found.frames
        return ({} if self.entries is None else {self.entries: entries}), frames


def label_of(source: NamedSource, index: int) -> dict[str, Any]:
    """{"label", "label_name"} of an item: its class and the class's name, None where they are not published."""
    label = source.reader.label(index) if hasattr(source.reader, "label") else None
    labels = getattr(source.reader, "labels", ())
    return {"label": label, "label_name": labels[label] if label is not None and labels else None}
