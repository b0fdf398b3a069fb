"""One process per working directory: another is refused, and the lock ends with its holder."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError


def test_a_second_process_is_refused_and_told_who_works_there(tmp_path):
    with WorkdirLock(tmp_path / "new"):
        program = f"from omnistream_jax.utils.lock import WorkdirLock; WorkdirLock({str(tmp_path / 'new')!r})"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert result.returncode != 0
        assert f"new is in use by process {os.getpid()} on host {os.uname().nodename}" in result.stderr
        with pytest.raises(WorkdirLockedError):
            WorkdirLock(tmp_path / "new")
    WorkdirLock(tmp_path / "new").release()


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import time; from omnistream_jax.utils.lock import WorkdirLock\n"
        f"lock = WorkdirLock({str(tmp_path)!r}); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(WorkdirLockedError, match=f"process {process.pid} "):
            WorkdirLock(tmp_path)
        process.kill()
    WorkdirLock(tmp_path).release()


def test_a_lock_that_cannot_be_taken_names_its_file_and_leaves_nothing_open(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    opened = []
    monkeypatch.setattr(
        Path, "open", lambda path, *mode, _open=Path.open: opened.append(_open(path, *mode)) or opened[0]
    )
    with pytest.raises(OSError, match=f"No locks available: '{tmp_path}/.lock'"):
        WorkdirLock(tmp_path)
    assert [file.closed for file in opened] == [True]
