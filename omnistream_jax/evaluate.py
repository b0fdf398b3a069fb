"""A checkpoint's streaming geometry, by the protocols in evals/video_depth.py and camera_pose.py.

A sequence that is finished has its file of numbers, written aside and renamed, so a killed run costs one sequence. Many
processes share the sequences; each streams its own on its first device.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError, fingerprint
from omnistream_jax.data.benchmarks.base import Benchmark
from omnistream_jax.data.benchmarks.registry import OPENERS, open_benchmark
from omnistream_jax.evals import figures, geometry_plots, geometry_table
from omnistream_jax.evals.camera_pose import PoseResult, aggregate_poses, evaluate_camera_pose
from omnistream_jax.evals.depth_metrics import ALIGNMENTS
from omnistream_jax.evals.geometry_stream import SequenceStreamer
from omnistream_jax.evals.result_files import ResultFiles, made_by
from omnistream_jax.evals.video_depth import DepthResult, aggregate_depth, evaluate_video_depth
from omnistream_jax.geometry_model import CONFIG_NAME, WEIGHTS_NAME, load_geometry
from omnistream_jax.model import dtype_of
from omnistream_jax.utils.agreement import from_all, from_first_process, lock_workdir, say, share
from omnistream_jax.utils.device_memory import full_device_told
from omnistream_jax.utils.files import write_json

SUMMARY, SETTINGS = "geometry.json", "settings.json"
_SHOWN = 4  # frames of a sequence in its picture


class EvaluationError(RuntimeError):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked configuration with what it names."""

    config: ConfigDict
    benchmarks: tuple[Benchmark, ...]
    streamer: SequenceStreamer
    files: ResultFiles


def evaluate(config: ConfigDict) -> int:
    """Evaluate as the config says; configs/evaluate_geometry.py tells what is left in `config.output`.

    Returns:
        The exit status: 0 if every sequence has a score, 1 if some have none.

    Raises:
        ConfigError: a field does not fit, or `config.output` holds results of other settings.
        DataError: a benchmark is not complete, or a file of it is damaged; finished sequences are kept.
        WeightsError: the checkpoint cannot be read.
        WorkdirLockedError: another run works in `config.output`.
        EvaluationError: out of memory, or results that cannot be written.
    """
    job = build(config)
    summary = job.files.folder / SUMMARY
    with _explained(job), lock_workdir(job.files.folder):
        refusal = f"output: {summary.parent} holds results of other settings; use those, or another directory"
        settings = job.files.settings
        remember = functools.partial(config_lib.remember_settings, settings, summary.with_name(SETTINGS), refusal)
        from_first_process(remember, errors=(ConfigError,))
        benchmarks = {benchmark.name: _evaluate_benchmark(job, benchmark) for benchmark in job.benchmarks}
        if jax.process_index() == 0:
            content = {"config": config_lib.to_plain(config), "settings": settings, **made_by()}
            write_json(summary, content | {"benchmarks": benchmarks})
    say(f"{geometry_table.geometry_table(benchmarks, config.align)}\n{summary}")
    return 1 if any(each["problem"] for each in benchmarks.values()) else 0


