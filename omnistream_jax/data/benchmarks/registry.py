"""The geometry benchmarks by name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from omnistream_jax.data.benchmarks import bonn, kitti, scannet, sintel, tum
from omnistream_jax.data.benchmarks.base import Benchmark, check_counts
from omnistream_jax.data.errors import DataError

OPENERS: Mapping[str, Callable[[Path], Benchmark]] = {
    "sintel_depth": sintel.open_depth,
    "bonn_depth": bonn.open_depth,
    "kitti_depth": kitti.open_depth,
    "sintel_pose": sintel.open_pose,
    "tum_pose": tum.open_pose,
    "scannet_pose": scannet.open_pose,
}


def open_benchmark(name: str, root: str | os.PathLike, allow_incomplete: bool = False) -> Benchmark:
    """Opens a benchmark in its prepared or published layout; the reader's module describes both.

    Args:
      name: of OPENERS.
      root: the folder that holds the layout.
      allow_incomplete: accept fewer (or more) sequences and frames than the published numbers are over; the
        benchmark's `settings` then say what differs.

    Raises:
      DataError: the name is not known, the layout is another, a file is missing or broken, or the benchmark is not
        complete and need be.
    """
    if name not in OPENERS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), OPENERS, 1, 0.6)
        meant = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"benchmark: {name!r} is not known; {meant}There are {', '.join(OPENERS)}")
    benchmark = OPENERS[name](Path(root))
    check_counts(benchmark, allow_incomplete)
    return benchmark
