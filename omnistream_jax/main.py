"""The command line: python -m omnistream_jax.main --config=FILE.py[:ARGUMENT] [--workdir=DIR] [--config.field=value].

Everything that a run does stands in its config; `config.job` names the job. Exit status: 0 done, 1 an error that the
message explains, 2 a configuration that cannot work.
"""

import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax import evaluate, extract, live, train
from omnistream_jax.checkpoint import CheckpointError
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.utils import compilation
from omnistream_jax.utils.lock import WorkdirLockedError

CONFIG = config_lib.define_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where a training run's files lie; runs/NAME with the config's name if absent."
)
# Told without a trace.
EXPLAINED = (
    CheckpointError,
    DataError,
    WeightsError,
    WorkdirLockedError,
    evaluate.EvaluationError,
    extract.ExtractionError,
    live.LiveError,
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
    return JOBS[config.job](config)


def _train(config: ConfigDict) -> None:
    train.train(config, Path(WORKDIR.value or f"runs/{config.name}"))


def _extract(config: ConfigDict) -> int:
    if WORKDIR.present:
        raise ConfigError("workdir: extraction writes to --config.output=DIR")
    return extract.extract(config)


def _stream(config: ConfigDict) -> None:
    if WORKDIR.present:
        raise ConfigError("workdir: a stream writes to --config.output=DIR")
    live.stream(config)


def _evaluate(config: ConfigDict) -> int:
    if WORKDIR.present:
        raise ConfigError("workdir: an evaluation writes to --config.output=DIR")
    return evaluate.evaluate(config)


JOBS = {"train": _train, "extract": _extract, "stream": _stream, "evaluate": _evaluate}

if __name__ == "__main__":
    config_lib.run(main, errors=EXPLAINED)
