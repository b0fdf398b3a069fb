"""Objects followed through a video by a backbone's features: frames in, features, labels handed on, masks out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from PIL import Image

from omnistream_jax.data.benchmarks.masked import VOID, MaskedSequence
from omnistream_jax.data.opencv import cv2
from omnistream_jax.evals.propagation import Propagation, advance, begin, first_labels, object_mask
from omnistream_jax.model import Model
from omnistream_jax.ops.images import IMAGENET_MEAN, IMAGENET_STD

ROUNDINGS = ("down", "up")
INTERPOLATIONS = ("bilinear", "bicubic")
DEVIATIONS = {"imagenet": IMAGENET_STD, "dino": np.array([0.228, 0.224, 0.225], np.float32)}
FEATURES = ("stream", "frame")


@dataclasses.dataclass(frozen=True)
class FrameRule:
    """How frames become the model's input.

    Attributes:
      short_side: in pixels.
      rounding: "down" (DINO): the short side is as given and the long side, which would keep the proportions, is
        rounded down to a multiple of `multiple`; "up" (DINOv3): both are rounded up.
      multiple: of pixels; 0: the model's patch.
      interpolation: "bilinear", OpenCV's, which averages over no pixels when it shrinks (DINO); or "bicubic", Pillow's,
        which does (DINOv3).
      deviation: by which colours are divided: "imagenet", or "dino", whose red is 0.228 instead of 0.229.

    Raises:
      ValueError: a field that does not fit, named.
    """

    short_side: int
    rounding: str
    multiple: int
    interpolation: str
    deviation: str

    def __post_init__(self):
        choices = {"rounding": ROUNDINGS, "interpolation": INTERPOLATIONS, "deviation": tuple(DEVIATIONS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, low in (("short_side", 1), ("multiple", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")

    def check(self, patch: int) -> None:
        """Raises ValueError where sizes by this rule could not be cut into patches."""
        if self.multiple % patch:
            raise ValueError(f"multiple: expected a multiple of the model's patch, {patch} pixels, got {self.multiple}")
        if self.rounding == "down" and self.short_side % patch:
            expected = f"a multiple of the model's patch, {patch} pixels, with rounding down"
            raise ValueError(f"short_side: expected {expected}, got {self.short_side}")

    def size(self, height: int, width: int, patch: int) -> tuple[int, int]:
        """Height and width of the model's input for a frame. Raises ValueError where nothing would be left."""
        multiple = self.multiple or patch
        short = self.short_side if self.rounding == "down" else -(-self.short_side // multiple) * multiple
        long = short * max(height, width) / min(height, width)
        long = (math.floor if self.rounding == "down" else math.ceil)(long / multiple) * multiple
        if not long:
            raise ValueError(f"short_side: expected {multiple} or more with rounding down, got {self.short_side}")
        return (long, short) if height > width else (short, long)

    def prepare(self, frame: np.ndarray, patch: int) -> np.ndarray:
        """float32 [h, w, 3], normalised, of a frame uint8 [H, W, 3]."""
        height, width = self.size(*frame.shape[:2], patch)
        if self.interpolation == "bilinear":
            resized = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
        else:
            resized = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        return (resized.astype(np.float32) / 255.0 - IMAGENET_MEAN) / DEVIATIONS[self.deviation]


@dataclasses.dataclass(frozen=True)
class FeatureReader:
    """Features of the frames of one video, in order.

    Attributes:
      model: the backbone.
      features: "stream": the video is one stream, and every frame sees those before it through the key-value cache;
        "frame": every frame is encoded alone, as an image model does.
      window, sinks: as for `Model.open_stream`; a window of None sees the whole video. Frames alone have none.
      time_unit: frames per unit of time; None takes the model's own. Frames alone have none.
      frames_per_step: frames that go to the device at once; the result depends on it by rounding alone.

    Raises:
      ValueError: a field that does not fit, named.
    """

    model: Model
    features: str = "stream"
    window: int | None = None
    sinks: int = 1
    time_unit: float | None = None
    frames_per_step: int = 1

    def __post_init__(self):
        if self.features not in FEATURES:
            raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {self.features!r}")
        if self.frames_per_step < 1:
            raise ValueError(f"frames_per_step: expected 1 or more, got {self.frames_per_step}")
        if self.features == "frame" and self.window is not None:
            raise ValueError(f"window: frames that are encoded alone have none, got {self.window}")
        if self.features == "frame" and self.time_unit is not None:
            raise ValueError(f"time_unit: frames that are encoded alone have no time, got {self.time_unit}")
        self._open(self.patch, self.patch)

    @property
    def patch(self) -> int:
        """Pixels on a side of a patch."""
        return self.model.config.patch_size

    def read(self, frames: Iterable[np.ndarray]) -> Iterator[jax.Array]:
        """After the final norm and without special tokens, [h, w, D], of frames float32 [H, W, 3], normalised."""
        frames, stream = iter(frames), None
        while chunk := list(itertools.islice(frames, self.frames_per_step)):
            # The last one is filled up, so that no other length must be compiled.
            filled = np.stack(chunk + chunk[-1:] * (self.frames_per_step - len(chunk)))
            if self.features == "frame":
                out = self.model.encode(filled[:, None], layers=())
                patches = out.patches[:, 0]
            else:
                stream = stream or self._open(*filled.shape[1:3])
                out, stream = self.model.step(stream, filled[None])
                patches = out.patches[0]
            yield from patches[: len(chunk)]

    def _open(self, height: int, width: int):
        options = {"window": self.window, "sinks": self.sinks, "time_unit": self.time_unit, "layers": ()}
        return self.model.open_stream(1, height, width, **options)


def segment(
    reader: FeatureReader, rule: FrameRule, propagation: Propagation, sequence: MaskedSequence
) -> Iterator[np.ndarray]:
    """The mask of every frame, uint8 [H, W], as soon as it is known; that of the first frame is the true one.

    Raises:
      DataError: a frame or the first mask cannot be read.
      ValueError: the rule leaves nothing of the frames.
    """
    first, (height, width) = sequence.mask(0), sequence.size
    first = np.where(first == VOID, 0, first).astype(np.uint8)
    rows, columns = (side // reader.patch for side in rule.size(height, width, reader.patch))
    frames = (rule.prepare(sequence.frame(index), reader.patch) for index in range(len(sequence)))
    features = reader.read(frames)
    memory = begin(propagation, next(features), first_labels(first, (rows, columns), sequence.objects))
    yield first
    for each in features:
        labels, memory = advance(propagation, memory, each)
        yield object_mask(propagation, labels, reader.patch, sequence.size)
