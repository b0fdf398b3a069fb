"""Runs of the live job: its command line, and what it wrote read back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from omnistream_jax import live

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = str(REPOSITORY / "configs" / "stream.py")


def summary_of(output):
    return json.loads((output / live.SUMMARY).read_text())


def recorded(path, entity: str, column: str):
    """A column of a recording and its "frame" and "time", in seconds."""
    chunk_lib = pytest.importorskip("rerun.chunk")
    rows = []
    for chunk in chunk_lib.RrdReader(path).stream():
        batch = chunk.to_record_batch()
        if chunk.entity_path == entity and column in batch.schema.names:
            stamps = batch.column("time").cast("int64").to_pylist()
            rows += zip(batch.column("frame").to_pylist(), stamps, batch.column(column).to_pylist(), strict=True)
    rows.sort(key=lambda row: row[0])
    return [row[0] for row in rows], [row[1] / 1e9 for row in rows], [row[2][0] for row in rows]


def assert_rerun_verifies(recording: Path) -> None:
    """The check of the recordings' own tool."""
    program = Path(sys.executable).with_name("rerun")
    if not program.exists():
        pytest.skip("the rerun program is not beside this interpreter")
    command = [program, "rrd", "verify", str(recording)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def video_frames(path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


def command(config) -> list[str]:
    """The command line of a run with this config."""
    fields = {name: value for name, value in flatten(config.to_dict()).items() if name not in ("job", "name")}
    return [
        *(sys.executable, "-m", "omnistream_jax.main", f"--config={CONFIG}"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def flatten(fields: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
