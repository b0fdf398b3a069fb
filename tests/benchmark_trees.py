"""Scenes of the embedded world as the prepared layouts of the geometry benchmarks, written with nothing of the readers.

Formats from the data sets' own descriptions: Sintel's depth and camera files, 16-bit depth of Bonn and KITTI, TUM's and
ScanNet's text. A benchmark gets few frames and few of its sequences.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from omnistream_jax.data.world import WorldClips

DRIVE = "2011_09_26_drive_0002"
GATHERED = "depth_selection/val_selection_cropped"
TUM = "rgbd_dataset_freiburg3_walking_xyz"
FRAMES, SIZE, LONG_SIDE = 5, 40, 32  # square pictures of 40 become 32 x 16
SCENES = ("scene0707_00", "scene0708_00")


def world_scenes() -> list:
    """Two WorldClip of FRAMES frames, SIZE x SIZE pixels."""
    return [WorldClips("heldout", 2, frames=FRAMES, size=SIZE).clip(index) for index in range(2)]


def write_trees(root: Path, clips: list) -> Path:
    """All six benchmarks, each below `root` where `folder_of` says, with holes in Bonn's depth; root."""
    for name, clip in zip(("ambush_4", "alley_2"), clips, strict=True):
        write_sintel(root / "sintel", name, clip.images, clip.depth, clip.cam_to_world)
    for name, clip in zip(("crowd2", "balloon2"), clips, strict=True):
        write_bonn(root / "bonn", name, clip.images, with_holes(stored(clip.depth, 5000)))
    write_kitti(root / "kitti", clips[0].images, stored(clips[0].depth, 256))
    write_tum(root / "tum", clips[0].images, clips[0].cam_to_world)
    for scene, clip in zip(SCENES, clips, strict=True):
        write_scannet(root / "scannet", scene, clip.images, clip.cam_to_world)
    return root


def folder_of(name: str) -> str:
    """The folder of a benchmark in `write_trees`."""
    return name.partition("_")[0]


def stored(depth: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(depth * float(scale)).astype(np.uint16)


def with_holes(depth: np.ndarray) -> np.ndarray:
    depth = depth.copy()
    depth[:, :10] = 0
    return depth


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
