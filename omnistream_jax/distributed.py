"""Many processes as one run: the start of jax.distributed, an end without hangs.

`start` connects the processes that launcher.py has told of; `finish` ends a run that went well, together;
`ending_all_on_failure` ends every process when one fails. A process that runs alone needs none of it.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

# The public face of jax.distributed has no key-value store and no barrier; Orbax takes them from here too.
from jax._src.distributed import global_state

from omnistream_jax.config import EXIT_ERROR, EXIT_REQUEUE, ConfigError
from omnistream_jax.launcher import Launch, is_loopback
from omnistream_jax.utils.agreement import wait_for_all

_FAILED = "omnistream_jax/failed"  # key of the first process that failed
_LISTEN_SECONDS = 2.0
_NO_PROXY = "no_grpc_proxy"
_LAST_REPORT_SECONDS = 3600  # others wait for process 0's pictures and scores


class _Listener:
    """A thread that asks whether another process has failed, and then ends this one with the same status."""

    def __init__(self):
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener for failures", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Before the interpreter's end, at which a thread within JAX's client would crash."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _listen(self) -> None:
        while not self._stopped.wait(_LISTEN_SECONDS):
            status = _failed_elsewhere()
            if status is not None:
                _exit(status)


_listener = _Listener()


class DistributedError(RuntimeError):
    """The processes of a run cannot work together; the message says what was expected."""


# The start


def start(
    launch: Launch, *, start_seconds: int = 300, heartbeat_seconds: int = 100, heeds_notices: bool = False
) -> str:
    """Connects the processes; call it before anything else asks JAX for its devices, in every process.

    From then on a process that is not heard of for `heartbeat_seconds` ends all others, by JAX's own hand: a message
    and SIGABRT (status 134).

    Args:
        launch: of `detect`.
        start_seconds: how long the processes wait for each other.
        heartbeat_seconds: after how long without a sign a process counts as lost.
        heeds_notices: SIGTERM is no longer the end of the process but JAX's notice of preemption (preemption.py).

    Returns:
        "2 processes by SLURM, 4 cpu devices each", and what should be known beside it.

    Raises:
        ConfigError: the processes are not those that the launcher told of, or have unlike devices.
        DistributedError: they cannot be connected. (After `start_seconds` the process ends with status 1.)
    """
    for name, value in (("start_seconds", start_seconds), ("heartbeat_seconds", heartbeat_seconds)):
        if value < 1:
            raise ConfigError(f"distributed.{name}: expected 1 or more, got {value}")
    use_gpus(launch)
    jax.config.update("jax_enable_preemption_service", heeds_notices)
    bound = bind_address(launch) if launch.index == 0 and launch.coordinator else None
    if launch.coordinator:
        _keep_off_proxies(launch.coordinator.rpartition(":")[0])
    who = "a process" if launch.count is None else f"process {launch.index} of {launch.count}"
    who += f" by {launch.launcher}"
    where = f" at {launch.coordinator}" if launch.coordinator else ""
    late = (
        f"{who} has waited {start_seconds} s for the others{where}: has each of them started, and can it reach process "
        "0 there? (config.distributed.start_seconds)"
    )
    with _ended_after(start_seconds, late):
        try:
            jax.distributed.initialize(
                coordinator_address=launch.coordinator,
                num_processes=launch.count,
                process_id=launch.index,
                local_device_ids=launch.gpus,
                cluster_detection_method=launch.cluster or (None if launch.count is None else "deactivate"),
                initialization_timeout=start_seconds + 60,  # JAX's own end is a crash
                heartbeat_timeout_seconds=heartbeat_seconds,
                coordinator_bind_address=bound,
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DistributedError(f"{who} could not join the others{where}: {reason}") from error
        line = _check_devices(launch)
    if not with_others():
        return line
    _listener.start()
    if bound is None and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ and launch.coordinator:
        line += (
            f"; process 0 listens on all of its addresses, for {launch.coordinator} is not one of them "
            "(JAX_COORDINATOR_BIND_ADDRESS chooses one)"
        )
    return line


@contextlib.contextmanager
def _ended_after(seconds: float, message: str) -> Iterator[None]:
    def end() -> None:
        _tell(f"error: {message}")
        _exit(EXIT_ERROR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def use_gpus(launch: Launch) -> None:
    """Leaves the other processes' GPUs alone; before JAX is asked for its devices. `start` does so itself."""
    if launch.gpus is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, launch.gpus)))


def bind_address(launch: Launch) -> str | None:
    """Where process 0 listens, "address:port": JAX's service asks nobody who he is, so not on every interface.

    None where the environment has a JAX_COORDINATOR_BIND_ADDRESS, or no address of this machine is the coordinator's
    (one behind address translation, or a host whose own name means loopback): then it is JAX's default, all.
    """
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    host, _, port = launch.coordinator.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, _, _, address in found:
        if is_loopback(address[0]) and not launch.one_machine:
            continue
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind((address[0], 0))
            return f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
    return None


