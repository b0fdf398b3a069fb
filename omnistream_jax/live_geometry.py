"""The model of a live stream, with its geometry heads or without; and what becomes of the geometry."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax import geometry_model
from omnistream_jax import model as model_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.geometry_stream import POSE_SOURCES
from omnistream_jax.geometry_model import GeometryModel
from omnistream_jax.live_result import Geometry, Points, Result
from omnistream_jax.model import Model
from omnistream_jax.reconstruction.recorder import PointOptions, ReconstructionRecorder
from omnistream_jax.stream import Stream

_WRITTEN = ("depth_png", "depth_tensors", "trajectory", "intrinsics", "points", "metres_per_unit", "shard_frames")


def load(config: ConfigDict) -> Model | GeometryModel:
    """The checkpoint that the config names, with geometry heads if it asks for them.

    Raises:
        WeightsError: it cannot be read, or lacks them.
        ValueError: `compute_dtype` names no type.
    """
    dtype = model_lib.dtype_of(config.compute_dtype)
    return (geometry_model.load_geometry if config.geometry.enabled else model_lib.load)(config.checkpoint, dtype=dtype)


def open_stream(model: Model | GeometryModel, height: int, width: int, **options: Any) -> Stream:
    """One stream before its first frame; the options are those of `Model.open_stream`."""
    only = {} if isinstance(model, GeometryModel) else {"layers": ()}
    return model.open_stream(1, height, width, **only, **options)


def step(
    model: Model | GeometryModel, stream: Stream, pixels: np.ndarray, pose_source: str
) -> tuple[np.ndarray, Geometry | None, Stream]:
    """One frame uint8 [H, W, 3] through the model.

    Args:
        model, stream, pixels: see above.
        pose_source: "camera", the camera head, or "rays", solved from the ray map.

    Returns:
        On the host: features [h, w, D] and the geometry, None of a model without; and the stream after the frame.
    """
    if not isinstance(model, GeometryModel):
        out, stream = model.step(stream, pixels[None, None])
        return np.asarray(out.patches)[0, 0], None, stream
    found, out, stream = model.step(stream, pixels[None, None])
    cameras = found.cameras_from_rays() if pose_source == "rays" else (found.cam_to_world, found.intrinsics)
    host = jax.device_get((out.patches, found.depth, found.depth_confidence, *cameras))
    patches, *geometry = (leaf[0, 0] for leaf in host)
    return patches, Geometry(*geometry), stream


class GeometryRecording:
    """Writes the geometry of a stream, and says what of its points is to be seen; use it with `with`.

    Args:
        fields: `config.geometry`.
        output: the folder.
        units: of the model's lengths, for the summary.
        drawn: whether anybody looks at the points.

    Raises:
        ConfigError: naming the field that does not fit; nothing is written yet.
    """

    def __init__(self, fields: ConfigDict, output: Path, units: str, *, drawn: bool):
        if fields.pose_source not in POSE_SOURCES:
            expected = f"expected one of {', '.join(POSE_SOURCES)}"
            raise ConfigError(f"geometry.pose_source: {expected}, got {fields.pose_source!r}")
        for name in ("shown_every", "shown_points"):
            if fields[name] < 1:
                raise ConfigError(f"geometry.{name}: expected 1 or more, got {fields[name]}")
        options = _named("geometry.point_options.", lambda: PointOptions(**fields.point_options))
        written = {name: fields[name] for name in _WRITTEN}
        self._recorder = _named("geometry.", lambda: ReconstructionRecorder(output, point_options=options, **written))
        self._fields, self._units, self._drawn, self._pending = fields, units, drawn, False

    def add(self, result: Result) -> Result:
        """Write the geometry of a result: the result with its lengths in metres and, now and then, the points so far.

        Raises ReconstructionError for a camera that is none, or files that cannot be written.
        """
        geometry, frame = result.geometry, result.frame
        self._recorder.add(result.index, frame.time, frame.pixels, **vars(geometry))
        self._pending = bool(result.index % self._fields.shown_every)
        return dataclasses.replace(
            result,
            geometry=geometry.scaled(self._fields.metres_per_unit),
            points=None if self._pending else self._points(),
        )

    def last_points(self) -> Points | None:
        """The points in the end, unless the last result has them."""
        return self._points() if self._pending else None

    def _points(self) -> Points | None:
        cloud = self._recorder.cloud
        if cloud is None or not self._drawn:
            return None
        positions, colours = cloud.points, cloud.colours
        if len(positions) > self._fields.shown_points:  # by chance: even steps through the voxels would show as stripes
            chosen = np.random.default_rng(0).choice(len(positions), self._fields.shown_points, replace=False)
            positions, colours = positions[chosen], colours[chosen]
        return Points(positions, colours, cloud.voxel)

    @property
    def files(self) -> list[str]:
        """What is in the folder in the end, by name."""
        return self._recorder.files

    def __str__(self) -> str:
        """Lengths, and the points, in a line."""
        metres = f"{self._fields.metres_per_unit:g} m"
        unit = f"a unit is taken as {metres}" + (", the clip's own" if self._units == "clip" else "")
        cloud = self._recorder.cloud
        points = "" if cloud is None else f"{len(cloud):,} points in voxels of {cloud.voxel:g} m; "
        return f"geometry           {points}{unit}"

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the geometry; null where no points are collected."""
        cloud = self._recorder.cloud
        counts = dict.fromkeys(("points", "voxel", "unusable", "too_far"))
        if cloud is not None:
            counts = {
                "points": len(cloud),
                "voxel": cloud.voxel,
                "unusable": cloud.unusable,
                "too_far": cloud.too_far,
            }
        return {"units": self._units, "metres_per_unit": self._fields.metres_per_unit, **counts}

    def __enter__(self) -> "GeometryRecording":
        return self

    def __exit__(self, *_) -> None:
        self._recorder.close()


def _named(group: str, make: Callable[[], Any]) -> Any:
    """What `make` makes; the field in a DataError's message is given the name of its group."""
    try:
        return make()
    except DataError as error:
        raise ConfigError(f"{group}{error}") from error
