"""Runs of data.prepare, and the one that is killed in the middle."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from omnistream_jax.data import command, prepare
from omnistream_jax.data.errors import DataError


def run(source: Path | None, output: Path | None, *arguments: str, dataset: str) -> int:
    """The exit status of a run in this process."""
    given = [f"--source={source}"] if source else []
    given += [f"--output={output}"] if output else []
    prepare.FLAGS.unparse_flags()
    for name in prepare.FLAGS:
        prepare.FLAGS[name].unparse()
    return command.run(prepare.main, prepare.FLAGS, "", ["prepare", f"--dataset={dataset}", *given, *arguments])


def contents(output: Path) -> dict[str, bytes]:
    """All files that a run leaves."""
    paths = [path for path in sorted(output.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def environment() -> dict[str, str]:
    """Of processes that import the package and these modules."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def assert_a_killed_run_goes_on_to_the_same_bytes(
    undisturbed: Path,
    source: Path,
    file: str,
    folder: Path,
    opener: Callable[[Path], Any],
    arguments: Sequence[str],
    *,
    dataset: str,
) -> None:
    """Kills a run of two workers in the third of three shards, and goes on in this process.

    Args:
      undisturbed: what a run that nothing stops leaves.
      source: of that run.
      file: of the source, read for the third shard first.
      folder: an empty one.
      opener: of what is prepared.
      arguments: of that run.
      dataset: its name.
    """
    root, output = folder / "source", folder / "out"
    shutil.copytree(source, root)
    last = root / file
    whole = last.read_bytes()
    last.unlink()
    os.mkfifo(last)  # whoever opens it waits: the run stops in the third shard
    line = [sys.executable, "-m", "omnistream_jax.data.prepare", f"--dataset={dataset}", "--workers=2"]
    line += [f"--source={root}", f"--output={output}", *arguments]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL)
    try:
        _wait_for(lambda: len(list(output.glob("shards/0*.json"))) == 2)
        workers = _children_of(process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    litter = [output / "shards/.00002.1.tmp", output / "shards/.00002.1.tmp.json"]
    for path in litter:
        path.write_bytes(b"half a shard")
    assert len(workers) >= 2
    _wait_for(lambda: not any(map(_is_alive, workers)), 10)
    assert not (output / "index.json").exists()
    with pytest.raises(DataError, match="its preparation has not come to its end"):
        opener(output)
    last.unlink()
    last.write_bytes(whole)
    finished = [output / f"shards/0000{shard}.array_record" for shard in (0, 1)]
    kept = [path.stat().st_mtime_ns for path in finished]
    assert run(root, output, *arguments, dataset=dataset) == 0
    assert [path.stat().st_mtime_ns for path in finished] == kept
    assert contents(output) == contents(undisturbed)


def _children_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
