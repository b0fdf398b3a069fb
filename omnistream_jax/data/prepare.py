"""Checks data sets in their published layout, and writes posed ones as shards that are fast to train from.

    python -m omnistream_jax.data.prepare --dataset=scannet --source=DIR --output=DIR [--split=train] [--workers=N]
    python -m omnistream_jax.data.prepare --dataset=scannet --source=DIR --check
    python -m omnistream_jax.data.prepare --output=DIR --check

The first writes shards: what can be read of every sequence, scaled to --short_side (see data/shards.py for the files
and data/records.py for what is in them); `--dataset=prepared --source=OUTPUT` is the data set then. Run it again after
a stop and it goes on; the result is the same. --check with a source reads all of it and writes nothing; with an output
it holds the shards against their checksums. Sets of images, videos and captions are trained from as they are
published: for them there is --check only (of a video it decodes one frame).

Exit status: 0 done; 1 an error, or a check that found something; 2 flags or settings that cannot work.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from omnistream_jax.data import command
from omnistream_jax.data.command import UsageError
from omnistream_jax.data.records import ImageOptions
from omnistream_jax.data.registry import ENTRIES, Entry, find_entry, open_dataset
from omnistream_jax.data.shard_index import check_shards, read_index
from omnistream_jax.data.shards import Settings, write_shards
from omnistream_jax.data.source_check import NamedSource, Skipped, check_records, check_source

FLAGS = flags.FlagValues()
_IMAGE = ImageOptions()

flags.DEFINE_string("dataset", None, f"One of {', '.join(sorted(ENTRIES))}.", flag_values=FLAGS)
flags.DEFINE_string("source", None, "The folder of its published layout.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "The folder of the shards.", flag_values=FLAGS)
flags.DEFINE_string("split", "train", "As the data set calls it.", flag_values=FLAGS)
flags.DEFINE_multi_string("option", [], command.OPTION_HELP, flag_values=FLAGS)
flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_boolean("check", False, "Write nothing: read the source, or the shards.", flag_values=FLAGS)
flags.DEFINE_integer("short_side", _IMAGE.short_side, "Pixels; 0 keeps every size.", flag_values=FLAGS)
flags.DEFINE_integer("chunk", Settings.chunk, "Frames of a record.", flag_values=FLAGS)
flags.DEFINE_integer("shard_frames", Settings.shard_frames, "Frames of a shard, at least.", flag_values=FLAGS)
flags.DEFINE_enum("image_format", _IMAGE.format, ["jpeg", "png"], "png is exact.", flag_values=FLAGS)
flags.DEFINE_integer("quality", _IMAGE.quality, "Of JPEG, 1 to 95.", flag_values=FLAGS)


def main() -> int:
    """Does what the flags say; the exit status."""
    if FLAGS.check and FLAGS.output and not FLAGS.source:
        return _check_output(Path(FLAGS.output))
    for name in ("dataset", "source") if FLAGS.check else ("dataset", "source", "output"):
        if not FLAGS[name].value:
            raise UsageError(f"--{name}=... is required")
    entry = command.usage(find_entry, FLAGS.dataset)
    if not FLAGS.check and (entry.kind != "posed" or FLAGS.dataset == "prepared"):
        raise UsageError(f"dataset {FLAGS.dataset}: it is trained from as it is; there is only --check for it")
    options = command.parse_options(FLAGS.option)
    reader = open_dataset(FLAGS.dataset, FLAGS.source, FLAGS.split, **options)
    _tell_counts(reader, entry)
    source = NamedSource(reader, Path(FLAGS.source))
    if FLAGS.check:
        return _check_source(source, entry)
    image = ImageOptions(FLAGS.image_format, FLAGS.quality, FLAGS.short_side)
    settings = Settings(FLAGS.dataset, FLAGS.split, options, FLAGS.chunk, FLAGS.shard_frames, image)
    index = write_shards(source, Path(FLAGS.output), settings, FLAGS.workers)
    _tell(Skipped(index["skipped"]).lines())
    size = sum(shard["bytes"] for shard in index["shards"])
    found = f"{len(index['sequences'])} sequences, {index['frames']:,} frames, {size / 2**20:,.1f} MiB"
    _tell([f"{found} in {len(index['shards'])} shards: {FLAGS.output}/index.json"])
    return 0


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
