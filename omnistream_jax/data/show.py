"""A picture of some samples of a data set, for a person to look at.

    python -m omnistream_jax.data.show --dataset=scannet --source=DIR [--output=samples.png] [--count=4] [--frames=6]
    python -m omnistream_jax.data.show --dataset=world_captions --source=train

Of posed sequences it shows frames, their depth in colours (red near, blue far, grey not known, pale blue sky), and the
scene from above as the first frame's camera has it: points of all frames in their colours, the cameras from blue to
red, and their path. Where conventions are read rightly, the frames' points lie on each other: walls are thin lines.
Of images with text it shows boxes, instruction and answer; of images and videos, frames.

Exit status: 0 done; 1 an error; 2 flags that cannot work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from omnistream_jax.data import command
from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.picture import (
    below,
    beside,
    boxes_picture,
    depth_picture,
    depth_range,
    fitted,
    framed,
    text_picture,
    titled,
    view_from_above,
)
from omnistream_jax.data.readers.base import PosedSource
from omnistream_jax.data.registry import ENTRIES, find_entry, open_dataset
from omnistream_jax.data.schema import PosedFrame
from omnistream_jax.data.sources import Source
from omnistream_jax.utils.files import written_aside

PATH_FRAMES = 24  # at most so many cameras are read for the path

FLAGS = flags.FlagValues()
flags.DEFINE_string("dataset", None, f"One of {', '.join(sorted(ENTRIES))}.", flag_values=FLAGS)
flags.DEFINE_string(
    "source", None, "The folder of its published layout, or of shards; for the world its split.", flag_values=FLAGS
)
flags.DEFINE_string("split", "train", "As the data set calls it.", flag_values=FLAGS)
flags.DEFINE_multi_string("option", [], command.OPTION_HELP, flag_values=FLAGS)
flags.DEFINE_string("output", "samples.png", "The picture.", flag_values=FLAGS)
flags.DEFINE_integer("count", 4, "Samples, spread over the data set.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("frames", 6, "Frames of a sample.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("stride", 10, "Between frames, less in short sequences.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("height", 160, "Of a frame, pixels.", lower_bound=32, flag_values=FLAGS)


def main() -> int:
    """Does what the flags say; the exit status."""
    for name in ("dataset", "source"):
        if not FLAGS[name].value:
            raise UsageError(f"--{name}=... is required")
    output = Path(FLAGS.output)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--output={output}: expected a name that ends with .png or .jpg")
    kind = command.usage(find_entry, FLAGS.dataset).kind
    source = open_dataset(FLAGS.dataset, FLAGS.source, FLAGS.split, **command.parse_options(FLAGS.option))
    draw = {"posed": draw_sequence, "captions": draw_caption}.get(kind, draw_clip)
    rows, faults = [], 0
    for index in spread(len(source), FLAGS.count):
        try:
            rows.append(draw(source, index, FLAGS.frames, FLAGS.stride, FLAGS.height))
        except DataError as error:
            faults += 1
            print(f"cannot be shown: {error}", file=sys.stderr, flush=True)
            rows.append(titled(str(error), None, fault=True))
    if faults == len(rows):
        raise DataError(f"{FLAGS.source}: none of {faults} samples can be shown")
    title = f"{source.name}: {len(source):,} {'sequences' if kind == 'posed' else 'records'}"
    with written_aside(output) as aside:
        framed(titled(title, below(rows))).save(aside)
    print(f"{len(rows) - faults} samples: {output}", flush=True)
    return 0


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices from the first to the last of `length`."""
    return sorted({round(place) for place in np.linspace(0, length - 1, min(count, length))})


def draw_sequence(source: PosedSource, index: int, count: int, stride: int, height: int) -> Image.Image:
    """Frames over their depth, and the scene from above. Raises DataError where they cannot be read."""
    info, length = source.info(index), source.frame_count(index)
    if length == 0:
        raise DataError(f"{source.describe(index)}: has no frame")
    if info.ordered:
        numbers = middle(length, count, stride)
        between = [numbers[0] + place for place in spread(numbers[-1] - numbers[0] + 1, PATH_FRAMES)]
    else:
        start = length // 2
        numbers = [start, *source.neighbours(index, start)[: count - 1]]
        between = []
    wanted = sorted({*numbers, *between})
    found = dict(zip(wanted, source.read(index, wanted), strict=True))
    frames = [found[number] for number in numbers]
    limits = depth_range(frames)
    strip = beside([fitted(Image.fromarray(frame.image), height) for frame in frames])
    if limits:
        depths = [fitted(depth_picture(frame, limits), height) for frame in frames]
        strip = below([strip, beside(depths)])
    known = [found[number].cam_to_world for number in between if found[number].cam_to_world is not None]
    path = np.array([pose[:3, 3] for pose in known]).reshape(-1, 3)
    unit = "m" if info.metric else "units"
    above = view_from_above(frames, path, 2 * height + 6, unit)
    return titled(_facts(source, index, numbers, frames, limits), beside([strip, above]))


def middle(length: int, count: int, stride: int) -> list[int]:
    """Frame numbers at a stride from the middle of a sequence; where it is short, a lower stride, then fewer."""
    count = min(count, length)
    stride = min(stride, (length - 1) // (count - 1)) if count > 1 else 1
    start = (length - 1 - (count - 1) * stride) // 2
    return [start + number * stride for number in range(count)]


def _facts(source: PosedSource, index: int, numbers: Sequence[int], frames: Sequence[PosedFrame], limits: Any) -> str:
    info, unit = source.info(index), "m" if source.info(index).metric else "units"
    height, width = frames[0].image.shape[:2]
    facts = [f"{source.frame_count(index):,} frames of {width} x {height}"]
    facts.append("metric" if info.metric else "scale not known")
    facts.append("things move" if info.dynamic else "static")
    facts.append("ordered" if info.ordered else "no order")
    if info.frames_per_second:
        facts.append(f"{info.frames_per_second:g} frames/s")
    if limits:
        share = np.mean([frame.valid.mean() for frame in frames if frame.valid is not None])
        facts.append(f"depth {limits[0]:.3g} to {limits[1]:.3g} {unit}, known for {share:.0%}")
    else:
        facts.append("no depth")
    facts.append(f"shown: {', '.join(map(str, numbers))}")
    return f"{_tail(source.describe(index))}\n{' | '.join(facts)}"


def _tail(path: str, length: int = 110) -> str:
    return path if len(path) <= length else f"...{path[3 - length :]}"


def draw_caption(source: Any, index: int, count: int, stride: int, height: int) -> Image.Image:
    """An image with boxes, its instruction and its answer; of a size of its own. Raises DataError."""
    sample = source.read(index)
    picture = boxes_picture(sample, 2 * height)
    paragraphs = [f"Instruction: {sample.instruction}", f"Answer: {sample.answer}"]
    return titled(_tail(sample.path), beside([picture, text_picture(paragraphs, 3 * height, 2 * height)]))


def draw_clip(source: Source, index: int, count: int, stride: int, height: int) -> Image.Image:
    """An image, or the frames of a clip. Raises DataError where they cannot be read."""
    count = count if source.max_frames is None else min(count, source.max_frames)
    sample = source.sample(index, np.random.default_rng(index), count, (1, stride))
    frames = [fitted(Image.fromarray(frame), height) for frame in sample.frames]
    size = f"{sample.frames.shape[2]} x {sample.frames.shape[1]}"
    return titled(f"{_tail(sample.path)} | {size}", beside(frames))


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
