"""What `python -m omnistream_jax.data.prepare` wrote of any data set of videos: a `sources.Source`.

Frames are those of the published videos to the loss of H.264, turned as players show them; larger ones scaled to the
short side that was asked for. `data/shard_output.py` describes the files.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.schema import Sample
from omnistream_jax.data.shard_index import VIDEOS, ShardRecords, open_index
from omnistream_jax.data.sources import read_clip
from omnistream_jax.data.video import open_video
from omnistream_jax.data.video_records import VideoRecord, decode_record


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedVideos:
    """Videos in prepared shards. A shard is opened when a video of it is first read.

    Attributes:
      name: that of the data set's own reader.
      root: the folder that was the output of the preparation.
      split: of the data set.
      labels: the classes' names; () where only numbers are published.
      label_ids: the class of each video, None where it is not published.
      short_side, frame_rate: see `sources.VideoSource`.
    """

    name: str
    root: Path
    split: str
    labels: tuple[str, ...]
    label_ids: tuple[int | None, ...]
    short_side: int | None
    frame_rate: float | None
    _names: tuple[str, ...]
    _records: ShardRecords
    max_frames: ClassVar[int | None] = None

    @classmethod
    def open(
        cls, root: Path, split: str = "train", short_side: int | None = None, frame_rate: float | None = None
    ) -> PreparedVideos:
        """The videos of finished shards. Raises DataError where there are none, or those of another split or kind."""
        root = Path(root)
        index, shards = open_index(root, split, VIDEOS)
        return cls(
            index["source"],
            root,
            split,
            tuple(index["labels"]),
            tuple(video["label"] for video in index["videos"]),
            short_side,
            frame_rate,
            tuple(video["name"] for video in index["videos"]),
            ShardRecords(root, shards),
        )

    def __len__(self) -> int:
        return len(self._names)

    def describe(self, index: int) -> str:
        """The shard and the name that the video has in the data set."""
        return f"{self._records.place(index)[0]}: {self._names[index]}"

    def label(self, index: int) -> int | None:
        """The video's class, an index into `labels` where there are names; None where it is not published."""
        return self.label_ids[index]

    def record(self, index: int) -> VideoRecord:
        """A video's MP4 file and what is known of it. Raises DataError where its shard is damaged."""
        return decode_record(self._records.read(index), self._records.describe(index))

    def sample(self, index: int, rng: np.random.Generator, frames: int, stride: tuple[int, int]) -> Sample:
        """Reads a random clip of a video; see `sources.VideoSource.sample`."""
        path, record = self.describe(index), self.record(index)
        with open_video(path, file=io.BytesIO(record.video)) as video:
            return Sample(read_clip(video, rng, frames, stride, self, record.frame_rate), path)
