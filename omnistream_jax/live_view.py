"""What is shown of a live stream: features as colours beside their frames, in a Rerun recording or viewer and a video.

Each sink shows one result after the other: what later heads predict (depth, camera path, points) joins `Result` and is
shown there.
"""

import contextlib
import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from omnistream_jax.config import ConfigError
from omnistream_jax.data.live_source import LiveFrame
from omnistream_jax.evals.pca import ColourBasis, fit_colours, side_by_side

RECORDING, VIDEO = "stream.rrd", "features.mp4"
_TICKS = 1000  # a second, in the video


class LiveError(RuntimeError):
    """The run cannot go on; the message names the file or the frame and why."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A frame and what the model made of it.

    Attributes:
        index: 0-based, of the frames that the model has seen.
        frame: pixels uint8 [H, W, 3] and times.
        patches: features [h, w, D] after the final norm.
        step: seconds in the model, until the features are on the host.
        latency: seconds from capture until then; None for a file that is read as fast as it goes.
        dropped: frames dropped so far.
    """

    index: int
    frame: LiveFrame
    patches: np.ndarray
    step: float
    latency: float | None
    dropped: int


class Drawing:
    """Colours features by a basis that the first frames fix, and shows them in every sink; use it with `with`."""

    def __init__(self, output: Path, *, pca_frames: int, record: bool, video: bool, viewer: bool):
        self._wanted, self._held, self._basis = pca_frames, [], None
        self._sinks: list[_Recording | _Video] = []
        if record or viewer:
            self._sinks.append(_Recording(output / RECORDING if record else None, viewer))
        if video:
            self._sinks.append(_Video(output / VIDEO))

    def show(self, result: Result) -> None:
        """Show a result, now or once the colours are fixed. Raises LiveError for features that are not finite."""
        if not np.isfinite(result.patches).all():
            raise LiveError(f"the features of frame {result.index} are not finite")
        if self._basis is not None:
            self._draw(result, self._basis)
        elif self._sinks:
            self._held.append(result)
            if len(self._held) == self._wanted:
                self._draw_held()

    def _draw_held(self) -> None:
        if self._held:
            self._basis = fit_colours(np.stack([result.patches for result in self._held]))
        for result in self._held:
            self._draw(result, self._basis)
        self._held = []

    def _draw(self, result: Result, basis: ColourBasis) -> None:
        colours = basis.colours(result.patches)
        for sink in self._sinks:
            sink.show(result, colours)

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            self._draw_held()


class _Video:
    """An mp4 of frames and colours side by side, at the frames' own times."""

    def __init__(self, path: Path):
        self._path, self._aside = path, path.with_name(f"{path.name}.tmp")
        self._container, self._stamp = None, -1

    def show(self, result: Result, colours: np.ndarray) -> None:
        picture = side_by_side(result.frame.pixels, colours)
        if picture.shape[0] % 2:  # of 4:2:0 video, both sides are even
            picture = np.pad(picture, [(0, 1), (0, 0), (0, 0)], mode="edge")
        if self._container is None:
            self._container = av.open(str(self._aside), "w", format="mp4")
            self._stream = self._container.add_stream("libx264", rate=30, options={"crf": "20", "preset": "veryfast"})
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._stamp = max(round(result.frame.time * _TICKS), self._stamp + 1)
        frame.pts, frame.time_base = self._stamp, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._aside.replace(self._path)


class _Recording:
    """Rerun: a recording on disk, the viewer, or both. What else is known of a frame is logged beside image."""

    def __init__(self, path: Path | None, viewer: bool):
        self._rerun, self._path, self._viewer, self._empty = import_rerun(), path, viewer, True
        self._recording = self._rerun.RecordingStream("omnistream_jax")
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
        blueprint = self._rerun.blueprint
        pictures = [blueprint.Spatial2DView(origin=name, name=name) for name in ("image", "features")]
        plots = [blueprint.TimeSeriesView(origin=name, name=name) for name in ("latency", "dropped")]
        rows = blueprint.Horizontal(*pictures), blueprint.Horizontal(*plots)
        self._recording.send_blueprint(blueprint.Vertical(*rows, row_shares=[2, 1]))

    def show(self, result: Result, colours: np.ndarray) -> None:
        rerun, log, self._empty = self._rerun, self._recording.log, False
        self._recording.set_time("frame", sequence=result.index)
        self._recording.set_time("time", duration=result.frame.time)
        log("image", rerun.Image(result.frame.pixels).compress(jpeg_quality=85))
        log("features", rerun.Image(colours))
        log("latency/step", rerun.Scalars(1000 * result.step))
        if result.latency is not None:
            log("latency/capture_to_result", rerun.Scalars(1000 * result.latency))
        log("dropped", rerun.Scalars(result.dropped))

    def close(self) -> None:
        try:
            self._recording.flush()
        except RuntimeError as error:
            if not self._viewer:
                raise LiveError(f"{self._path}: cannot be written ({error})") from error
            print(f"viewer: {error}", flush=True)  # it was closed, or never came up; the file is written all the same
        self._recording.disconnect()
        if self._path is not None:
            self._aside.unlink() if self._empty else self._aside.replace(self._path)


def import_rerun() -> Any:
    """The module `rerun` with its blueprints. Raises ConfigError where it is not installed."""
    try:
        import rerun
        import rerun.blueprint
    except ImportError as error:
        raise ConfigError("record, viewer: Rerun is missing; pip install -e .[viz], or leave both off") from error
    return rerun
