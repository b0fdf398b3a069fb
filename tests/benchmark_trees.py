"""Scenes of the embedded world as the prepared layouts of the geometry benchmarks, written with nothing of the readers.

Formats from the data sets' own descriptions: Sintel's depth and camera files, 16-bit depth of Bonn and KITTI, TUM's and
ScanNet's text. A benchmark gets few frames and few of its sequences.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

DRIVE = "2011_09_26_drive_0002"
GATHERED = "depth_selection/val_selection_cropped"
TUM = "rgbd_dataset_freiburg3_walking_xyz"


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_sintel(root: Path, name: str, images: np.ndarray, depth: np.ndarray, cam_to_world: np.ndarray) -> None:
    """One sequence for both tasks; depth and poses as exact as float32 and float64 are."""
    for number, (image, distance, pose) in enumerate(zip(images, depth, cam_to_world, strict=True), start=1):
        stem, (height, width) = f"{name}/frame_{number:04d}", distance.shape
        save_picture(root / f"training/final/{stem}.png", image)
        for kind in ("depth", "camdata_left"):
            (root / f"training/{kind}/{name}").mkdir(parents=True, exist_ok=True)
        content = struct.pack("<fii", 202021.25, width, height) + distance.astype("<f4").tobytes()
        (root / f"training/depth/{stem}.dpt").write_bytes(content)
        numbers = np.concatenate([np.eye(3).ravel(), np.linalg.inv(pose.astype(float))[:3].ravel()])
        (root / f"training/camdata_left/{stem}.cam").write_bytes(struct.pack("<f21d", 202021.25, *numbers))


def write_bonn(root: Path, name: str, images: np.ndarray, stored: np.ndarray) -> None:
    """`stored` uint16 [T, H, W]: 5000 a metre, 0 not known."""
    for number, (image, depth) in enumerate(zip(images, stored, strict=True)):
        save_picture(root / f"rgbd_bonn_{name}/rgb_110/{1548266000 + number}.1.png", image)
        save_picture(root / f"rgbd_bonn_{name}/depth_110/{1548266000 + number}.2.png", depth)


def write_kitti(root: Path, images: np.ndarray, stored: np.ndarray) -> None:
    """`stored` uint16 [T, H, W]: 256 a metre, 0 not known."""
    for number, (image, depth) in enumerate(zip(images, stored, strict=True)):
        save_picture(root / f"{GATHERED}/image_gathered/{DRIVE}_sync_02/{number + 5:010d}.png", image)
        save_picture(root / f"{GATHERED}/groundtruth_depth_gathered/{DRIVE}_sync_02/{number + 5:010d}.png", depth)


def write_tum(root: Path, images: np.ndarray, cam_to_world: np.ndarray) -> None:
    rows = []
    for number, (image, pose) in enumerate(zip(images, cam_to_world, strict=True)):
        save_picture(root / f"{TUM}/rgb_90/{1341846000 + number / 10:.6f}.png", image)
        quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat()  # x, y, z, w
        rows.append(" ".join(map(repr, [1341846000 + number / 10, *pose[:3, 3].tolist(), *quaternion.tolist()])))
    (root / f"{TUM}/groundtruth_90.txt").write_text("\n".join(rows) + "\n")


def write_scannet(root: Path, scene: str, images: np.ndarray, cam_to_world: np.ndarray) -> None:
    for number, image in enumerate(images):
        save_picture(root / f"{scene}/color_90/frame_{number:04d}.jpg", image)
    rows = [" ".join(map(repr, pose.astype(float).ravel().tolist())) for pose in cam_to_world]
    (root / f"{scene}/pose_90.txt").write_text("\n".join(rows) + "\n")
