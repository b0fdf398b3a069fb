"""Videos written as ArrayRecord shards; `shard_output.py` says which files there are.

A record (data/video_records.py) is one video, encoded again by data/transcode.py; a shard holds those that can be read
of `shard_videos` neighbours in the source's order, others are counted. No byte depends on timing, workers, the place of
the source, or earlier runs that were killed, as long as PyAV is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.readers.videos import TarVideos
from omnistream_jax.data.record_shards import Encoded, WriteRecords, label_of
from omnistream_jax.data.shard_index import VIDEOS
from omnistream_jax.data.shard_output import SourceSettings, kept_plan, opened_output, write_index, write_missing
from omnistream_jax.data.source_check import NamedSource
from omnistream_jax.data.sources import VideoSource
from omnistream_jax.data.transcode import Transcoded, VideoOptions, transcode
from omnistream_jax.data.video_records import VideoRecord, encode_record


@dataclasses.dataclass(frozen=True)
class VideoSettings(SourceSettings):
    """What the shards depend on, beside the source.

    Attributes:
      shard_videos: videos of a shard.
      video: how they are stored.
    """

    shard_videos: int = 256
    video: VideoOptions = dataclasses.field(default_factory=VideoOptions)

    def check(self) -> None:
        """Raises UsageError for values that make no sense."""
        if self.shard_videos < 1:
            raise UsageError(f"shard_videos: expected at least 1, got {self.shard_videos}")
        useless = sorted({"short_side", "frame_rate"} & self.options.keys())
        if useless:
            raise UsageError(
                f"option {useless[0]}: is for drawing clips, and every frame is prepared; use --short_side"
            )
        self.video.check()


def write_video_shards(source: NamedSource, output: Path, settings: VideoSettings, workers: int = 1) -> dict[str, Any]:
    """Writes the shards that are not there yet, and the index.

    Args:
      source: the data set in its published layout.
      output: made where it is missing.
      settings: see `VideoSettings`.
      workers: processes, with a shard each.

    Returns:
      The index.

    Raises:
      UsageError: the output holds something else, or shards of other settings or of another source.
      DataError: no video could be read, or a worker died; the same call goes on from there.
      WorkdirLockedError: another run works in the output.
    """
    settings.check()
    if not isinstance(source.reader, VideoSource | TarVideos):
        raise UsageError(f"dataset {settings.dataset}: its reader gives no video files that could be transcoded")
    output = Path(output)
    with opened_output(output, dataclasses.asdict(settings)):
        plan = _plan(source, output)
        write = WriteRecords(source, _EncodeVideo(source, settings.video, plan), settings.shard_videos, "videos")
        parts = write.parts()
        write_missing(output, write, [len(part) for part in parts], workers)

        def told(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
            videos = [entry for content in contents for entry in content["videos"]]  # in order: a record each
            frames = sum(entry["frames"] for entry in videos)
            return {"frames": frames, "labels": list(getattr(source.reader, "labels", ())), "videos": videos}

        return write_index(output, VIDEOS, source, settings, len(parts), "video", told)


def _plan(source: NamedSource, output: Path) -> tuple[dict[str, Any], ...]:
    entries = [_entry(source, index) for index in range(len(source.reader))]
    plan = kept_plan(output, [entry["name"] for entry in entries], "videos", lambda: entries)
    differing = [ours for ours, stored in zip(entries, plan, strict=True) if ours != stored]
    if differing:
        raise UsageError(
            f"output: {output} was begun with other labels of {len(differing)} videos ({differing[0]['name']} is one); "
            "use those, or another folder"
        )
    return tuple(plan)


def _entry(source: NamedSource, index: int) -> dict[str, Any]:
    return {"name": source.relative(source.reader.describe(index))} | label_of(source, index)


@dataclasses.dataclass(frozen=True)
class _EncodeVideo:
    """A `record_shards.Encode`.

    Attributes:
      plan: of each video its name, label and label's name.
    """

    source: NamedSource
    options: VideoOptions
    plan: tuple[dict[str, Any], ...]

    def __call__(self, index: int) -> Encoded:
        video = _transcoded(self.source, index, self.options)
        header = {"size": video.size, "frame_rate": video.frame_rate, "frames": video.frames}
        record = VideoRecord(source=self.source.reader.name, video=video.data, **self.plan[index], **header)
        entry = {"name": record.name, "label": record.label, "frames": video.frames}
        return Encoded(encode_record(record), video.frames, entry)


def _transcoded(source: NamedSource, index: int, options: VideoOptions) -> Transcoded:
    reader = source.reader
    if isinstance(reader, TarVideos):
        with reader.records.open(index, "video") as file:
            return transcode(reader.describe(index), options, file=file)
    return transcode(reader.paths[index], options)
