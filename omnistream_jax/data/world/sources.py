"""The world as data: posed RGB-D clips, videos with motion classes, and pictures with captions and questions.

All three show the same scenes: clip i, video i and picture i of one split and seed are scene i. Nothing is stored:
frames are rendered when they are read, about 200 of 96 x 96 pixels a second and core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from omnistream_jax.data.embedded import SPLITS
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.base import posed_frame
from omnistream_jax.data.readers.captions import DESCRIBE, Prompt, grounded_prompt, locate_prompt
from omnistream_jax.data.schema import CaptionedImage, PosedFrame, Sample, SequenceInfo
from omnistream_jax.data.sources import clip_indices
from omnistream_jax.data.world.clips import Seen, WorldClip, render_clip
from omnistream_jax.data.world.language import Question, frame_caption, frame_questions, left_to_right, noun
from omnistream_jax.data.world.motion import MOTIONS
from omnistream_jax.data.world.scenes import Scene, build_scene, motion_of

FRAMES_PER_SECOND = 8.0
MIN_SIZE, MAX_SIZE = 16, 1024
LENGTHS = {"train": 200_000, "heldout": 500}
"""Scenes of a split, where nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class _World:
    """Scenes 0 to length - 1 of a split and a seed.

    Attributes:
      split: "train" or "heldout"; the two share neither scenes nor a pixel of a texture.
      length: how many scenes.
      frames: of a clip; it shows the whole of a motion, whatever their number.
      size: height and width in pixels.
      seed: 0 or more.

    Raises:
      DataError: a field is out of range.
    """

    split: str
    length: int
    frames: int = 16
    size: int = 96
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise DataError(f"world: split is {self.split!r}, expected one of {', '.join(SPLITS)}")
        limits = {"length": (1, None), "frames": (1, None), "size": (MIN_SIZE, MAX_SIZE), "seed": (0, None)}
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if not isinstance(value, int | np.integer) or value < low or (high is not None and value > high):
                expected = f"{low} to {high}" if high is not None else f"{low} or more"
                raise DataError(f"world: {field} is {value}, expected {expected}")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"world {self.KIND} ({self.split})"

    KIND: ClassVar[str]

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """The scene's number; there is no file."""
        return f"world ({self.split}), seed {self.seed}, scene {self._checked(index)}"

    def label(self, index: int) -> int:
        """The motion class of a scene, a number in MOTIONS; every len(MOTIONS) scenes hold each class once."""
        return motion_of(self.seed, self.split, self._checked(index))

    def scene(self, index: int) -> Scene:
        """What is in a scene."""
        return build_scene(self.seed, self.split, self._checked(index))

    def clip(self, index: int, frames: Sequence[int] | None = None) -> WorldClip:
        """A scene rendered, with all that is known: some of its frames, 0 to `frames` - 1, or all."""
        frames = range(self.frames) if frames is None else frames
        for frame in frames:
            if not 0 <= frame < self.frames:
                raise DataError(f"{self.describe(index)}: frame {frame}, expected 0 to {self.frames - 1}")
        return render_clip(self.scene(index), [frame / max(self.frames - 1, 1) for frame in frames], self.size)

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise DataError(f"{self.name}: scene {index}, expected 0 to {self.length - 1}")
        return int(index)


