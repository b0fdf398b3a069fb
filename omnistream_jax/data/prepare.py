"""Checks data sets in their published layout, and writes them as shards that are fast to train from.

    python -m omnistream_jax.data.prepare --dataset=scannet --source=DIR --output=DIR [--split=train] [--workers=N]
    python -m omnistream_jax.data.prepare --dataset=kinetics --source=DIR --output=DIR [--short_side=256]
    python -m omnistream_jax.data.prepare --dataset=imagenet21k --source=DIR --output=DIR [--short_side=0]
    python -m omnistream_jax.data.prepare --dataset=scannet --source=DIR --check
    python -m omnistream_jax.data.prepare --output=DIR --check

The first three write shards: what can be read of every sequence, video, image or captioned image, scaled to
--short_side (see data/shard_output.py for the files, and data/*records.py for what is in them). Then
`--dataset=prepared --source=OUTPUT` is the data set; for videos it is prepared_videos, for images prepared_images, for
captions prepared_captions. The pictures of the latter two keep their published bytes but for those that --short_side
shrinks. Web data sets of images and captions can as well be trained from as they are: their tars are shards already,
but without checksums. Run it again after a stop and it goes on; the result is the same.

--check with a source reads all of it (of a video, one frame) and writes nothing; with an output it holds the shards
against their checksums. Of the embedded world the source is its split: --dataset=world_captions --source=heldout.

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
from omnistream_jax.data.picture_shards import PictureSettings, write_caption_shards, write_image_shards
from omnistream_jax.data.records import ImageOptions
from omnistream_jax.data.registry import ENTRIES, Entry, find_entry, open_dataset
from omnistream_jax.data.shard_index import CAPTIONS, IMAGES, POSED, PREPARED, VIDEOS, check_shards, read_index
from omnistream_jax.data.shards import Settings, write_shards
from omnistream_jax.data.source_check import NamedSource, Skipped, check_records, check_source
from omnistream_jax.data.transcode import VideoOptions
from omnistream_jax.data.video_shards import VideoSettings, write_video_shards

FLAGS = flags.FlagValues()
_IMAGE, _VIDEO = ImageOptions(), VideoOptions()
_ENCODING = ("image_format", "quality")
_OWN_FLAGS = {
    POSED: ("chunk", "shard_frames", *_ENCODING),
    VIDEOS: ("shard_videos", "crf"),
    IMAGES: ("shard_records", *_ENCODING),
    CAPTIONS: ("shard_records", *_ENCODING),
}
_DEFAULT_SHORT_SIDE = {POSED: _IMAGE.short_side, VIDEOS: _VIDEO.short_side, IMAGES: 0, CAPTIONS: 0}

flags.DEFINE_string("dataset", None, f"One of {', '.join(sorted(ENTRIES))}.", flag_values=FLAGS)
flags.DEFINE_string("source", None, "The folder of its published layout; for the world its split.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "The folder of the shards.", flag_values=FLAGS)
flags.DEFINE_string("split", "train", "As the data set calls it.", flag_values=FLAGS)
flags.DEFINE_multi_string("option", [], command.OPTION_HELP, flag_values=FLAGS)
flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_boolean("check", False, "Write nothing: read the source, or the shards.", flag_values=FLAGS)
flags.DEFINE_integer(
    "short_side",
    None,
    f"Pixels; 0 keeps every size. By default {_IMAGE.short_side}, of videos {_VIDEO.short_side}, of images and "
    "captions 0: they keep their published bytes.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("chunk", Settings.chunk, "Frames of a record.", flag_values=FLAGS)
flags.DEFINE_integer("shard_frames", Settings.shard_frames, "Frames of a shard, at least.", flag_values=FLAGS)
flags.DEFINE_enum("image_format", _IMAGE.format, ["jpeg", "png"], "png is exact.", flag_values=FLAGS)
flags.DEFINE_integer("quality", _IMAGE.quality, "Of JPEG, 1 to 95.", flag_values=FLAGS)
flags.DEFINE_integer("shard_videos", VideoSettings.shard_videos, "Videos of a shard.", flag_values=FLAGS)
flags.DEFINE_integer("crf", _VIDEO.crf, "Of H.264, 0 (exact) to 51.", flag_values=FLAGS)
flags.DEFINE_integer(
    "shard_records", PictureSettings.shard_records, "Images or captions of a shard.", flag_values=FLAGS
)


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
    split = getattr(reader, "split", FLAGS.split)  # the world's stands where others have their folder
    _tell_counts(reader, entry, split)
    source = NamedSource(reader, Path(FLAGS.source))
    if FLAGS.check:
        return _check_source(source, entry)
    index, found = _write(entry.kind, source, split, options)
    _tell(Skipped(index["skipped"]).lines())
    size = sum(shard["bytes"] for shard in index["shards"])
    _tell([f"{found}, {size / 2**20:,.1f} MiB in {len(index['shards'])} shards: {FLAGS.output}/index.json"])
    return 0


def _refuse_flags(entry: Entry) -> None:
    """Raises UsageError for what is not to be prepared, and for flags that would do nothing."""
    if FLAGS.dataset in PREPARED.values():
        raise UsageError(f"dataset {FLAGS.dataset}: is prepared already; there is only --check for it")
    own = _OWN_FLAGS[entry.kind]
    for name in dict.fromkeys(name for names in _OWN_FLAGS.values() for name in names):
        if not FLAGS[name].present:
            continue
        if name not in own:
            raise UsageError(f"--{name}: does nothing for {FLAGS.dataset}, whose kind is {entry.kind}")
        if name in _ENCODING and entry.kind in (IMAGES, CAPTIONS) and not _short_side(entry.kind):
            raise UsageError(f"--{name}: does nothing for {entry.kind} without --short_side: they keep their bytes")


def _write(kind: str, source: NamedSource, split: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The index, and how much of what is in it."""
    common, output, workers = (FLAGS.dataset, split, options), Path(FLAGS.output), FLAGS.workers
    if kind == VIDEOS:
        video = VideoOptions(_short_side(kind), FLAGS.crf)
        index = write_video_shards(source, output, VideoSettings(*common, FLAGS.shard_videos, video), workers)
        return index, f"{len(index['videos'])} videos, {index['frames']:,} frames"
    image = ImageOptions(FLAGS.image_format, FLAGS.quality, _short_side(kind))
    if kind == POSED:
        settings = Settings(*common, FLAGS.chunk, FLAGS.shard_frames, image)
        index = write_shards(source, output, settings, workers)
        return index, f"{len(index['sequences'])} sequences, {index['frames']:,} frames"
    write = {IMAGES: write_image_shards, CAPTIONS: write_caption_shards}[kind]
    index = write(source, output, PictureSettings(*common, FLAGS.shard_records, image), workers)
    return index, f"{index['records']:,} {kind}"


def _short_side(kind: str) -> int:
    return _DEFAULT_SHORT_SIDE[kind] if FLAGS.short_side is None else FLAGS.short_side


def _tell_counts(reader: Sequence, entry: Entry, split: str) -> None:
    """What was found beside what the data set has as it was published."""
    noun = "sequences" if entry.kind == POSED else "records"
    expected: Mapping[str, int] = getattr(reader, "EXPECTED", {})
    line = f"{reader.name}: {len(reader):,} {noun}"
    if split in expected:
        missing = expected[split] - len(reader)
        line += f"; {expected[split]:,} are published" + (f", {missing:,} are not here" if missing > 0 else "")
    else:
        line += "; how many are published is not known"
    _tell([line])


def _check_source(source: NamedSource, entry: Entry) -> int:
    check, noun = (check_source, "frames") if entry.kind == POSED else (check_records, "records")
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
