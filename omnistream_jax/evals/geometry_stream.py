"""Depth and cameras of whole sequences, each read off a geometry model as one stream."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from omnistream_jax.geometry_model import GeometryModel, Reconstruction

POSE_SOURCES = ("camera", "rays")


@dataclasses.dataclass(frozen=True)
class SequenceStreamer:
    """What the protocols of evals/video_depth.py and evals/camera_pose.py ask for predictions.

    Frame t of a stream has the time coordinate t / time_unit, also past 1: the streaming convention, which the
    released OmniStream code leaves where one call carries more than 16 frames.

    Attributes:
        model: the backbone with its heads.
        window, sinks: as for `Model.open_stream`; a window of None sees the whole sequence.
        time_unit: frames per unit of time; None takes the model's own.
        frames_per_step: frames that go to the device at once; the result does not depend on it.
        pose_source: "camera", the camera head, or "rays", solved from the ray map.

    Raises:
        ValueError: a field that does not fit, named.
    """

    model: GeometryModel
    window: int | None = None
    sinks: int = 1
    time_unit: float | None = None
    frames_per_step: int = 1
    pose_source: str = "camera"

    def __post_init__(self):
        if self.frames_per_step < 1:
            raise ValueError(f"frames_per_step: expected 1 or more, got {self.frames_per_step}")
        if self.pose_source not in POSE_SOURCES:
            raise ValueError(f"pose_source: expected one of {', '.join(POSE_SOURCES)}, got {self.pose_source!r}")
        self._open(self.patch, self.patch)

    @property
    def patch(self) -> int:
        """Pixels on a side of a patch."""
        return self.model.model.config.patch_size

    def depth(self, frames: np.ndarray) -> np.ndarray:
        """z-depth float32 [T, h, w], in the model's units, of frames uint8 [T, h, w, 3]."""
        return self._stream(frames, _depth)

    def cam_to_world(self, frames: np.ndarray) -> np.ndarray:
        """Poses float32 [T, 4, 4], in the model's units and the first camera's axes, of frames uint8 [T, h, w, 3]."""
        return self._stream(frames, {"camera": _head_cameras, "rays": _ray_cameras}[self.pose_source])

    def _open(self, height: int, width: int):
        return self.model.open_stream(1, height, width, window=self.window, sinks=self.sinks, time_unit=self.time_unit)

    def _stream(self, frames: np.ndarray, select: Callable[[Reconstruction], jax.Array]) -> np.ndarray:
        stream, parts = self._open(*frames.shape[1:3]), []
        for start in range(0, len(frames), self.frames_per_step):
            chunk = frames[start : start + self.frames_per_step]
            # The last one is filled up, so that no other length must be compiled.
            fill = [(0, self.frames_per_step - len(chunk))] + [(0, 0)] * 3
            geometry, _, stream = self.model.step(stream, np.pad(chunk, fill, mode="edge")[None])
            parts.append(np.asarray(select(geometry))[0, : len(chunk)])
        return np.concatenate(parts)


def _depth(geometry: Reconstruction) -> jax.Array:
    return geometry.depth


def _head_cameras(geometry: Reconstruction) -> jax.Array:
    return geometry.cam_to_world


@jax.jit
def _ray_cameras(geometry: Reconstruction) -> jax.Array:
    return geometry.cameras_from_rays()[0]