@dataclasses.dataclass(frozen=True)
class WorldClips(_World):
    """Posed RGB-D clips with exact depth and poses, in metres; a `readers.base.PosedSource`."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True, frames_per_second=FRAMES_PER_SECOND)
    KIND: ClassVar[str] = "clips"

    def info(self, index: int) -> SequenceInfo:
        """The same for all clips."""
        return self.INFO

    def frame_count(self, index: int) -> int:
        """The same for all clips."""
        return self.frames

    def neighbours(self, index: int, frame: int) -> Sequence[int] | None:
        """None: the frames are in order."""
        return None

    def read(self, index: int, frames: Sequence[int]) -> list[PosedFrame]:
        """Renders some frames of a clip; see `PosedSource.read`."""
        clip, nowhere = self.clip(index, frames), np.zeros((self.size, self.size), bool)
        return [
            posed_frame(
                clip.images[i],
                clip.intrinsics,
                clip.depth[i],
                clip.cam_to_world[i],
                f"{self.describe(index)}, frame {frame}",
                sky=nowhere,
            )
            for i, frame in enumerate(frames)
        ]


@dataclasses.dataclass(frozen=True)
class WorldVideos(_World):
    """Videos for self-supervision, and for probes of motion by `label`; a `data.sources.Source`.

    Attributes:
      short_side: samples are rendered at this side where it is below `size`; None: at `size`.
      frame_rate: the unit of strides, as in `data.sources.VideoSource`; the video's own is FRAMES_PER_SECOND.
    """

    frames: int = 32
    short_side: int | None = dataclasses.field(default=None, kw_only=True)
    frame_rate: float | None = dataclasses.field(default=None, kw_only=True)
    KIND: ClassVar[str] = "videos"
    labels: ClassVar[tuple[str, ...]] = MOTIONS
    max_frames: ClassVar[int | None] = None

    def __post_init__(self):
        super().__post_init__()
        if self.short_side is not None and self.short_side < MIN_SIZE:
            raise DataError(f"world: short_side is {self.short_side}, expected {MIN_SIZE} or more")
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise DataError(f"world: frame_rate is {self.frame_rate}, expected a positive number")

    def sample(self, index: int, rng: np.random.Generator, frames: int, stride: tuple[int, int] = (1, 1)) -> Sample:
        """A random clip of a video; arguments and errors as of `data.sources.VideoSource.sample`."""
        path = self.describe(index)
        unit = max(1.0, FRAMES_PER_SECOND / self.frame_rate) if self.frame_rate else 1.0
        chosen = clip_indices(rng, self.frames, frames, stride, path, unit)
        shown = dataclasses.replace(self, size=min(self.size, self.short_side or self.size))
        return Sample(frames=shown.clip(index, chosen).images, path=path)


@dataclasses.dataclass(frozen=True)
class WorldCaptions(_World):
    """Pictures with an instruction and an answer, a `CaptionSource` of data/readers/captions.py.

    A picture is scene i at a moment of its own; its text names colours, materials, shapes, numbers and places that
    the picture shows. In turn, a record is one of TASKS: a description; a description with boxes in the text; the box
    of one thing; a question. The other three come with it. Boxes are written as data/boxes.py has it.
    """

    frames: int = 1
    KIND: ClassVar[str] = "captions"
    TASKS: ClassVar[tuple[str, ...]] = ("describe", "ground", "locate", "ask")

    def task(self, index: int) -> str:
        """Which of TASKS a record is."""
        return self.TASKS[self._checked(index) % len(self.TASKS)]

    def read(self, index: int) -> CaptionedImage:
        """Renders a picture and draws its text; a record is always the same."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), self._checked(index), len(self.TASKS)])
        clip = render_clip(self.scene(index), [rng.random()], self.size)
        seen = {one.thing: one for one in left_to_right(clip.seen(0))}  # never empty: what moves is in sight
        path = self.describe(index)
        task = self.task(index)
        own = _prompt(task, clip, seen, rng, path)
        others = [_prompt(other, clip, seen, rng, path).text for other in self.TASKS if other != task]
        return own.with_image(clip.images[0], path, others)


def _prompt(task: str, clip: WorldClip, seen: dict[int, Seen], rng: np.random.Generator, path: str) -> Prompt:
    """The text of a record, with the boxes of all that it speaks of."""
    names = {thing: noun(clip.scene.things[thing]) for thing in seen}
    if task == "locate":
        thing = int(rng.choice(list(seen)))
        return locate_prompt(names[thing], seen[thing].box, path)
    if task == "ask":
        question = _draw(frame_questions(clip, 0, rng), rng)
        text = f"{question.question} {question.answer}"
        phrases = tuple(_spoken(clip.scene, seen[thing], text) for thing in question.things)
        boxes = np.array([seen[thing].box for thing in question.things], np.float32).reshape(-1, 4)
        return Prompt(question.question, question.answer, boxes, phrases)
    caption = frame_caption(clip, 0, rng)
    if task == "describe":
        boxes = np.array([one.box for one in seen.values()], np.float32)
        return Prompt(DESCRIBE, caption, boxes, tuple(names.values()))
    starts = {thing: caption.index(name) for thing, name in names.items()}
    spans = [(start, start + len(names[thing]), seen[thing].box) for thing, start in starts.items()]
    return grounded_prompt(caption, spans, path)


def _draw(questions: list[Question], rng: np.random.Generator) -> Question:
    """A question of a kind drawn first, so that no kind is asked more for having more pairs to ask about."""
    kind = str(rng.choice(sorted({question.kind for question in questions})))
    some = [question for question in questions if question.kind == kind]
    return some[rng.integers(len(some))]


def _spoken(scene: Scene, one: Seen, text: str) -> str:
    """The words that a text has for a thing: its full name, else its shape or its look alone."""
    thing = scene.things[one.thing]
    look = f"{thing.colour} thing" if thing.colour is not None else f"thing covered in {thing.material}"
    return next(words for words in (noun(thing), look, thing.shape) if words in text)
