"""Videos written as ArrayRecord shards; `shard_output.py` says which files there are.

A record (data/video_records.py) is one video, encoded again by data/transcode.py; a shard holds those that can be read
of `shard_videos` neighbours in the source's order, others are counted. No byte depends on timing, workers, the place of
the source, or earlier runs that were killed, as long as PyAV is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.videos import TarVideos
from omnistream_jax.data.shard_index import FORMAT, INDEX, VIDEOS, write_json
from omnistream_jax.data.shard_output import ShardWriter, finished_contents, kept_plan, opened_output, write_missing
from omnistream_jax.data.source_check import NamedSource, Skipped
from omnistream_jax.data.sources import VideoSource
from omnistream_jax.data.transcode import Transcoded, VideoOptions, transcode
from omnistream_jax.data.video_records import VideoRecord, encode_record


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """What the shards depend on, beside the source.

    Attributes:
      dataset: its name in the registry.
      split: as the data set calls it.
      options: further arguments of its reader.
      shard_videos: videos of a shard.
      video: how they are stored.
    """

    dataset: str
    split: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same for all shards of a run; a `shard_output.WriteShard`.

    Attributes:
      plan: of each video its name, label and label's name.
    """

    source: NamedSource
    settings: VideoSettings
    plan: tuple[dict[str, Any], ...]

    def parts(self) -> list[range]:
        """The videos of each shard."""
        step = self.settings.shard_videos
        return [range(start, min(start + step, len(self.plan))) for start in range(0, len(self.plan), step)]

    def __call__(self, shard: int, writer: ShardWriter, skipped: Skipped) -> tuple[dict[str, Any], int]:
        entries = []
        for index in self.parts()[shard]:
            try:
                video = _transcoded(self.source, index, self.settings.video)
            except DataError as error:
                skipped.add(error, self.source.relative(str(error)))
                continue
            header = {"size": video.size, "frame_rate": video.frame_rate, "frames": video.frames}
            record = VideoRecord(source=self.source.reader.name, video=video.data, **self.plan[index], **header)
            writer.write(encode_record(record))
            entries.append({"name": record.name, "label": record.label, "frames": video.frames})
        return {"videos": entries}, sum(entry["frames"] for entry in entries)


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
        job = _Job(source, settings, _plan(source, output))
        parts = job.parts()
        write_missing(output, job, [len(part) for part in parts], workers)
        return _write_index(job, output, len(parts))


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
    label = source.reader.label(index) if hasattr(source.reader, "label") else None
    labels = getattr(source.reader, "labels", ())
    name = labels[label] if label is not None and labels else None
    return {"name": source.relative(source.reader.describe(index)), "label": label, "label_name": name}


def _transcoded(source: NamedSource, index: int, options: VideoOptions) -> Transcoded:
    reader = source.reader
    if isinstance(reader, TarVideos):
        with reader.records.open(index, "video") as file:
            return transcode(reader.describe(index), options, file=file)
    return transcode(reader.paths[index], options)


def _write_index(job: _Job, output: Path, count: int) -> dict[str, Any]:
    contents, shards, skipped = finished_contents(output, count)
    videos = [entry for content in contents for entry in content["videos"]]  # in order: a record each
    if not videos:
        raise DataError(f"{job.source.root}: no video could be read; " + "; ".join(skipped.lines()))
    index = {
        "format": FORMAT,
        "kind": VIDEOS,
        "source": job.source.reader.name,
        "dataset": job.settings.dataset,
        "split": job.settings.split,
        "frames": sum(entry["frames"] for entry in videos),
        "labels": list(getattr(job.source.reader, "labels", ())),
        "shards": shards,
        "videos": videos,
        "skipped": skipped.reasons,
    }
    write_json(output / INDEX, index)
    return index
