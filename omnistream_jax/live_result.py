"""What a live stream gives for a frame, between the model and what shows it."""

import dataclasses
from typing import Any

import numpy as np

from omnistream_jax.data.live_source import LiveFrame


class LiveError(RuntimeError):
    """The run cannot go on; the message names the file or the frame and why."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Depth and camera of a frame, in the coordinates of the stream's first camera; conventions of data/schema.py.

    Attributes:
        depth: float32 [H, W], along the camera's axis; not known where it is not finite or not above 0.
        confidence: float32 [H, W], 1 or more.
        cam_to_world: float32 [4, 4].
        intrinsics: float32 [3, 3], in pixels.
    """

    depth: np.ndarray
    confidence: np.ndarray
    cam_to_world: np.ndarray
    intrinsics: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """bool [H, W], where depth is known."""
        return np.isfinite(self.depth) & (self.depth > 0)

    def scaled(self, factor: float) -> "Geometry":
        """The same with all lengths times a factor."""
        pose = self.cam_to_world.copy()
        pose[:3, 3] *= factor
        return dataclasses.replace(self, depth=self.depth * np.float32(factor), cam_to_world=pose)


@dataclasses.dataclass(frozen=True)
class Points:
    """Some points of a cloud, to be looked at: float32 [N, 3], their colours uint8 [N, 3], the side of their voxels."""

    positions: np.ndarray
    colours: np.ndarray
    voxel: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the decoder says to a question about a stream.

    Attributes:
        index: of the newest frame that it is about.
        time: of that frame, in seconds.
        question, text: what was asked, and the answer; boxes are those of the frames as the model sees them.
        frames: indices of the frames that the decoder was shown, the newest last.
        seconds: that it took.
    """

    index: int
    time: float
    question: str
    text: str
    frames: tuple[int, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """A line of answers.jsonl."""
        named = {"frame": self.index, "time": self.time, "question": self.question, "answer": self.text}
        return named | {"frames": list(self.frames), "seconds": self.seconds}


@dataclasses.dataclass(frozen=True)
class Result:
    """A frame and what the model made of it.

    Attributes:
        index: 0-based, of the frames that the model has seen.
        frame: pixels uint8 [H, W, 3] and times.
        patches: features [h, w, D] after the final norm.
        geometry: of a model with geometry heads, else None.
        step: seconds in the model, until all of it is on the host.
        latency: seconds from capture until then; None for a file that is read as fast as it goes.
        dropped: frames dropped so far.
        points: the cloud so far, with the frames at which it is drawn anew.
        answer: with the frames after which a question is answered.
    """

    index: int
    frame: LiveFrame
    patches: np.ndarray
    geometry: Geometry | None
    step: float
    latency: float | None
    dropped: int
    points: Points | None = None
    answer: Answer | None = None

    def check(self) -> None:
        """Raise LiveError for features that are not finite, or depth that is no number; endless depth is unknown."""
        if not np.isfinite(self.patches).all():
            raise LiveError(f"the features of frame {self.index} are not finite")
        if self.geometry is not None and np.isnan(self.geometry.depth).any():
            raise LiveError(f"the depth of frame {self.index} is not a number everywhere")
