"""MPI Sintel (Butler et al. 2012; depth and cameras of Wulff et al.), training sequences, final pass:

    training/final/SEQUENCE/frame_NNNN.png          1024 x 436
    training/depth/SEQUENCE/frame_NNNN.dpt          float32 tag, int32 width, int32 height, float32 [H, W] metres
    training/camdata_left/SEQUENCE/frame_NNNN.cam   float32 tag, float64 [3, 3] intrinsics, [3, 4] world-to-camera

root is the folder that holds training/, or the one above it if it is called sintel. Numbers are little-endian, the tag
is 202021.25. Depth is scored on all 23 sequences (1,064 frames); poses on the 14 (643 frames) whose camera moves enough
to be aligned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, DepthSequence, PoseSequence, depth_benchmark, pose_benchmark
from omnistream_jax.data.benchmarks.layout import files_of, first_with, partners
from omnistream_jax.data.benchmarks.poses import checked_pose
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import MAX_PIXELS
from omnistream_jax.data.readers.cameras import invert
from omnistream_jax.data.readers.files import reading

TAG = 202021.25
FRAMES = {
    **dict.fromkeys(("alley_1", "alley_2"), 50),
    **{"ambush_2": 21, "ambush_4": 33, "ambush_5": 50, "ambush_6": 20, "ambush_7": 50},
    **dict.fromkeys(("bamboo_1", "bamboo_2", "bandage_1", "bandage_2", "cave_2", "cave_4", "market_2", "market_5"), 50),
    **{"market_6": 40, "mountain_1": 50, "shaman_2": 50, "shaman_3": 50, "sleeping_1": 50, "sleeping_2": 50},
    **{"temple_2": 50, "temple_3": 50},
}
MOVING = (
    *("alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6"),
    *("shaman_3", "sleeping_1", "sleeping_2", "temple_2", "temple_3"),
)


def open_depth(root: Path) -> Benchmark:
    """Video depth: scored up to 70 m, aligned predictions clipped to 70 m. Raises DataError for another layout."""
    training = _training(root)
    sequences = []
    for name in FRAMES:
        frames = files_of(training / "final" / name, ".png")
        depths = partners(frames, training / "depth" / name, ".dpt", "depth")
        sequences.append(DepthSequence(name, tuple(frames), tuple(depths), read_dpt))
    return depth_benchmark("sintel_depth", training, sequences, FRAMES, max_depth=70.0, clip_max=70.0)


def open_pose(root: Path) -> Benchmark:
    """Camera poses; the mean position of each sequence is its origin. Raises DataError for another layout."""
    training = _training(root)
    sequences = []
    for name in MOVING:
        frames = files_of(training / "final" / name, ".png")
        cameras = partners(frames, training / "camdata_left" / name, ".cam", "camera")
        poses = np.array([checked_pose(invert(read_cam(path)[1]), path) for path in cameras]).reshape(-1, 4, 4)
        if len(poses):
            poses[:, :3, 3] -= poses[:, :3, 3].mean(0)
        numbers = np.array([_number(path) for path in frames])
        sequences.append(PoseSequence(name, tuple(frames), poses, numbers))
    return pose_benchmark("sintel_pose", training, sequences, {name: FRAMES[name] for name in MOVING})


def read_dpt(path: Path) -> np.ndarray:
    """float32 [H, W] of a .dpt file, metres. Raises DataError for a wrong tag, size or length."""
    with reading(path, "a Sintel depth map (.dpt)"):
        content = memoryview(path.read_bytes())
        _check_tag(content)
        width, height = (int(side) for side in np.frombuffer(content[4:12], "<i4"))
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            raise DataError(f"{path}: {width} x {height} pixels; expected 1 to {MAX_PIXELS:,} of them")
        if len(content) != 12 + 4 * width * height:
            raise ValueError(
                f"it has {len(content):,} bytes, {width} x {height} pixels take {12 + 4 * width * height:,}"
            )
        return np.frombuffer(content[12:], "<f4").reshape(height, width).astype(np.float32)


def read_cam(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(intrinsics [3, 3], world-to-camera [4, 4]) of a .cam file, float64. Raises DataError as `read_dpt`."""
    with reading(path, "a Sintel camera (.cam): a tag and 9 + 12 doubles"):
        content = memoryview(path.read_bytes())
        _check_tag(content)
        if len(content) != 4 + 8 * 21:
            raise ValueError(f"it has {len(content):,} bytes, expected {4 + 8 * 21}")
        numbers = np.frombuffer(content[4:], "<f8").astype(np.float64)
        return numbers[:9].reshape(3, 3), np.vstack([numbers[9:].reshape(3, 4), [0.0, 0.0, 0.0, 1.0]])


def _check_tag(content: memoryview) -> None:
    tag = float(np.frombuffer(content[:4], "<f4")[0])
    if tag != TAG:
        raise ValueError(f"its tag is {tag:g}, expected {TAG}")


def _number(path: Path) -> float:
    with reading(path, "a picture called frame_NNNN.png"):
        return float(path.stem.rpartition("_")[2])


def _training(root: Path) -> Path:
    expected = "training/final/SEQUENCE (alley_1, ...) of MPI Sintel"
    found = first_with(root, ("", "sintel"), (f"training/final/{name}" for name in FRAMES), expected)
    return found / "training"
