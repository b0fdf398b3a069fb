"""KITTI depth completion (Uhrig et al. 2017), its 13 validation drives, left colour camera, first 110 annotated frames:

    depth_selection/val_selection_cropped/image_gathered/DRIVE_sync_02/NNNNNNNNNN.png             as MonST3R's script
    depth_selection/val_selection_cropped/groundtruth_depth_gathered/DRIVE_sync_02/NNNNNNNNNN.png     prepares it, or
    val/DRIVE_sync/proj_depth/groundtruth/image_02/NNNNNNNNNN.png                 as published (data_depth_annotated),
    DATE/DRIVE_sync/image_02/data/NNNNNNNNNN.png                                  with the pictures of the raw drives

Depth is 16-bit, 256 a metre, 0 not known. root is the folder that holds these, or the one above it if it is called
kitti; where it has both, the prepared one counts. Whatever the folder's name says, nothing is cropped. A folder of a
prepared drive may also be called DRIVE_02.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omnistream_jax.data.benchmarks.base import Benchmark, DepthSequence, depth_benchmark
from omnistream_jax.data.benchmarks.layout import files_of, first_with, partners
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.files import read_png16

LONGEST = 110
# Annotated frames of each drive: those of the raw drive less five at either end; 6,852 / 2 cameras, as published.
ANNOTATED = {
    "2011_09_26_drive_0002": 67,
    "2011_09_26_drive_0005": 144,
    "2011_09_26_drive_0013": 134,
    "2011_09_26_drive_0020": 76,
    "2011_09_26_drive_0023": 464,
    "2011_09_26_drive_0036": 793,
    "2011_09_26_drive_0079": 90,
    "2011_09_26_drive_0095": 258,
    "2011_09_26_drive_0113": 77,
    "2011_09_28_drive_0037": 79,
    "2011_09_29_drive_0026": 148,
    "2011_09_30_drive_0016": 269,
    "2011_10_03_drive_0047": 827,
}
_GATHERED = "depth_selection/val_selection_cropped"
_ENDS = ("_sync_02", "_02")  # of a prepared drive's folder


def open_depth(root: Path) -> Benchmark:
    """Video depth, with no upper bound and nothing clipped. Raises DataError for another layout."""
    prepared = [f"{_GATHERED}/groundtruth_depth_gathered/{drive}{end}" for drive in ANNOTATED for end in _ENDS]
    published = [f"val/{drive}_sync/proj_depth/groundtruth/image_02" for drive in ANNOTATED]
    expected = (
        f"{_GATHERED}/groundtruth_depth_gathered/DRIVE_sync_02 (prepared) or "
        "val/DRIVE_sync/proj_depth/groundtruth/image_02 (as published) of KITTI's validation drives"
    )
    base = first_with(root, ("", "kitti"), prepared + published, expected)
    is_prepared = any((base / folder).is_dir() for folder in prepared)
    reader = _prepared_drive if is_prepared else _published_drive
    frames = {drive: min(count, LONGEST) for drive, count in ANNOTATED.items()}
    return depth_benchmark("kitti_depth", base, [reader(drive, base) for drive in frames], frames, max_depth=None)


def read_depth(path: Path) -> np.ndarray:
    """float64 [H, W], metres, -1 where it is not known."""
    stored = read_png16(path)
    return np.where(stored == 0, -1.0, stored / 256.0)


def _prepared_drive(drive: str, base: Path) -> DepthSequence:
    folders = [base / _GATHERED / "groundtruth_depth_gathered" / f"{drive}{end}" for end in _ENDS]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    depths = files_of(folder, ".png")
    return _paired(drive, depths, base / _GATHERED / "image_gathered" / folder.name)


def _published_drive(drive: str, base: Path) -> DepthSequence:
    depths = files_of(base / f"val/{drive}_sync/proj_depth/groundtruth/image_02", ".png")[:LONGEST]
    date = drive.partition("_drive_")[0]
    return _paired(drive, depths, base / date / f"{drive}_sync" / "image_02" / "data")


def _paired(drive: str, depths: list[Path], images: Path) -> DepthSequence:
    if depths and not images.is_dir():
        raise DataError(f"{images}: there is no such folder; expected the pictures of {depths[0].parent}")
    return DepthSequence(drive, tuple(partners(depths, images, ".png", "picture")), tuple(depths), read_depth)
