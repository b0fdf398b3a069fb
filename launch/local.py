#!/usr/bin/env python3
"""One run of many processes on this machine: ends all when one fails, and tells them apart in the output.

    python launch/local.py N [--devices=D | --gpus=G] [--grace=SECONDS] -- --config=configs/pretrain.py [...]

Starts N times `python -m omnistream_jax.main` with what stands behind `--`, and the flags by which the processes find
each other. --devices: so many make-believe CPU devices each, to try a mesh without hardware. --gpus: so many GPUs
each, the first to process 0. Each line of output begins with its process. SIGTERM and SIGINT go to all. When a process
fails, the others have `grace` seconds (15) to end by themselves, and are then killed.

Exit status: 0 if all processes ended so; else that of the first that failed, 128 + the signal if one killed it.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def main() -> int:
    """Parses, starts, waits; the exit status."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("processes", type=int)
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--devices", type=int)
    share.add_argument("--gpus", type=int)
    parser.add_argument("--grace", type=float, default=15.0)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    for name in ("processes", "devices", "gpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"{name}: expected 1 or more, got {value}")
    if not arguments:
        parser.error("expected -- --config=FILE.py and the run's other flags")

    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    children = start(options.processes, arguments, options.devices, options.gpus)
    readers = [threading.Thread(target=tell, args=pair, daemon=True) for pair in enumerate(children)]
    for reader in readers:
        reader.start()
    status = wait(children, options.grace, asked)
    for reader in readers:
        reader.join(timeout=5)  # a grandchild may hold the pipe, for good
    return status


def start(count: int, arguments: list[str], devices: int | None, gpus: int | None) -> list[subprocess.Popen]:
    """The processes, each in a group of its own, so that its data workers can be ended with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for index in range(count):
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if devices is not None:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        if gpus is not None:
            ids = range(index * gpus, (index + 1) * gpus)
            environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
        place = [f"--coordinator=127.0.0.1:{port}", f"--process_count={count}", f"--process_id={index}"]
        command = [sys.executable, "-m", "omnistream_jax.main", *place, *arguments]
        children.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    return children


def tell(index: int, child: subprocess.Popen) -> None:
    """Passes on what a process prints, line by line."""
    for line in child.stdout:
        sys.stdout.buffer.write(b"[%d] " % index + line)
        sys.stdout.buffer.flush()


def wait(children: list[subprocess.Popen], grace: float, asked: list[int]) -> int:
    """Until all have ended, by themselves or `grace` seconds after the first that failed; the exit status.

    Signals that come to stand in `asked` go to all children, also those of before there were children.
    """
    failed, deadline = 0, None
    while True:
        while asked:
            number = asked.pop(0)
            for child in children:
                child.send_signal(number)
        statuses = [child.poll() for child in children]
        if not failed and (wrong := [(index, status) for index, status in enumerate(statuses) if status]):
            index, failed = wrong[0]
            deadline = time.monotonic() + grace
            print(f"launch/local.py: process {index} ended with {_shown(failed)}", file=sys.stderr, flush=True)
        if None not in statuses:
            return 128 - failed if failed < 0 else failed
        if deadline is not None and time.monotonic() > deadline:
            for index in (index for index, status in enumerate(statuses) if status is None):
                print(f"launch/local.py: process {index} has not ended; killed", file=sys.stderr, flush=True)
                os.killpg(children[index].pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.05)


def _shown(status: int) -> str:
    return f"status {status}" if status > 0 else f"signal {-status} ({signal.Signals(-status).name})"


if __name__ == "__main__":
    sys.exit(main())
