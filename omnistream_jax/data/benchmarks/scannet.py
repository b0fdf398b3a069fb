"""ScanNet v2 (Dai et al. 2017), test scenes 0707 to 0806, every third of their first 270 frames:

    SCENE/color_90/frame_NNNN.jpg                  as MonST3R's script prepares it,
    SCENE/pose_90.txt                              16 numbers a row, camera-to-world; or
    SCENE/color/N.jpg, SCENE/pose/N.txt            as SensReader unpacks it (see data/readers/scannet.py)

Where a scene has both, the prepared one counts. root is the folder that holds the scenes, or one above it (scannetv2,
scans or scans_test). Of the hundred scenes six have poses that are not finite among these frames and are left out, as
MonST3R's authors tell (Junyi42/monst3r#29). Metres.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, PoseSequence, pose_benchmark
from omnistream_jax.data.benchmarks.layout import files_of, first_with, partners
from omnistream_jax.data.benchmarks.poses import checked_pose
from omnistream_jax.data.readers.files import read_numbers, reading

EXCLUDED = (711, 737, 750, 761, 791, 796)
SCENES = tuple(f"scene{number:04d}_00" for number in range(707, 807) if number not in EXCLUDED)
FRAMES, STRIDE = 90, 3


def open_pose(root: Path) -> Benchmark:
    """Camera poses of still rooms. Raises DataError for another layout or a pose that is not finite."""
    wanted = [f"{scene}/{kind}" for scene in SCENES for kind in ("color_90", "pose")]
    expected = (
        "SCENE/color_90 (prepared) or SCENE/color and SCENE/pose (as unpacked) of ScanNet's scene0707_00 to 0806_00"
    )
    base = first_with(root, ("", "scannetv2", "scans", "scans_test"), wanted, expected)
    sequences = [_scene(base / scene) for scene in SCENES if (base / scene).is_dir()]
    return pose_benchmark("scannet_pose", base, sequences, dict.fromkeys(SCENES, FRAMES))


def _scene(folder: Path) -> PoseSequence:
    if (folder / "color_90").is_dir():
        frames = files_of(folder / "color_90", ".jpg")
        path = folder / "pose_90.txt"
        rows = read_numbers(path, 16).reshape(-1, 4, 4)
        poses = [checked_pose(row, f"{path}, row {number}") for number, row in enumerate(rows)]
    else:
        frames = files_of(folder / "color", ".jpg", key=_number)[: FRAMES * STRIDE : STRIDE]
        paths = partners(frames, folder / "pose", ".txt", "pose")
        poses = [checked_pose(_matrix(path), path) for path in paths]
    poses = np.array(poses).reshape(-1, 4, 4)
    return PoseSequence(folder.name, tuple(frames), poses, np.arange(len(poses), dtype=np.float64))


def _matrix(path: Path) -> np.ndarray:
    with reading(path, "a 4 x 4 matrix"):
        return read_numbers(path, 4).reshape(4, 4)


def _number(path: Path) -> int:
    with reading(path, "a picture called by its number"):
        return int(path.stem)
