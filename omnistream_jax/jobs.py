"""The jobs that `config.job` names: how each is started, alone or as one of many processes, and what it tells."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from omnistream_jax import distributed, evaluate, extract, live, plan, probe, propagate, train
from omnistream_jax.checkpoint import CheckpointError
from omnistream_jax.config import ConfigError, check_fields
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.launcher import Launch
from omnistream_jax.utils.lock import WorkdirLockedError

Job = Callable[[ConfigDict, str | None, Launch | None], int | None]
"""Of a config, --workdir and what started this process; gives the exit status, None for 0."""
# Told without a trace.
EXPLAINED = (
    CheckpointError,
    DataError,
    WeightsError,
    WorkdirLockedError,
    distributed.DistributedError,
    evaluate.EvaluationError,
    extract.ExtractionError,
    live.LiveError,
    probe.ProbeError,
    propagate.PropagationError,
    train.TrainingError,
)


def check_job(config: ConfigDict) -> None:
    """Raises ConfigError where `config.job` names no job, or one that reads fields which the config lacks."""
    if config.get("job") not in JOBS:
        raise ConfigError(f"job: expected one of {', '.join(JOBS)}, got {config.get('job')!r}")
    check_fields(config, "job", FIELDS[config.job])


def run_job(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int | None:
    """The job's exit status, None for 0.

    Args:
        config: that `check_job` has passed.
        workdir: where its files lie; None: where the config says.
        launch: what started this process as one of many; None: nothing did.

    Raises:
        ConfigError: a field does not fit.
        Exception: one of EXPLAINED.
    """
    return JOBS[config.job](config, workdir, launch)


def _train(config: ConfigDict, workdir: str | None, launch: Launch | None) -> None:
    with distributed.connected(
        launch,
        start_seconds=config.distributed.start_seconds,
        heartbeat_seconds=config.distributed.heartbeat_seconds,
        heeds_notices=True,
    ):
        train.train(config, Path(workdir or f"runs/{config.name}"))


def _extract(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int:
    """Processes share the items and else need nothing of each other: none waits, and none ends with another."""
    _take_output(config, workdir)
    with distributed.ending_on_sigterm():
        if launch is None or config.process_count:
            return extract.extract(config)
        if launch.count is None:  # only the cluster itself knows it
            with distributed.connected(launch):
                return extract.extract(config)
        distributed.use_gpus(launch)
        return extract.extract(config, launch.index, launch.count)


def _plan(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int | None:
    if workdir is not None:
        raise ConfigError("workdir: a plan writes nothing but to the terminal")
    _require_one_process("plan", launch)
    return plan.plan(config)


def _evaluating(run: Callable[[ConfigDict], int | None]) -> Job:
    """A job that writes to `config.output`, of which many processes do shares."""

    def start(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int | None:
        _take_output(config, workdir)
        with distributed.ending_on_sigterm(), distributed.connected(launch):
            return run(config)

    return start


def _stream(config: ConfigDict, workdir: str | None, launch: Launch | None) -> None:
    _take_output(config, workdir)
    _require_one_process("stream", launch)
    live.stream(config)


def _take_output(config: ConfigDict, workdir: str | None) -> None:
    """--workdir=DIR is --config.output=DIR."""
    if workdir is None:
        return
    if config.output not in ("", workdir):
        raise ConfigError(f"workdir: {workdir} and output: {config.output} name the same; give one of them")
    config.output = workdir


def _require_one_process(job: str, launch: Launch | None) -> None:
    if launch is not None and launch.count not in (None, 1):
        raise ConfigError(f"job {job}: works in one process, got {launch.count} by {launch.launcher}")


JOBS: dict[str, Job] = {
    "train": _train,
    "extract": _extract,
    "stream": _stream,
    "evaluate": _evaluating(evaluate.evaluate),
    "probe": _evaluating(probe.probe),
    "propagate": _evaluating(propagate.propagate),
    "plan": _plan,
}

_ANY = ("compilation_cache",)
_TRAINING = (
    *(*_ANY, "name", "seed", "steps", "model", "mesh", "init", "optimizer", "self_supervision", "geometry", "language"),
    *("tasks", "loader", "log_every", "pictures_every", "profile", "max_nonfinite_steps", "requeue_exit_code"),
    *("distributed", "checkpoint", "evaluation", "evaluators"),
)
_MODEL = ("output", "checkpoint", "window", "sinks", "compute_dtype")  # of all that stream frames through a model
FIELDS: dict[str, tuple[str, ...]] = {
    "train": _TRAINING,
    "plan": (*_TRAINING, "topology"),
    "extract": (
        *(*_ANY, *_MODEL, "input", "frame_rate", "image_rate", "height", "width", "resize", "chunk", "tokens"),
        *("aspect_ratio", "final", "layers", "dtype", "workers", "prefetch", "log_seconds"),
        *("process_index", "process_count"),
    ),
    "stream": (
        *(*_ANY, *_MODEL, "input", "height", "width", "resize", "frame_rate", "realtime", "drop_frames", "max_frames"),
        *("cache_dtype", "geometry", "question", "answer", "pca_frames", "record", "video", "viewer", "log_seconds"),
    ),
    "evaluate": (
        *(*_ANY, *_MODEL, "benchmarks", "allow_incomplete", "align", "pose_source", "long_side", "time_unit"),
        *("frames_per_step", "plots"),
    ),
    "probe": (
        *(*_ANY, "output", "checkpoint", "compute_dtype", "probe", "data", "benchmark", "allow_incomplete", "seed"),
        *("preset", "presets", "learning_rates", "weight_decays", "learning_rate_batch", "steps", "batch", "augment"),
        *("evaluate_every", "evaluate_batch", "heads_at_once", "encode_batch", "checkpoint_every", "log_every"),
        *("time_unit", "mesh", "loader", "plots"),
    ),
    "propagate": (
        *(*_ANY, *_MODEL, "predictions", "data", "allow_incomplete", "presets", "preset", "void", "time_unit"),
        *("frames_per_step", "world", "plots", "features", "short_side", "rounding", "multiple", "interpolation"),
        *("deviation", "context", "radius", "neighbourhood", "top", "temperature", "upsampling", "flat_channel"),
    ),
}
"""What each job reads at the top level of its config; `probe.build` checks what a protocol reads besides."""
