"""One process per working directory: two writers would delete each other's checkpoints."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path


class WorkdirLockedError(RuntimeError):
    """Another process works in the directory; the message names it."""


class WorkdirLock:
    """An exclusive `flock` on `workdir/.lock`, held until `release` or the end of the process, however it
    ends.

    Makes the directory where it is missing. Raises WorkdirLockedError at once where another process holds the
    lock, and OSError, naming the file, where the directory cannot be made, its disk is full or its file system knows
    no locks.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.path = Path(workdir) / ".lock"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+")
        try:
            self._take()
        except BaseException as error:
            with contextlib.suppress(OSError):  # as a full disk told already
                self._file.close()
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirLockedError(f"working directory {self.path.parent} is in use by {self._holder()}") from None
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on host {holder['host']}"
        except (ValueError, KeyError, TypeError):  # it has taken the lock but not yet written its name
            return "another process, which has not written its name yet"

    def release(self) -> None:
        """Lets another process in. The file stays: removing it would let two processes lock two files."""
        self._file.close()

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()
