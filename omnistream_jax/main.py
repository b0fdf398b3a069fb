"""The command line: python -m omnistream_jax.main --config=FILE.py[:ARGUMENT] [--workdir=DIR] [--config.field=value].

Everything that a run does stands in its config; `config.job` names the job. launch/ starts many processes as one run.

Exit status, of all processes of a run where one fails:
    0     done
    1     an error that the message explains, a fault of the program with its stack trace, or a step beyond
          config.distributed.step_deadline_seconds with the stacks of all threads: starting again may help
    2     a configuration that cannot work: starting again cannot help
    75    stopped by SIGTERM when all was saved (config.requeue_exit_code; of evaluations and extractions 75): start it
          again, and it goes on
    134   (SIGABRT, by JAX) another process was not heard of for config.distributed.heartbeat_seconds
"""

import os
import sys

import jax
from absl import flags, logging

from omnistream_jax import config as config_lib
from omnistream_jax import distributed, jobs, launcher
from omnistream_jax.utils import compilation

CONFIG = config_lib.define_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where a run's files lie; if absent, runs/NAME with the config's name, or --config.output."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "Of a run of many processes: HOST:PORT where process 0 listens.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many processes the run has.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(_: list[str]) -> int | None:
    """Run the job that the config names; its exit status, None for 0."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every save in ten lines
    config = CONFIG.value
    jobs.check_job(config)
    try:
        compilation.keep_compiled(config.compilation_cache)
    except OSError as error:  # slower starts, and nothing else
        print(f"compilation_cache: going on without ({error})", file=sys.stderr, flush=True)
    launch = launcher.detect(
        os.environ,
        jax.config.jax_platforms,
        coordinator=COORDINATOR.value,
        process_count=PROCESS_COUNT.value,
        process_id=PROCESS_ID.value,
    )
    return jobs.run_job(config, WORKDIR.value, launch)


if __name__ == "__main__":
    with distributed.ending_all_on_failure():
        config_lib.run(main, errors=jobs.EXPLAINED)
