"""Checks data sets in their published layout, and writes posed ones and videos as shards that are fast to train from.

    python -m omnistream_jax.data.prepare --dataset=scannet --source=DIR --output=DIR [--split=train] [--workers=N]
    python -m omnistream_jax.data.prepare --dataset=kinetics --source=DIR --output=DIR [--short_side=256]
    python -m omnistream_jax.data.prepare --dataset=scannet --source=DIR --check
    python -m omnistream_jax.data.prepare --output=DIR --check

The first two write shards: what can be read of every sequence or video, scaled to --short_side (see
data/shard_output.py for the files, data/records.py and data/video_records.py for what is in them);
`--dataset=prepared --source=OUTPUT`, for videos prepared_videos, is the data set then. Run it again after a stop and it
goes on; the result is the same. --check with a source reads all of it (of a video, one frame) and writes nothing; with
an output it holds the shards against their checksums. Images and captions are trained from as they are published: most
come in tars, which are shards already. For them there is --check only.

Exit status: 0 done; 1 an error, or a check that found something; 2 flags or settings that cannot work.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from omnistream_jax.data import command
from omnistream_jax.data.command import UsageError
from omnistream_jax.data.records import ImageOptions
from omnistream_jax.data.registry import ENTRIES, Entry, find_entry, open_dataset
from omnistream_jax.data.shard_index import POSED, VIDEOS, check_shards, read_index
from omnistream_jax.data.shards import Settings, write_shards
from omnistream_jax.data.source_check import NamedSource, Skipped, check_records, check_source
from omnistream_jax.data.transcode import VideoOptions
from omnistream_jax.data.video_shards import VideoSettings, write_video_shards

FLAGS = flags.FlagValues()
_IMAGE, _VIDEO = ImageOptions(), VideoOptions()
_OWN_FLAGS = {POSED: ("chunk", "shard_frames", "image_format", "quality"), VIDEOS: ("shard_videos", "crf")}
_DEFAULT_SHORT_SIDE = {POSED: _IMAGE.short_side, VIDEOS: _VIDEO.short_side}

flags.DEFINE_string("dataset", None, f"One of {', '.join(sorted(ENTRIES))}.", flag_values=FLAGS)
flags.DEFINE_string("source", None, "The folder of its published layout.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "The folder of the shards.", flag_values=FLAGS)
flags.DEFINE_string("split", "train", "As the data set calls it.", flag_values=FLAGS)
flags.DEFINE_multi_string("option", [], command.OPTION_HELP, flag_values=FLAGS)
flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_boolean("check", False, "Write nothing: read the source, or the shards.", flag_values=FLAGS)
flags.DEFINE_integer(
    "short_side",
    None,
    f"Pixels; 0 keeps every size. By default {_IMAGE.short_side}, of videos {_VIDEO.short_side}.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("chunk", Settings.chunk, "Frames of a record.", flag_values=FLAGS)
flags.DEFINE_integer("shard_frames", Settings.shard_frames, "Frames of a shard, at least.", flag_values=FLAGS)
flags.DEFINE_enum("image_format", _IMAGE.format, ["jpeg", "png"], "png is exact.", flag_values=FLAGS)
flags.DEFINE_integer("quality", _IMAGE.quality, "Of JPEG, 1 to 95.", flag_values=FLAGS)
flags.DEFINE_integer("shard_videos", VideoSettings.shard_videos, "Videos of a shard.", flag_values=FLAGS)
flags.DEFINE_integer("crf", _VIDEO.crf, "Of H.264, 0 (exact) to 51.", flag_values=FLAGS)


def main() -> int:
    """Does what the flags say; the exit status."""
    if FLAGS.check and FLAGS.output and not FLAGS.source:
        return _check_output(Path(FLAGS.output))
    for name in ("dataset", "source") if FLAGS.check else ("dataset", "source", "output"):
        if not FLAGS[name].value:
            raise UsageError(f"--{name}=... is required")
    entry = command.usage(find_entry, FLAGS.dataset)
    if not FLAGS.check:
        _refuse_flags(entry)
    options = command.parse_options(FLAGS.option)
    reader = open_dataset(FLAGS.dataset, FLAGS.source, FLAGS.split, **options)
    _tell_counts(reader, entry)
    source = NamedSource(reader, Path(FLAGS.source))
    if FLAGS.check:
        return _check_source(source, entry)
    write = _write_posed if entry.kind == POSED else _write_videos
    index, found = write(source, options)
    _tell(Skipped(index["skipped"]).lines())
    size = sum(shard["bytes"] for shard in index["shards"])
    found = f"{found}, {index['frames']:,} frames, {size / 2**20:,.1f} MiB"
    _tell([f"{found} in {len(index['shards'])} shards: {FLAGS.output}/index.json"])
    return 0


def _refuse_flags(entry: Entry) -> None:
    """Raises UsageError for what is not prepared, and for flags that are for another kind of data."""
    if FLAGS.dataset in ("prepared", "prepared_videos"):
        raise UsageError(f"dataset {FLAGS.dataset}: is prepared already; there is only --check for it")
    if entry.kind not in _OWN_FLAGS:
        raise UsageError(
            f"dataset {FLAGS.dataset}: {entry.kind} are trained from as they are published (tars are shards already); "
            "there is only --check for it"
        )
    others = [name for kind, names in _OWN_FLAGS.items() if kind != entry.kind for name in names]
    for name in others:
        if FLAGS[name].present:
            raise UsageError(f"--{name}: does nothing for {FLAGS.dataset}, whose kind is {entry.kind}")


def _write_posed(source: NamedSource, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The index, and how much of what is in it."""
    image = ImageOptions(FLAGS.image_format, FLAGS.quality, _short_side(POSED))
    settings = Settings(FLAGS.dataset, FLAGS.split, options, FLAGS.chunk, FLAGS.shard_frames, image)
    index = write_shards(source, Path(FLAGS.output), settings, FLAGS.workers)
    return index, f"{len(index['sequences'])} sequences"


