"""The Bonn RGB-D dynamic data set (Palazzolo et al. 2019), five sequences of it, 110 frames each:

    rgbd_bonn_SEQUENCE/{rgb_110,depth_110}/TIMESTAMP.png   as MonST3R's script prepares it, or
    rgbd_bonn_SEQUENCE/{rgb,depth}/TIMESTAMP.png           as published: files 30 to 139 in the order of their names

Where a sequence has both, the prepared one counts. Depth is 16-bit, 5000 a metre, 0 not known. root is the folder that
holds the sequences, or one above it (rgbd_bonn_dataset or bonn/rgbd_bonn_dataset).

Pictures and depth maps are sliced each by themselves and meet by their rank, not by their timestamps: so the published
numbers were made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, DepthSequence, depth_benchmark
from omnistream_jax.data.benchmarks.layout import files_of, first_with
from omnistream_jax.data.readers.files import read_png16

SEQUENCES = ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")
FIRST, LAST = 30, 140


def open_depth(root: Path) -> Benchmark:
    """Video depth: scored up to 70 m, predictions not clipped. Raises DataError for another layout."""
    folders = ("", "rgbd_bonn_dataset", "bonn/rgbd_bonn_dataset")
    wanted = [f"rgbd_bonn_{name}/{kind}" for name in SEQUENCES for kind in ("rgb_110", "rgb")]
    expected = "rgbd_bonn_SEQUENCE/rgb_110 (prepared) or rgbd_bonn_SEQUENCE/rgb (as published) of the Bonn data set"
    base = first_with(root, folders, wanted, expected)
    sequences = [_sequence(name, base / f"rgbd_bonn_{name}") for name in SEQUENCES]
    return depth_benchmark("bonn_depth", base, sequences, dict.fromkeys(SEQUENCES, LAST - FIRST), max_depth=70.0)


def read_depth(path: Path) -> np.ndarray:
    """float64 [H, W], metres, -1 where it is not known."""
    stored = read_png16(path)
    return np.where(stored == 0, -1.0, stored / 5000.0)


def _sequence(name: str, folder: Path) -> DepthSequence:
    if (folder / "rgb_110").is_dir():
        frames, depths = (files_of(folder / kind, ".png") for kind in ("rgb_110", "depth_110"))
    else:
        frames, depths = (files_of(folder / kind, ".png")[FIRST:LAST] for kind in ("rgb", "depth"))
    return DepthSequence(name, tuple(frames), tuple(depths), read_depth)
