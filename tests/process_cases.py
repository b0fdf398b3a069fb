"""A program for two processes, and how tests run it: python process_cases.py MODE CULPRIT, with JAX_... telling who
it is. In the end MODE comes to the process CULPRIT; process 0 is the one that connects the others.
"""

import contextlib
import math
import multiprocessing
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


def run_two(mode: str, culprit: int = 1, timeout: float = 90.0, **second: str) -> list[tuple[int, str, float]]:
    """Runs MODE in two processes; of each: its status, its output, and when it ended (time.time; inf: not in time)."""
    port = launcher.free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-u", str(PROGRAM), mode, str(culprit)],
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
    outputs = [child.communicate(timeout=20)[0] for child in children]  # in vain, where a worker has outlived them
    return [(child.returncode, outputs[index], ended.get(index, math.inf)) for index, child in enumerate(children)]


def work_on() -> None:
    """A data worker: signals to the whole job are not its to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def take_notice(mode: str, here: bool) -> None:
    """SIGTERM before the first step ("early notice") or after the last ("late notice"), in one of the processes."""
    from omnistream_jax.preemption import Preemption

    with Preemption(75) as preemption:
        if mode == "early notice":
            if here:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        for step in range(3):
            if preemption.reached():
                preemption.leave(f"saved at step {step + 1}")
        if mode == "late notice" and here:
            os.kill(os.getpid(), signal.SIGTERM)
        preemption.nothing_to_save()
        print("over", flush=True)


def main(mode: str, culprit: int) -> int:
    """The job: the processes meet, and then one of them does what MODE says."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from omnistream_jax import distributed

    if mode == "fails":
        multiprocessing.get_context("spawn").Process(target=work_on, daemon=True).start()
    if mode == "fails mutely":
        os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stderr.fileno())
    launch = launcher.detect(os.environ, jax.config.jax_platforms)
    terminates = mode == "terminates"
    with (
        distributed.connected(launch, start_seconds=60, heartbeat_seconds=10, heeds_notices=not terminates),
        distributed.ending_on_sigterm() if terminates else contextlib.nullcontext(),
    ):
        index = jax.process_index()
        if mode.endswith("notice"):
            take_notice(mode, index == culprit)
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
            if index == culprit and step == 3:
                print(f"at {time.time()}", flush=True)
                if mode.startswith("fails"):
                    raise ConfigError("a file is missing on this machine")
                if mode == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if mode == "terminates":
                    os.kill(os.getpid(), signal.SIGTERM)
                if mode == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.02)
    print("after", flush=True)
    return 3 if mode == "ends" and index == 1 else 0


if __name__ == "__main__":
    from omnistream_jax import distributed

    with distributed.ending_all_on_failure():
        try:
            sys.exit(main(sys.argv[1], int(sys.argv[2])))
        except ConfigError as error:  # as config.run does
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CONFIG)
