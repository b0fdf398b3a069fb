"""Streams with geometry that go on for long: memory does not grow with them."""

import os
from pathlib import Path

import jax
import pytest
from clip_cases import real_frames, write_clip
from evo.tools.file_interface import read_tum_trajectory_file
from geometry_model_cases import random_geometry_model
from live_cases import CONFIG, summary_of

from omnistream_jax import config as config_lib
from omnistream_jax import live, live_view
from omnistream_jax.geometry_model import GeometryModel


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_thousand_frames_with_a_window_of_64_take_no_more_memory(tmp_path, monkeypatch):
    """The whole job: reading, stepping, files, recording and video. From frame 200 on, everything is in its place."""
    random_geometry_model().save(tmp_path / "model")
    source = write_clip(tmp_path / "long.mp4", real_frames(2, 40) * 25)
    resident, caches = {}, set()
    show, step = live_view.Drawing.show, GeometryModel.step

    def show_and_measure(self, result):
        show(self, result)
        resident[result.index] = resident_bytes()

    def step_and_measure(self, stream, frames):
        geometry, out, stream = step(self, stream, frames)
        caches.add((stream.state.capacity, sum(leaf.nbytes for leaf in jax.tree.leaves(stream.state.cache))))
        return geometry, out, stream

    monkeypatch.setattr(live_view.Drawing, "show", show_and_measure)
    monkeypatch.setattr(GeometryModel, "step", step_and_measure)
    fields = {"input": str(source), "output": str(tmp_path / "out"), "checkpoint": str(tmp_path / "model")}
    fields |= {"height": 64, "width": 64, "resize": "stretch", "window": 64, "geometry.enabled": True}
    fields |= {"geometry.point_options.voxel": 0.01, "geometry.point_options.max_points": 20_000}
    live.stream(config_lib.load(CONFIG, fields))
    summary = summary_of(tmp_path / "out")
    assert summary["frames"] == len(resident) == 1000
    assert len(caches) == 1
    (capacity, size), growth = caches.pop(), resident[999] - resident[200]
    print(f"cache {capacity} frames, {size:,} bytes; resident {resident[200]:,} + {growth:,} bytes; {summary}")
    assert capacity == 64
    assert growth < 32 * 2**20
    assert 8 <= summary["geometry"]["points"] <= 20_000
    assert read_tum_trajectory_file(tmp_path / "out" / "trajectory.txt").num_poses == 1000
    assert len(list((tmp_path / "out" / "depth").glob("*.png"))) == 1000
