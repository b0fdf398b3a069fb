"""What `python -m omnistream_jax.data.prepare` wrote of any data set of images with text: a `CaptionSource`.

Texts and boxes are what the reader of the published layout gave, pictures those of the published files, pixel by pixel;
larger ones scaled to the short side that was asked for. `data/shard_output.py` describes the files.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from omnistream_jax.data.images import read_image
from omnistream_jax.data.picture_records import CaptionRecord, decode_caption
from omnistream_jax.data.readers.captions import Prompt
from omnistream_jax.data.schema import CaptionedImage
from omnistream_jax.data.shard_index import CAPTIONS, ShardRecords, open_index


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCaptions:
    """Captioned images in prepared shards. A shard is opened when one of it is first read.

    Attributes:
      name: that of the data set's own reader.
      root: the folder that was the output of the preparation.
      split: of the data set.
    """

    name: str
    root: Path
    split: str
    _records: ShardRecords

    @classmethod
    def open(cls, root: Path, split: str = "train") -> PreparedCaptions:
        """The captions of finished shards. Raises DataError where there are none, or those of another split or kind."""
        root = Path(root)
        index, shards = open_index(root, split, CAPTIONS)
        return cls(index["source"], root, split, ShardRecords(root, shards))

    def __len__(self) -> int:
        return len(self._records)

    def describe(self, index: int) -> str:
        """The shard and the record in it; what the data set calls it is in the record."""
        return self._records.describe(index)

    def record(self, index: int) -> CaptionRecord:
        """A record as it is stored. Raises DataError where its shard is damaged."""
        return decode_caption(self._records.read(index), self.describe(index))

    def read(self, index: int) -> CaptionedImage:
        """Reads one; its path is that of the shard, and the picture's in the data set. Raises DataError likewise."""
        record = self.record(index)
        path = f"{self.describe(index)}: {record.path}"
        image = read_image(path, file=io.BytesIO(record.picture))
        prompt = Prompt(record.instruction, record.answer, record.boxes, record.phrases)
        return prompt.with_image(image, path, record.others)
