"""The command line: python -m omnistream_jax.main --config=FILE.py[:ARGUMENT] [--workdir=DIR] [--config.field=value].

Everything that a run does stands in its config; `config.job` names the job. launch/ starts many processes as one run.

Exit status, of all processes of a run where one fails:
    0     done
    1     an error that the message explains, a fault of the program with its stack trace, or a step beyond
          config.distributed.step_deadline_seconds with the stacks of all threads: starting again may help
    2     a configuration that cannot work: starting again cannot help
    75    stopped by SIGTERM when all was saved (config.requeue_exit_code): start it again, and it goes on
    134   (SIGABRT, by JAX) another process was not heard of for config.distributed.heartbeat_seconds
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax import distributed, evaluate, extract, launcher, live, plan, probe, propagate, train
from omnistream_jax.checkpoint import CheckpointError
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.launcher import Launch
from omnistream_jax.utils import compilation
from omnistream_jax.utils.lock import WorkdirLockedError

CONFIG = config_lib.define_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where a training run's files lie; runs/NAME with the config's name if absent."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "Of a run of many processes: HOST:PORT where process 0 listens.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many processes the run has.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
Job = Callable[[ConfigDict, Launch | None], int | None]
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


def main(_: list[str]) -> int | None:
    """Run the job that the config names; its exit status, None for 0."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every save in ten lines
    config = CONFIG.value
    if config.job not in JOBS:
        raise ConfigError(f"job: expected one of {', '.join(JOBS)}, got {config.job!r}")
    try:
        compilation.keep_compiled(config.compilation_cache)
    except OSError as error:  # slower starts, and nothing else
        print(f"compilation_cache: going on without ({error})", file=sys.stderr, flush=True)
    return JOBS[config.job](config, _launch())


def _launch() -> Launch | None:
    return launcher.detect(
        os.environ,
        jax.config.jax_platforms,
        coordinator=COORDINATOR.value,
        process_count=PROCESS_COUNT.value,
        process_id=PROCESS_ID.value,
    )


def _train(config: ConfigDict, launch: Launch | None) -> None:
    with distributed.connected(
        launch,
        start_seconds=config.distributed.start_seconds,
        heartbeat_seconds=config.distributed.heartbeat_seconds,
    ):
        train.train(config, Path(WORKDIR.value or f"runs/{config.name}"))


def _extract(config: ConfigDict, launch: Launch | None) -> int:
    """Processes share the items and else need nothing of each other: none waits, and none ends with another."""
    if WORKDIR.present:
        raise ConfigError("workdir: extraction writes to --config.output=DIR")
    if launch is None or config.process_count:
        return extract.extract(config)
    if launch.count is None:  # only the cluster itself knows it
        with distributed.connected(launch):
            return extract.extract(config)
    distributed.use_gpus(launch)
    return extract.extract(config, launch.index, launch.count)


def _in_one_process(job: str, run: Callable[[ConfigDict], int | None], writes: str) -> Job:
    """A job that knows no workdir and no other processes."""

    def start(config: ConfigDict, launch: Launch | None) -> int | None:
        if WORKDIR.present:
            raise ConfigError(f"workdir: {writes}")
        if launch is not None and launch.count not in (None, 1):
            raise ConfigError(f"job {job}: works in one process, got {launch.count} by {launch.launcher}")
        return run(config)

    return start


JOBS: dict[str, Job] = {
    "train": _train,
    "extract": _extract,
    "stream": _in_one_process("stream", live.stream, "a stream writes to --config.output=DIR"),
    "evaluate": _in_one_process("evaluate", evaluate.evaluate, "an evaluation writes to --config.output=DIR"),
    "probe": _in_one_process("probe", probe.probe, "a probe writes to --config.output=DIR"),
    "propagate": _in_one_process("propagate", propagate.propagate, "a propagation writes to --config.output=DIR"),
    "plan": _in_one_process("plan", plan.plan, "a plan writes nothing but to the terminal"),
}

if __name__ == "__main__":
    with distributed.ending_all_on_failure():
        config_lib.run(main, errors=EXPLAINED)
