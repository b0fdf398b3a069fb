"""What `python -m omnistream_jax.data.prepare` wrote of any data set of images: a `sources.Source`.

Pictures are those of the published files, pixel by pixel; larger ones scaled to the short side that was asked for.
`data/shard_output.py` describes the files.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.picture_records import ImageRecord, decode_image
from omnistream_jax.data.schema import Sample
from omnistream_jax.data.shard_index import IMAGES, ShardRecords, open_index


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImages:
    """Photographs in prepared shards. A shard is opened when one of it is first read.

    Attributes:
      name: that of the data set's own reader.
      root: the folder that was the output of the preparation.
      split: of the data set.
      labels: the classes' names; () where none are published.
    """

    name: str
    root: Path
    split: str
    labels: tuple[str, ...]
    _records: ShardRecords
    max_frames: ClassVar[int | None] = 1

    @classmethod
    def open(cls, root: Path, split: str = "train") -> PreparedImages:
        """The images of finished shards. Raises DataError where there are none, or those of another split or kind."""
        root = Path(root)
        index, shards = open_index(root, split, IMAGES)
        return cls(index["source"], root, split, tuple(index["labels"]), ShardRecords(root, shards))

    def __len__(self) -> int:
        return len(self._records)

    def describe(self, index: int) -> str:
        """The shard and the record in it; the name that the image has in the data set is in the record."""
        return self._records.describe(index)

    def label(self, index: int) -> int | None:
        """The image's class, an index into `labels`; None where it is not published. Reads the record."""
        return self.record(index).label

    def record(self, index: int) -> ImageRecord:
        """An image's file and what is known of it. Raises DataError where its shard is damaged."""
        return decode_image(self._records.read(index), self.describe(index))

    def sample(self, index: int, rng: np.random.Generator, frames: int = 1, stride: tuple[int, int] = (1, 1)) -> Sample:
        """See `sources.ImageSource.sample`. The path is that of the shard, and the image's name in the data set."""
        record = self.record(index)
        path = f"{self.describe(index)}: {record.name}"
        if frames != 1:
            raise DataError(f"{path}: a photograph has 1 frame, a clip of {frames} was asked for")
        return Sample(frames=read_image(path, file=io.BytesIO(record.picture))[None], path=path)
