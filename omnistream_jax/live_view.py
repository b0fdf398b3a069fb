"""What is shown of a live stream: features as colours beside their frames, and depth; in Rerun and in a video."""

import contextlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from omnistream_jax.data.picture import colour_depth
from omnistream_jax.evals.pca import ColourBasis, fit_colours, side_by_side
from omnistream_jax.live_rerun import Recording
from omnistream_jax.live_result import Answer, Geometry, Points, Result

RECORDING, VIDEO = "stream.rrd", "features.mp4"
_TICKS = 1000  # a second, in the video
_UNKNOWN = (60, 60, 60)  # the colour of depth that is not known


class Drawing:
    """Colours features by a basis that the first frames fix, and shows them in every sink; use it with `with`.

    Args:
        output: the folder.
        pca_frames: frames that fix the basis.
        record, video, viewer: the sinks.
        question: whose answers will come with results; "": none.
    """

    def __init__(self, output: Path, *, pca_frames: int, record: bool, video: bool, viewer: bool, question: str = ""):
        self._wanted, self._held, self._basis = pca_frames, [], None
        self._depth_limits, self._last_points, self._last_answer = RunningLimits(), None, None
        path = output / RECORDING if record else None
        self._recording = Recording(path, viewer, question) if record or viewer else None
        self._sinks: list[Recording | _Video] = [] if self._recording is None else [self._recording]
        if video:
            self._sinks.append(_Video(output / VIDEO))

    def show(self, result: Result) -> None:
        """Show a result, now or once the colours are fixed; its features are finite."""
        if self._basis is not None:
            self._draw(result, self._basis)
        elif self._sinks:
            self._held.append(result)
            if len(self._held) == self._wanted:
                self._draw_held()

    def end_with(self, points: Points | None, answer: Answer | None) -> None:
        """Show these when everything else is shown; None: the last points stay, and no further answer comes."""
        self._last_points, self._last_answer = points, answer

    def _draw_held(self) -> None:
        if self._held:
            self._basis = fit_colours(np.stack([result.patches for result in self._held]))
        for result in self._held:
            self._draw(result, self._basis)
        self._held = []

    def _draw(self, result: Result, basis: ColourBasis) -> None:
        colours = basis.colours(result.patches)
        limits = None if result.geometry is None else self._depth_limits.follow(result.geometry)
        for sink in self._sinks:
            sink.show(result, colours, limits)

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            self._draw_held()
            if self._recording is not None and self._last_points is not None:
                self._recording.show_points(self._last_points)
            if self._recording is not None and self._last_answer is not None:
                self._recording.show_answer(self._last_answer)


class RunningLimits:
    """Depths between which colours go: a stream's 2nd and 98th percentile, followed slowly so that nothing flickers."""

    _SHARE = 0.05  # of a frame's own percentiles in the limits

    def __init__(self):
        self._logarithms: np.ndarray | None = None

    def follow(self, geometry: Geometry) -> tuple[float, float] | None:
        """The limits with a further frame, above 0; None while no depth was known."""
        depth = geometry.depth[geometry.known]
        if depth.size:
            own = np.log(np.percentile(depth.astype(np.float64), (2, 98)))
            before = own if self._logarithms is None else self._logarithms
            self._logarithms = before + self._SHARE * (own - before)
        return None if self._logarithms is None else tuple(np.exp(self._logarithms).tolist())


class _Video:
    """An mp4 of frames, colours and depth side by side, at the frames' own times."""

    def __init__(self, path: Path):
        self._path, self._aside = path, path.with_name(f"{path.name}.tmp")
        self._container, self._stamp = None, -1

    def show(self, result: Result, colours: np.ndarray, depth_limits: tuple[float, float] | None) -> None:
        picture = side_by_side(result.frame.pixels, colours)
        if result.geometry is not None:
            picture = np.concatenate([picture, _depth_picture(result.geometry, depth_limits)], axis=1)
        odd = [(0, side % 2) for side in picture.shape[:2]]  # of 4:2:0 video, both sides are even
        picture = np.pad(picture, [*odd, (0, 0)], mode="edge")
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


def _depth_picture(geometry: Geometry, limits: tuple[float, float] | None) -> np.ndarray:
    """uint8 [H, W, 3]: red is near, blue is far, grey is not known."""
    picture, known = np.full((*geometry.depth.shape, 3), _UNKNOWN, np.uint8), geometry.known
    if limits is not None:
        picture[known] = colour_depth(geometry.depth[known], limits)
    return picture
