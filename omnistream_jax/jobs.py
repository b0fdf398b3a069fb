"""The jobs that `config.job` names: how each is started, alone or as one of many processes, and what it tells."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from omnistream_jax import distributed, evaluate, extract, live, plan, probe, propagate, train
from omnistream_jax.checkpoint import CheckpointError
from omnistream_jax.config import ConfigError
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


def run_job(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int | None:
    """The job's exit status, None for 0.

    Args:
        config: names it in `job`.
        workdir: where its files lie; None: where the config says.
        launch: what started this process as one of many; None: nothing did.

    Raises:
        ConfigError: a field does not fit.
        Exception: one of EXPLAINED.
    """
    if config.job not in JOBS:
        raise ConfigError(f"job: expected one of {', '.join(JOBS)}, got {config.job!r}")
    return JOBS[config.job](config, workdir, launch)


def _train(config: ConfigDict, workdir: str | None, launch: Launch | None) -> None:
    with distributed.connected(
        launch,
        start_seconds=config.distributed.start_seconds,
        heartbeat_seconds=config.distributed.heartbeat_seconds,
    ):
        train.train(config, Path(workdir or f"runs/{config.name}"))


def _extract(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int:
    """Processes share the items and else need nothing of each other: none waits, and none ends with another."""
    _take_output(config, workdir)
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


def _in_one_process(job: str, run: Callable[[ConfigDict], int | None]) -> Job:
    """A job that writes to `config.output` and knows no other processes."""

    def start(config: ConfigDict, workdir: str | None, launch: Launch | None) -> int | None:
        _take_output(config, workdir)
        _require_one_process(job, launch)
        return run(config)

    return start


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
    "stream": _in_one_process("stream", live.stream),
    "evaluate": _in_one_process("evaluate", evaluate.evaluate),
    "probe": _in_one_process("probe", probe.probe),
    "propagate": _in_one_process("propagate", propagate.propagate),
    "plan": _plan,
}
