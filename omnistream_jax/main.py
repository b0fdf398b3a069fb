"""The command line: python -m omnistream_jax.main --config=FILE.py[:ARGUMENT] [--workdir=DIR] [--config.field=value].

Everything that a run does stands in its config; `config.job` names the job. Exit status: 0 done, 1 an error that the
message explains, 2 a configuration that cannot work.
"""

from pathlib import Path

from absl import flags, logging

from omnistream_jax import config as config_lib
from omnistream_jax import train
from omnistream_jax.checkpoint import CheckpointError
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.utils.lock import WorkdirLockedError

CONFIG = config_lib.define_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files lie; runs/NAME with the config's name if absent.")
JOBS = ("train",)
EXPLAINED = (CheckpointError, DataError, WeightsError, WorkdirLockedError, train.TrainingError)  # told without a trace


def main(_: list[str]) -> None:
    """Run the job that the config names."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every save in ten lines
    config = CONFIG.value
    if config.job not in JOBS:
        raise ConfigError(f"job: expected one of {', '.join(JOBS)}, got {config.job!r}")
    train.train(config, Path(WORKDIR.value or f"runs/{config.name}"))


if __name__ == "__main__":
    config_lib.run(main, errors=EXPLAINED)
