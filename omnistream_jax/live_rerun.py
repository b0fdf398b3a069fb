"""A live stream in Rerun: a recording on disk, the viewer, or both."""

from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.config import ConfigError
from omnistream_jax.live_result import Answer, Geometry, LiveError, Points, Result

_LONGEST_PATH = 512  # places of a camera's path that are drawn


class Recording:
    """Logs results on the timelines "frame" and "time"; what configs/stream.py lists.

    Args:
        path: of the recording; None: none.
        viewer: whether the viewer is started.
        question: whose answers will come with results; "": none.

    Raises:
        ConfigError: Rerun is not installed.
        LiveError: the viewer cannot be started.
    """

    def __init__(self, path: Path | None, viewer: bool, question: str = ""):
        self._rerun, self._path, self._viewer, self._empty = import_rerun(), path, viewer, True
        self._question = question
        self._recording = self._rerun.RecordingStream("omnistream_jax")
        self._camera_path = CameraPath(_LONGEST_PATH)
        sinks = []
        if viewer:
            try:
                self._rerun.spawn(connect=False, recording=self._recording)
            except RuntimeError as error:
                raise LiveError(f"viewer: {str(error).splitlines()[0]}") from error
            sinks.append(self._rerun.GrpcSink())
        if path is not None:
            self._aside = path.with_name(f"{path.name}.tmp")
            sinks.append(self._rerun.FileSink(str(self._aside)))
        self._recording.set_sinks(*sinks)

    def show(self, result: Result, colours: np.ndarray, depth_limits: tuple[float, float] | None) -> None:
        """Log a result.

        Args:
            result: with lengths in metres.
            colours: of its patches, uint8 [h, w, 3].
            depth_limits: the depths between which colours go; None where no depth is known yet.
        """
        rerun, log = self._rerun, self._recording.log
        if self._empty:
            self._begin(result.geometry is not None)
        self._recording.set_time("frame", sequence=result.index)
        self._recording.set_time("time", duration=result.frame.time)
        log("image", rerun.Image(result.frame.pixels).compress(jpeg_quality=85))
        log("features", rerun.Image(colours))
        log("latency/step", rerun.Scalars(1000 * result.step))
        if result.latency is not None:
            log("latency/capture_to_result", rerun.Scalars(1000 * result.latency))
        log("dropped", rerun.Scalars(result.dropped))
        if result.geometry is not None:
            self._show_geometry(result.geometry, depth_limits)
        if result.points is not None:
            self.show_points(result.points)
        if result.answer is not None:
            self.show_answer(result.answer)

    def show_points(self, points: Points) -> None:
        """Log points in place of those before, at the time of the last result."""
        shown = self._rerun.Points3D(points.positions, colors=points.colours, radii=points.voxel / 2)
        self._recording.log("world/points", shown)

    def show_answer(self, answer: Answer) -> None:
        """Log an answer at the time of the last result."""
        self._recording.log("answer", self._rerun.TextLog(answer.text))

    def close(self) -> None:
        """Give the file its name. Raises LiveError where it cannot be written."""
        try:
            self._recording.flush()
        except RuntimeError as error:
            if not self._viewer:
                raise LiveError(f"{self._path}: cannot be written ({error})") from error
            print(f"viewer: {error}", flush=True)  # it was closed, or never came up; the file is written all the same
        self._recording.disconnect()
        if self._path is not None:
            self._aside.unlink() if self._empty else self._aside.replace(self._path)

    def _begin(self, with_geometry: bool) -> None:
        """How the viewer lays it out."""
        self._empty, blueprint = False, self._rerun.blueprint
        pictures = [blueprint.Spatial2DView(origin=name, name=name) for name in ("image", "features")]
        plots = [blueprint.TimeSeriesView(origin=name, name=name) for name in ("latency", "dropped")]
        rows, shares = [blueprint.Horizontal(*pictures), blueprint.Horizontal(*plots)], [2, 1]
        if with_geometry:
            pictures.append(blueprint.Spatial2DView(origin="world/camera", name="depth"))
            world = blueprint.Spatial3DView(origin="world", name="world")
            rows, shares = [blueprint.Horizontal(*pictures), world, rows[1]], [2, 3, 1]
            self._recording.log("world", self._rerun.ViewCoordinates.RDF, static=True)
        if self._question:
            rows.append(blueprint.TextLogView(origin="answer", name=self._question))
            shares.append(1)
        self._recording.send_blueprint(blueprint.Vertical(*rows, row_shares=shares))

    def _show_geometry(self, geometry: Geometry, depth_limits: tuple[float, float] | None) -> None:
        rerun, log, pose = self._rerun, self._recording.log, geometry.cam_to_world
        height, width = geometry.depth.shape
        log("world/camera", rerun.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
        log("world/camera", rerun.Pinhole(image_from_camera=geometry.intrinsics, resolution=[width, height]))
        # Half precision: half the bytes, and 3 digits. What it cannot hold is unknown, 0, to Rerun too.
        known = geometry.known & (geometry.depth <= np.finfo(np.float16).max)
        depth = np.where(known, geometry.depth, 0).astype(np.float16)
        log("world/camera/depth", rerun.DepthImage(depth, meter=1.0, depth_range=depth_limits))
        log("world/path", rerun.LineStrips3D([self._camera_path.add(pose[:3, 3])]))


class CameraPath:
    """The places of a camera so far, evenly thinned so that they stay few however long the stream.

    Args:
        longest: places that a path has at most, 2 or more.
    """

    def __init__(self, longest: int):
        self._longest, self._places, self._every, self._count = longest, [], 1, 0

    def add(self, place: np.ndarray) -> np.ndarray:
        """The path [n, 3] to a further place [3], from the first to this one."""
        path = np.stack([*self._places, place])
        if self._count % self._every == 0:
            self._places.append(place)
        if len(self._places) == self._longest:
            self._places, self._every = self._places[::2], 2 * self._every
        self._count += 1
        return path


def import_rerun() -> Any:
    """The module `rerun` with its blueprints. Raises ConfigError where it is not installed."""
    try:
        import rerun
        import rerun.blueprint
    except ImportError as error:
        raise ConfigError("record, viewer: Rerun is missing; pip install -e '.[viz]', or leave both off") from error
    return rerun
