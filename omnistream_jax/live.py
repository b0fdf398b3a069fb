"""Live: frames of a file, a webcam or a network stream through the model as they come: features, geometry, answers.

One thread reads (data/live_source.py); this one steps the model (live_geometry.py), asks it (live_question.py), writes
and draws (live_view.py).
"""

import contextlib
import dataclasses
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax import live_geometry, live_question
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.live_source import LiveOptions, LiveReader, Source, find_source
from omnistream_jax.geometry_model import GeometryModel
from omnistream_jax.live_geometry import GeometryRecording
from omnistream_jax.live_question import Answering, Question
from omnistream_jax.live_rerun import import_rerun
from omnistream_jax.live_result import Geometry, LiveError, Result
from omnistream_jax.live_view import RECORDING, VIDEO, Drawing
from omnistream_jax.model import Model
from omnistream_jax.reconstruction.files import ReconstructionError
from omnistream_jax.stream import Stream
from omnistream_jax.utils.compilation import CompileCounter, Compiled
from omnistream_jax.utils.device_memory import full_device_told
from omnistream_jax.utils.files import write_json
from omnistream_jax.utils.lock import WorkdirLock

SUMMARY = "summary.json"
_DRAWN = ("pca_frames", "record", "video", "viewer", "question")  # fields that say what is drawn
_KEPT = 100_000  # latest latencies, of which the percentiles are taken


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same during a run."""

    config: ConfigDict
    model: Model | GeometryModel
    question: Question | None
    source: Source
    reading: LiveOptions
    output: Path

    def open_stream(self) -> Stream:
        """The stream before its first frame."""
        config = self.config
        return live_geometry.open_stream(
            self.model,
            config.height,
            config.width,
            window=config.window or None,
            sinks=config.sinks,
            cache_dtype=None if config.cache_dtype == "auto" else config.cache_dtype,
        )

    def step(self, stream: Stream, pixels: np.ndarray) -> tuple[np.ndarray, Geometry | None, Stream]:
        """See `live_geometry.step`."""
        return live_geometry.step(self.model, stream, pixels, self.config.geometry.pose_source)

    def open_recording(self) -> GeometryRecording | None:
        """What writes the geometry; None where none is asked for."""
        if not isinstance(self.model, GeometryModel):
            return None
        drawn = self.config.record or self.config.viewer
        return GeometryRecording(self.config.geometry, self.output, self.model.heads.config.units, drawn=drawn)

    def open_answering(self) -> Answering | None:
        """What asks the question; None where there is none."""
        return None if self.question is None else Answering(self.question, self.output, _say)


def stream(config: ConfigDict) -> None:
    """Run as the config says; configs/stream.py tells what is written into `config.output`.

    Raises:
        ConfigError: a field does not fit.
        DataError: the source cannot be opened or read on; what was read until then is written.
        WeightsError: the checkpoint cannot be read, or lacks the geometry heads or the decoder that are asked for.
        WorkdirLockedError: another run works in `config.output`.
        LiveError: out of memory, features that are not finite, a camera that is none, a decoder that gives no numbers,
            or files that cannot be written.
    """
    with _stop_on_signals() as stop, CompileCounter() as compiled:
        job = build(config)
        with _explained(job), WorkdirLock(job.output):
            if not stop.is_set():
                _warm_up(job)
            _say(f"{compiled.total}; reading {job.source.address}")
            with LiveReader(job.source, job.reading, stop) as reader:
                tally, ended = Tally(config.log_seconds), "an error"
                recording, answering = job.open_recording(), job.open_answering()
                try:
                    drawn = {name: config[name] for name in _DRAWN}
                    with Drawing(job.output, **drawn) as drawing, recording or contextlib.nullcontext():
                        ended = _run(job, reader, stop, tally, drawing, recording, answering)
                except (DataError, LiveError, ReconstructionError) as error:
                    ended = str(error)
                    raise
                finally:
                    counts = {"ended": ended, "dropped": reader.dropped, "damaged": reader.damaged}
                    _finish(job, counts | tally.summary(compiled.total), recording, answering)


def build(config: ConfigDict) -> Job:
    """Check the fields and load the model; nothing is written yet. Raises ConfigError, DataError or WeightsError."""
    for name in ("output", "checkpoint"):
        if not config[name]:
            raise ConfigError(f"{name}: expected a directory, got none; give --config.{name}=DIR")
    for name, least in (("pca_frames", 1), ("max_frames", 0), ("window", 0)):
        if config[name] < least:
            raise ConfigError(f"{name}: expected {least} or more, got {config[name]}")
    if not config.log_seconds > 0:
        raise ConfigError(f"log_seconds: expected a positive number of seconds, got {config.log_seconds}")
    if config.viewer and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("viewer: there is no display here; leave it off, and open the recording elsewhere")
    if config.record or config.viewer:
        import_rerun()
    names = [field.name for field in dataclasses.fields(LiveOptions) if field.name in config]
    reading = LiveOptions(**{name: config[name] for name in names})
    source = find_source(config.input)
    try:
        reading.check(source)
        job = Job(config, *live_question.load(config), source, reading, Path(config.output))
        job.open_stream()
        job.open_recording()
    except WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return job


def _warm_up(job: Job) -> None:
    """Compile before the first frame comes. The second step is the first with a cache that a step has made."""
    state, pixels = job.open_stream(), np.zeros((job.config.height, job.config.width, 3), np.uint8)
    for _ in range(2):
        patches, _, state = job.step(state, pixels)
    if job.question is not None:
        live_question.warm_up(job.question, patches)


def _run(
    job: Job,
    reader: LiveReader,
    stop: threading.Event,
    tally: "Tally",
    drawing: Drawing,
    recording: GeometryRecording | None,
    answering: Answering | None,
) -> str:
    """Every frame through the model; why it ended."""
    state = job.open_stream()
    try:
        with answering or contextlib.nullcontext():
            for frame in reader:
                began = time.monotonic()
                patches, geometry, state = job.step(state, frame.pixels)
                done = time.monotonic()
                latency = None if frame.captured is None else done - frame.captured
                result = Result(tally.frames, frame, patches, geometry, done - began, latency, reader.dropped)
                result.check()
                if recording is not None:
                    result = recording.add(result)
                if answering is not None:
                    result = answering.add(result)
                tally.add(result)
                drawing.show(result)
                if tally.frames == job.config.max_frames:
                    return "max_frames"
            return "stopped" if stop.is_set() else "end of the input"
    finally:
        points = None if recording is None else recording.last_points()
        drawing.end_with(points, None if answering is None else answering.last)


class Tally:
    """Counts and latencies: a line every few seconds, and the summary. Its memory does not grow."""

    def __init__(self, every: float):
        self._every, self._recent = every, []
        self._latencies = {"step": deque(maxlen=_KEPT), "capture_to_result": deque(maxlen=_KEPT)}
        self._longest = dict.fromkeys(self._latencies, 0.0)
        self._started = self._ended = self._told = 0.0
        self.frames = 0

    def add(self, result: Result) -> None:
        """One more result has just come out."""
        self._ended = time.monotonic()
        if not self.frames:
            self._started = self._told = self._ended - result.step
        self.frames += 1
        self._recent.append(result.step)
        for name, seconds in (("step", result.step), ("capture_to_result", result.latency)):
            if seconds is not None:
                self._latencies[name].append(seconds)
                self._longest[name] = max(self._longest[name], seconds)
        if (passed := self._ended - self._told) >= self._every:
            rate, middle = len(self._recent) / passed, 1000 * np.median(self._recent)
            _say(f"{self.frames:,} frames | {rate:.1f} frames/s | p50 {middle:.1f} ms | dropped {result.dropped:,}")
            self._told, self._recent = self._ended, []

    def summary(self, compiled: Compiled) -> dict[str, Any]:
        """What summary.json holds; percentiles are null where nothing was measured."""
        seconds = self._ended - self._started
        latencies = {}
        for name, values in self._latencies.items():
            percentiles = 1000 * np.percentile(values, (50, 90, 99)) if values else [None] * 3
            longest = 1000 * self._longest[name] if values else None
            latencies[f"{name}_ms"] = dict(zip(("p50", "p90", "p99", "max"), [*percentiles, longest], strict=True))
        statistics = jax.devices()[0].memory_stats() or {}
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
        return {
            "frames": self.frames,
            "seconds": seconds,
            "frames_per_second": self.frames / seconds if seconds else None,
            **latencies,
            "device": jax.devices()[0].device_kind,
            "peak_memory_bytes": {"device": statistics.get("peak_bytes_in_use"), "process": process},
            "compiled": dataclasses.asdict(compiled),
        }


def _finish(
    job: Job, summary: dict[str, Any], recording: GeometryRecording | None, answering: Answering | None
) -> None:
    """Write the summary, and tell it."""
    drawn = [name for name, on in ((RECORDING, job.config.record), (VIDEO, job.config.video)) if on]
    parts = {"geometry": recording, "answers": answering}
    files = [name for name in drawn if summary["frames"]]
    for name, part in parts.items():
        summary[name] = None if part is None else part.summary()
        files += [] if part is None else part.files
    summary["files"] = files
    write_json(job.output / SUMMARY, summary)
    counts = f"{summary['frames']:,} frames, {summary['dropped']:,} dropped, {summary['damaged']:,} damaged"
    if not summary["frames"]:
        _say(f"{summary['ended']}: {counts}")
        return
    _say(f"{summary['ended']}: {counts}, {summary['frames_per_second'] or 0:.1f} frames/s")
    for name in ("step", "capture_to_result"):
        values = [f"{key} {value:.1f}" for key, value in summary[f"{name}_ms"].items() if value is not None]
        if values:
            _say(f"{name.replace('_', ' '):<18} {'  '.join(values)} ms")
    for part in parts.values():
        if part is not None:
            _say(str(part))
    memory = {name: size for name, size in summary["peak_memory_bytes"].items() if size}
    _say("peak memory        " + "  ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory.items()))
    _say(f"{Compiled(**summary['compiled'])}\n" + "\n".join(str(job.output / name) for name in [*files, SUMMARY]))


# Endings


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal does what the first would have done without us."""
    stop, earlier = threading.Event(), {}

    def handle(number: int, _) -> None:
        stop.set()
        signal.signal(number, earlier[number])

    if threading.current_thread() is threading.main_thread():
        earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, action in earlier.items():
            signal.signal(number, action)


@contextlib.contextmanager
def _explained(job: Job) -> Iterator[None]:
    """What can go wrong outside the program as a LiveError."""
    hint = "a smaller window" if job.config.window else "a window"
    hint += "" if job.question is None else ", or fewer answer.max_frames"
    try:
        with full_device_told(LiveError, hint):
            yield
    except ReconstructionError as error:
        raise LiveError(str(error)) from error
    except (OSError, av.FFmpegError) as error:
        raise LiveError(f"{job.output}: cannot be written ({error})") from error


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)
