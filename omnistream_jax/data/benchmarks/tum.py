"""TUM RGB-D (Sturm et al. 2012), its eight freiburg3 sequences with moving people, 90 frames each:

    rgbd_dataset_freiburg3_SEQUENCE/rgb_90/TIMESTAMP.png       as MonST3R's script prepares it,
    rgbd_dataset_freiburg3_SEQUENCE/groundtruth_90.txt         with a row a picture; or
    rgbd_dataset_freiburg3_SEQUENCE/rgb.txt                    as published: rows of timestamp and file (rgb/...png)
    rgbd_dataset_freiburg3_SEQUENCE/groundtruth.txt            timestamp tx ty tz qx qy qz qw, camera-to-world

Of the latter, pictures and poses are matched by their times, and every third match is taken, 90 of them. Where a
sequence has both, the prepared one counts. root is the folder that holds the sequences, or the one above it if it is
called tum. Metres and seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, PoseSequence, pose_benchmark
from omnistream_jax.data.benchmarks.layout import files_of, first_with
from omnistream_jax.data.benchmarks.poses import read_tum_trajectory
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.files import reading

SEQUENCES = tuple(
    f"rgbd_dataset_freiburg3_{people}_{camera}"
    for people in ("sitting", "walking")
    for camera in ("static", "xyz", "halfsphere", "rpy")
)
FRAMES, STRIDE = 90, 3
MAX_DIFFERENCE = 0.02  # seconds


def open_pose(root: Path) -> Benchmark:
    """Camera poses of people's rooms. Raises DataError for another layout."""
    wanted = [f"{name}/{kind}" for name in SEQUENCES for kind in ("rgb_90", "rgb.txt")]
    expected = (
        "rgbd_dataset_freiburg3_SEQUENCE/rgb_90 (prepared) or rgbd_dataset_freiburg3_SEQUENCE/rgb.txt (as published) "
        "of TUM RGB-D"
    )
    base = first_with(root, ("", "tum"), wanted, expected)
    sequences = [_sequence(base / name) for name in SEQUENCES if (base / name).is_dir()]
    return pose_benchmark("tum_pose", base, sequences, dict.fromkeys(SEQUENCES, FRAMES))


def associate(first: np.ndarray, second: np.ndarray, max_difference: float = MAX_DIFFERENCE) -> np.ndarray:
    """Matches times one to one, the closest pair of all first, as TUM's associate.py does.

    Args:
      first: float [N] seconds, sorted, each once.
      second: float [M], likewise.
      max_difference: pairs must be closer than this.

    Returns:
      int [K, 2]: places in `first` and `second` of each match, in the order of time.
    """
    # the window is a little wide, so that rounding in it loses no pair; the difference itself decides
    lowest = np.searchsorted(second, first - 2 * max_difference)
    highest = np.searchsorted(second, first + 2 * max_difference)
    candidates = []
    for place, time in enumerate(first):
        for other in range(lowest[place], highest[place]):
            difference = abs(time - second[other])
            if difference < max_difference:
                candidates.append((difference, place, other))
    matches, taken, other_taken = [], set(), set()
    for _, place, other in sorted(candidates):
        if place not in taken and other not in other_taken:
            taken.add(place)
            other_taken.add(other)
            matches.append((place, other))
    return np.array(sorted(matches), int).reshape(-1, 2)


def _sequence(folder: Path) -> PoseSequence:
    if (folder / "rgb_90").is_dir():
        frames = files_of(folder / "rgb_90", ".png")
        times, poses = read_tum_trajectory(folder / "groundtruth_90.txt")
        return PoseSequence(folder.name, tuple(frames), poses, times)
    pictures = _pictures(folder / "rgb.txt")
    times, poses = read_tum_trajectory(folder / "groundtruth.txt")
    times, rows = _once(times)
    matches = associate(np.array(sorted(pictures)), times)
    if not len(matches):
        raise DataError(f"{folder / 'rgb.txt'}: no picture within {MAX_DIFFERENCE} s of a pose in groundtruth.txt")
    matches = matches[::STRIDE][:FRAMES]
    named = [pictures[time] for time in np.array(sorted(pictures))[matches[:, 0]]]
    frames = [require(folder, name, expected="a picture that rgb.txt names") for name in named]
    return PoseSequence(folder.name, tuple(frames), poses[rows][matches[:, 1]], times[matches[:, 1]])


def _pictures(path: Path) -> dict[float, str]:
    """The file of each time, of rows `timestamp file`; of two with the same time the later one."""
    with reading(path, "rows of a timestamp and a picture's file"):
        rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
        return {float(row[0]): row[1] for row in rows if row}


def _once(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted times, each once, and the row of each: of two with the same time the later one."""
    rows = {time: row for row, time in enumerate(times.tolist())}
    unique = np.array(sorted(rows))
    return unique, np.array([rows[time] for time in unique.tolist()], int)
