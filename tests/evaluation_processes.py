"""Evaluations one after the other, in one of several connected processes: python evaluation_processes.py FILE, where
the file has a Python literal, [(config, {field: value}), ...], and JAX_... tell who the process is.
"""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = Path(__file__).resolve()
Runs = Sequence[tuple[str, dict[str, object]]]


def run_all(runs: Runs) -> None:
    """In this process."""
    from omnistream_jax import config as config_lib
    from omnistream_jax import evaluate, probe, propagate

    jobs = {"evaluate": evaluate.evaluate, "probe": probe.probe, "propagate": propagate.propagate}
    for path, fields in runs:
        config = config_lib.load(path, fields)
        jobs[config.job](config)


def main(file: str) -> None:
    """As the module says."""
    import jax

    from omnistream_jax import distributed, launcher, sharding

    jax.config.update("jax_disable_most_optimizations", True)
    sharding.SMALLEST_SPLIT = 64  # so that "fsdp" splits a tiny backbone
    launch = launcher.detect(os.environ, jax.config.jax_platforms)
    with distributed.ending_all_on_failure(), distributed.connected(launch, heartbeat_seconds=60):
        run_all(ast.literal_eval(Path(file).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1])