def _write_videos(source: NamedSource, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    video = VideoOptions(_short_side(VIDEOS), FLAGS.crf)
    settings = VideoSettings(FLAGS.dataset, FLAGS.split, options, FLAGS.shard_videos, video)
    index = write_video_shards(source, Path(FLAGS.output), settings, FLAGS.workers)
    return index, f"{len(index['videos'])} videos"


def _short_side(kind: str) -> int:
    return _DEFAULT_SHORT_SIDE[kind] if FLAGS.short_side is None else FLAGS.short_side


def _tell_counts(reader: Sequence, entry: Entry) -> None:
    """What was found beside what the data set has as it was published."""
    noun = "sequences" if entry.kind == "posed" else "records"
    expected: Mapping[str, int] = getattr(reader, "EXPECTED", {})
    line = f"{reader.name}: {len(reader):,} {noun}"
    if FLAGS.split in expected:
        missing = expected[FLAGS.split] - len(reader)
        line += f"; {expected[FLAGS.split]:,} are published" + (f", {missing:,} are not here" if missing > 0 else "")
    else:
        line += "; how many are published is not known"
    _tell([line])


def _check_source(source: NamedSource, entry: Entry) -> int:
    check, noun = (check_source, "frames") if entry.kind == "posed" else (check_records, "records")
    usable, skipped = check(source, FLAGS.workers)
    _tell([*skipped.lines(), f"{usable:,} {noun} can be used, {skipped.count:,} faults"])
    return 1 if skipped.count else 0


def _check_output(output: Path) -> int:
    problems = check_shards(output, FLAGS.workers)
    _tell(problems)
    _tell([f"{len(read_index(output)['shards'])} shards, {len(problems)} faults"])
    return 1 if problems else 0


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
