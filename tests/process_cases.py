"""A program for two processes, and how tests run it: python process_cases.py MODE, with JAX_... telling who it is."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from omnistream_jax import launcher
from omnistream_jax.config import EXIT_CONFIG, ConfigError

PROGRAM = Path(__file__).resolve()


def environment(index: int, count: int, port: int, **variables: str) -> dict[str, str]:
    """Of process `index`: one CPU device, and where the others are."""
    places = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | places | variables


def run_two(mode: str, timeout: float = 90.0, **second: str) -> list[tuple[int, str, float]]:
    """Runs MODE in two processes; of each: its status, its output, and when it ended (time.time)."""
    port = launcher.free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-u", str(PROGRAM), mode],
            env=environment(index, 2, port, **(second if index else {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    ended: dict[int, float] = {}
    started = time.monotonic()
    try:
        while len(ended) < 2 and time.monotonic() - started < timeout:
            for index, child in enumerate(children):
                if index not in ended and child.poll() is not None:
                    ended[index] = time.time()
            if mode == "stops" and len(ended) == 1:  # the stopped one stays
                break
            time.sleep(0.02)
    finally:
        for child in children:
            child.kill()
    outputs = [child.communicate()[0] for child in children]
    return [(child.returncode, outputs[index], ended.get(index, 0.0)) for index, child in enumerate(children)]


def main(mode: str) -> int:
    """The job: the processes meet, and then one of them does what MODE says."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from omnistream_jax import distributed

    launch = launcher.detect(os.environ, jax.config.jax_platforms)
    with distributed.connected(launch, start_seconds=60, heartbeat_seconds=10):
        index = jax.process_index()
        for step in range(10_000):
            everyone = multihost_utils.process_allgather(np.array([index]))
            if step == 0:
                print("met", everyone.ravel().tolist(), flush=True)
            if mode == "ends":
                if index == 0:
                    time.sleep(2)  # over its last pictures
                else:  # a notice to one that is through
                    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
                break
            if index == 1 and step == 3:
                print(f"at {time.time()}", flush=True)
                if mode == "fails":
                    raise ConfigError("a file is missing on this machine")
                if mode == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if mode == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.02)
    print("after", flush=True)
    return 3 if mode == "ends" and index == 1 else 0


if __name__ == "__main__":
    from omnistream_jax import distributed

    with distributed.ending_all_on_failure():
        try:
            sys.exit(main(sys.argv[1]))
        except ConfigError as error:  # as config.run does
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CONFIG)
