"""A run to be killed: python tests/fault_victim.py WORKDIR '{"steps": 40, ...}' [PORT PROCESSES INDEX].

The fields are those of `fault_cases.toy_config` or, with "real": true, of `training_cases.small_config`.
"""

import json
import sys
from pathlib import Path

import jax


def main(workdir: str, fields: str, *distributed: str) -> None:
    """Runs it, alone or as one of several processes of a run that meet at a port of this machine."""
    if distributed:
        port, processes, index = map(int, distributed)
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index, heartbeat_timeout_seconds=20)
    import fault_cases  # these ask for devices
    import training_cases

    from omnistream_jax import train

    options = json.loads(fields)
    if options.pop("real", False):
        train.train(training_cases.small_config(**options), Path(workdir))
    else:
        fault_cases.train_toy(fault_cases.toy_config(**options), Path(workdir))
    if distributed:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
