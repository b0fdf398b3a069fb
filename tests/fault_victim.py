"""A run to be killed: python tests/fault_victim.py WORKDIR '{"steps": 40, ...}' [PORT PROCESSES INDEX].

The fields are those of `fault_cases.toy_config` or, with "real": true, of `training_cases.small_config`; of a toy,
"poison" is that of `fault_cases.train_toy`.
"""

import json
import sys
from pathlib import Path

from omnistream_jax.distributed import connected, ending_all_on_failure
from omnistream_jax.launcher import Launch


def main(workdir: str, fields: str, *distributed: str) -> None:
    """Runs it, alone or as one of several processes of a run that meet at a port of this machine."""
    launch = None
    if distributed:
        port, processes, index = map(int, distributed)
        launch = Launch("flags", processes, index, f"127.0.0.1:{port}", one_machine=True)
    with connected(launch, heartbeat_seconds=20, heeds_notices=True):
        import fault_cases  # these ask for devices
        import training_cases

        from omnistream_jax import train

        options = json.loads(fields)
        if options.pop("real", False):
            train.train(training_cases.small_config(**options), Path(workdir))
        else:
            poison = options.pop("poison", None)
            fault_cases.train_toy(fault_cases.toy_config(**options), Path(workdir), poison)


if __name__ == "__main__":
    with ending_all_on_failure():  # as omnistream_jax.main
        main(*sys.argv[1:])