def build(config: ConfigDict) -> Job:
    """Check the fields, count the data and load the model; nothing is written yet. Raises as `evaluate`."""
    for name in ("output", "checkpoint"):
        if not config[name]:
            raise ConfigError(f"{name}: expected a directory, got none; give --config.{name}=DIR")
    folders = {name: folder for name, folder in config.benchmarks.items() if folder}
    if not folders:
        raise ConfigError("benchmarks: none has a folder; give --config.benchmarks.NAME=DIR")
    if config.align not in ALIGNMENTS:
        raise ConfigError(f"align: expected one of {', '.join(ALIGNMENTS)}, got {config.align!r}")
    if config.window < 0:
        raise ConfigError(f"window: expected a number of frames, or 0 for all, got {config.window}")
    benchmarks = [open_benchmark(name, folder, config.allow_incomplete) for name, folder in folders.items()]
    benchmarks.sort(key=lambda benchmark: list(OPENERS).index(benchmark.name))  # a ConfigDict sorts by the alphabet
    try:
        if config.plots:
            figures.check_plotting()
        model = load_geometry(config.checkpoint, dtype=dtype_of(config.compute_dtype))
        fields = {name: config[name] for name in ("sinks", "frames_per_step", "pose_source")}
        streamer = SequenceStreamer(model, config.window or None, time_unit=config.time_unit or None, **fields)
    except WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.long_side < streamer.patch:
        raise ConfigError(f"long_side: expected a patch of {streamer.patch} pixels or more, got {config.long_side}")
    if config.align == "metric" and model.heads.config.units != "metres":
        raise ConfigError("align: metric needs a model in metres, this one's unit is the size of the clip")
    settings = {name: config[name] for name in ("align", "long_side", "window", *fields)} | {
        "time_unit": config.time_unit or model.model.config.time_unit,
        "compute_dtype": model.model.backbone.dtype.name,
        "model": fingerprint(config.checkpoint, CONFIG_NAME, WEIGHTS_NAME),
    }
    return Job(config, tuple(benchmarks), streamer, ResultFiles(Path(config.output), settings, config.plots))


def _evaluate_benchmark(job: Job, benchmark: Benchmark) -> dict[str, Any]:
    """Every sequence, and their mean; those of this process's share are evaluated here."""
    files, sequences = job.files, {sequence.name: sequence for sequence in benchmark.sequences}

    def finished() -> dict[str, dict[str, Any]]:
        stored = {name: files.read(benchmark, sequence) for name, sequence in sequences.items()}
        return {name: row for name, row in stored.items() if row is not None}

    kept = from_first_process(finished)
    say(f"{benchmark.name}: {benchmark.counts().describe()}; {len(kept)} finished already")
    mine = share({name: len(sequence.frame_paths) for name, sequence in sequences.items() if name not in kept})
    rows: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    for result in _results(job, benchmark, skip=sequences.keys() - set(mine)):
        metrics = None if result.metrics is None else dataclasses.asdict(result.metrics)
        if files.plots and metrics is not None:
            draw = geometry_plots.plot_depth if benchmark.task == "depth" else geometry_plots.plot_trajectory
            draw(result, files.plot_path(benchmark, result.name))
        row = {"frames": result.frames, "metrics": metrics, "problem": result.problem}
        row |= {"seconds": round(time.monotonic() - began, 3), **made_by()}
        rows[result.name] = files.write(benchmark, sequences[result.name], row)
        told = result.problem or geometry_table.line(benchmark.task, metrics)
        print(f"{benchmark.name} {result.name}: {told} ({result.frames} frames, {row['seconds']:.1f} s)", flush=True)
        began = time.monotonic()
    rows = kept | {name: row for part in from_all(rows) for name, row in part.items()}
    rows = {name: rows[name] for name in sequences}
    aggregate, problem = None, None
    try:
        aggregate = (aggregate_depth if benchmark.task == "depth" else aggregate_poses)(rows)
    except ValueError as error:
        problem = str(error)
    return {"data": benchmark.settings(), "aggregate": aggregate, "problem": problem, "sequences": rows}


def _results(job: Job, benchmark: Benchmark, skip: set[str]) -> Iterator[DepthResult | PoseResult]:
    sizes = {"long_side": job.config.long_side, "patch": job.streamer.patch}
    if benchmark.task == "pose":
        return evaluate_camera_pose(job.streamer.cam_to_world, benchmark, skip=skip, **sizes)
    show = _SHOWN if job.files.plots else 0
    depth = job.streamer.depth
    return evaluate_video_depth(depth, benchmark, align=job.config.align, skip=skip, show=show, **sizes)


@contextlib.contextmanager
def _explained(job: Job) -> Iterator[None]:
    """What can go wrong outside the program as an EvaluationError."""
    hint = "a smaller window, long_side or frames_per_step" if job.config.window else "a window"
    try:
        with full_device_told(EvaluationError, hint):
            yield
    except OSError as error:
        raise EvaluationError(f"{job.files.folder}: the evaluation cannot go on ({error})") from error