def _keep_off_proxies(host: str) -> None:
    """GRPC would look for process 0 behind the proxy that many clusters set for the outer world."""
    if any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        near = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
        os.environ[_NO_PROXY] = f"{near},{host}" if near else host


def _check_devices(launch: Launch) -> str:
    """The line for the reader. Every process sees all devices, so that each of them finds what is wrong."""
    count, platform = jax.process_count(), jax.default_backend()
    if launch.count is not None and count != launch.count:
        raise ConfigError(
            f"{launch.count} processes by {launch.launcher}, but {platform} devices of {count}: {_devices()}"
        )
    here = jax.local_device_count()
    if launch.gpus is not None and jax.config.jax_platforms != "cpu" and (platform, here) != ("gpu", len(launch.gpus)):
        raise ConfigError(
            f"{launch.launcher} gives this process {len(launch.gpus)} GPU(s), but JAX has {here} {platform} device(s): "
            "install the extra cuda12 or cuda13, or set JAX_PLATFORMS=cpu"
        )
    per_process = Counter(device.process_index for device in jax.devices())
    if len(set(per_process.values())) > 1:
        unlike = ", ".join(f"process {index} has {number}" for index, number in sorted(per_process.items()))
        raise ConfigError(f"the processes must have equally many devices: {unlike}")
    noun, device = "process" if count == 1 else "processes", "device" if here == 1 else "devices"
    return f"{count} {noun} by {launch.launcher}, {here} {platform} {device} each"


def _devices() -> str:
    return ", ".join(map(str, jax.devices()[:8]))


# The end


def with_others() -> bool:
    """Whether this process is connected to others: after `start` of more than one, until `finish`."""
    return global_state.client is not None and global_state.num_processes > 1


@contextlib.contextmanager
def connected(launch: Launch | None, **options: Any) -> Iterator[None]:
    """Around a job that all processes do together: `start`, told by process 0, and `finish`; nothing for None.

    SystemExit is an end in good order too: by SIGTERM, when every process has saved. What `start` says of its
    arguments, `options` among them, and of its errors holds here.
    """
    if launch is None:
        yield
        return
    line = start(launch, **options)
    if jax.process_index() == 0:
        print(line, flush=True)
    try:
        yield
    except SystemExit:
        finish()
        raise
    finish()


def finish() -> None:
    """Ends the connection when all processes are through, however long process 0 takes over its last pictures.

    The process exits for itself afterwards, with any status. SIGTERM no longer ends it: one that is through must not
    fail those that are not. Does nothing where `start` was not called.
    """
    if with_others():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            wait_for_all("finish", _LAST_REPORT_SECONDS)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise DistributedError(f"not all processes came to their end: {reason}") from error
    _listener.stop()
    jax.distributed.shutdown()


@contextlib.contextmanager
def ending_all_on_failure() -> Iterator[None]:
    """Around a whole program: if it ends before `finish`, the other processes end too, at once, with its status.

    They might else wait for it, and it for them when the interpreter ends, until JAX gives up.
    """
    try:
        yield
    except BaseException as error:
        if not with_others():
            raise
        status = EXIT_ERROR
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else EXIT_ERROR if error.code else 0
        elif not isinstance(error, KeyboardInterrupt):
            _tell(traceback.format_exc().rstrip())
        _exit(_tell_others(status))


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Around a job that keeps what is finished: SIGTERM ends it, in every process, with EXIT_REQUEUE.

    Not where `start` heeds notices. For the main thread; elsewhere it does nothing.
    """

    def end(*_: object) -> None:
        os.write(2, b"SIGTERM: the run ends here; the same command goes on from what is finished\n")
        if with_others():
            _exit(_tell_others(EXIT_REQUEUE))
        raise SystemExit(EXIT_REQUEUE)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tell_others(status: int) -> int:
    """Says that this process fails, unless another was first, whose failure may be why; the status to end with."""
    own = {"process": global_state.process_id, "host": socket.gethostname(), "status": status or EXIT_ERROR}
    try:
        global_state.client.key_value_set(_FAILED, json.dumps(own))
    except RuntimeError:  # the key exists, or process 0 is lost
        first = _failed_elsewhere()
        return own["status"] if first is None else first
    if global_state.process_id == 0:
        time.sleep(2 * _LISTEN_SECONDS)  # the others ask here
    return own["status"]


def _failed_elsewhere() -> int | None:
    """The status of another process that has failed, which is then told; None where there is none."""
    try:
        failed = json.loads(global_state.client.key_value_try_get(_FAILED))
    except RuntimeError:  # no such key; and where the connection is lost, JAX ends the process
        return None
    if failed["process"] == global_state.process_id:
        return None
    who = f"process {failed['process']} on host {failed['host']}"
    _tell(f"error: {who} ended with status {failed['status']}; so does this one")
    return failed["status"]


def _tell(text: str) -> None:
    """On stderr; one that is closed, or a file on a full disk, must not keep the processes from their end."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _exit(status: int) -> None:
    """Without the interpreter's end, where JAX would wait for the others."""
    for child in multiprocessing.active_children():  # data workers, which do not heed SIGTERM
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
