"""The layouts of the geometry benchmarks, written with nothing of the readers, and the embedded world as all of them.

Formats from the data sets' own descriptions: Sintel's depth and camera files, 16-bit depth of Bonn and KITTI, TUM's and
ScanNet's text. Pictures are uint8 [T, H, W, 3], poses camera-to-world [T, 4, 4].
"""

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from omnistream_jax.data.benchmarks.base import Benchmark, FrameSequence
from omnistream_jax.data.benchmarks.registry import open_benchmark
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
    write_tum(root / "tum" / TUM, clips[0].images, clips[0].cam_to_world, 1341846000 + np.arange(FRAMES) / 10)
    for scene, clip in zip(SCENES, clips, strict=True):
        write_scannet(root / "scannet", scene, clip.images, clip.cam_to_world)
    return root


def folder_of(name: str) -> str:
    """The folder of a benchmark in `write_trees`."""
    return name.partition("_")[0]


def opened(name: str, root: Path) -> Benchmark:
    """A benchmark of which not all is there."""
    return open_benchmark(name, root, allow_incomplete=True)


def only_sequence(name: str, root: Path) -> FrameSequence:
    (sequence,) = opened(name, root).sequences
    return sequence


def stored(depth: np.ndarray, scale: float) -> np.ndarray:
    """Metres as uint16, `scale` a metre."""
    return np.rint(depth * float(scale)).astype(np.uint16)


def with_holes(depth: np.ndarray) -> np.ndarray:
    depth = depth.copy()
    depth[:, :10] = 0
    return depth


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def link_many(source: Path, folder: Path, names: Iterable[str]) -> None:
    """One file under many names."""
    folder.mkdir(parents=True)
    for name in names:
        os.link(source, folder / name)


def write_dpt(path: Path, depth: np.ndarray) -> None:
    """Sintel's depth map, float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = depth.shape
    path.write_bytes(struct.pack("<fii", 202021.25, width, height) + depth.astype("<f4").tobytes())


def write_cam(path: Path, world_to_camera: np.ndarray) -> None:
    """Sintel's camera, float64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    intrinsics = [1120.0, 0.0, 511.5, 0.0, 1120.0, 217.5, 0.0, 0.0, 1.0]
    path.write_bytes(struct.pack("<f21d", 202021.25, *intrinsics, *world_to_camera[:3].ravel().tolist()))


def write_sintel(
    root: Path,
    name: str,
    images: np.ndarray,
    depth: np.ndarray | None = None,
    cam_to_world: np.ndarray | None = None,
) -> None:
    """One sequence for either task, or both."""
    for number, image in enumerate(images):
        stem = f"{name}/frame_{number + 1:04d}"
        save_picture(root / f"training/final/{stem}.png", image)
        if depth is not None:
            write_dpt(root / f"training/depth/{stem}.dpt", depth[number])
        if cam_to_world is not None:
            world_to_camera = np.linalg.inv(cam_to_world[number].astype(float))
            write_cam(root / f"training/camdata_left/{stem}.cam", world_to_camera)


def write_bonn(
    root: Path,
    name: str,
    images: np.ndarray,
    stored: np.ndarray,
    folders: tuple[str, str] = ("rgb_110", "depth_110"),
) -> None:
    """`stored` uint16 [T, H, W]: 5000 a metre, 0 not known. Pictures and depth maps are taken at other times."""
    for number, (image, depth) in enumerate(zip(images, stored, strict=True)):
        save_picture(root / f"rgbd_bonn_{name}/{folders[0]}/1548266{number:03d}.18551.png", image)
        save_picture(root / f"rgbd_bonn_{name}/{folders[1]}/1548266{number:03d}.19999.png", depth)


def write_kitti(root: Path, images: np.ndarray, stored: np.ndarray, folder: str = f"{DRIVE}_sync_02") -> None:
    """As prepared; `stored` uint16 [T, H, W]: 256 a metre, 0 not known."""
    for number, (image, depth) in enumerate(zip(images, stored, strict=True)):
        save_picture(root / f"{GATHERED}/image_gathered/{folder}/{number + 5:010d}.png", image)
        save_picture(root / f"{GATHERED}/groundtruth_depth_gathered/{folder}/{number + 5:010d}.png", depth)


def write_kitti_published(root: Path, images: np.ndarray, stored: np.ndarray) -> None:
    """As `write_kitti` for three frames; the raw drive is longer than what is annotated."""
    raw = root / f"2011_09_26/{DRIVE}_sync/image_02/data"
    for number, (image, depth) in enumerate(zip(images, stored, strict=True)):
        annotation = root / f"val/{DRIVE}_sync/proj_depth/groundtruth/image_02"
        save_picture(annotation / f"{number + 5:010d}.png", depth)
        save_picture(raw / f"{number + 5:010d}.png", image)
    for number in (*range(5), *range(8, 13)):
        save_picture(raw / f"{number:010d}.png", images[0])


def tum_row(time: float, pose: np.ndarray) -> str:
    quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat()  # x, y, z, w
    return " ".join(f"{number:.9f}" for number in (time, *pose[:3, 3], *quaternion))


def write_tum(folder: Path, images: np.ndarray, cam_to_world: np.ndarray, times: Sequence[float]) -> None:
    """As prepared: a pose a picture."""
    for time, image in zip(times, images, strict=True):
        save_picture(folder / f"rgb_90/{time:.6f}.png", image)
    rows = [tum_row(time, pose) for time, pose in zip(times, cam_to_world, strict=True)]
    (folder / "groundtruth_90.txt").write_text("\n".join(rows) + "\n")


def write_tum_published(
    folder: Path,
    images: np.ndarray,
    cam_to_world: np.ndarray,
    picture_times: Sequence[float],
    pose_times: Sequence[float],
) -> None:
    """Pictures and poses of times of their own."""
    for time, image in zip(picture_times, images, strict=True):
        save_picture(folder / f"rgb/{time:.6f}.png", image)
    listed = "".join(f"{time:.6f} rgb/{time:.6f}.png\n" for time in picture_times)
    (folder / "rgb.txt").write_text("# color images\n# file: 'x.bag'\n# timestamp filename\n" + listed)
    rows = [tum_row(time, pose) for time, pose in zip(pose_times, cam_to_world, strict=True)]
    (folder / "groundtruth.txt").write_text("# ground truth\n# timestamp tx ty tz qx qy qz qw\n" + "\n".join(rows))


def write_scannet(root: Path, scene: str, images: np.ndarray, cam_to_world: np.ndarray) -> None:
    """As prepared."""
    for number, image in enumerate(images):
        save_picture(root / f"{scene}/color_90/frame_{number:04d}.jpg", image)
    rows = [" ".join(map(repr, pose.astype(float).ravel().tolist())) for pose in cam_to_world]
    (root / f"{scene}/pose_90.txt").write_text("\n".join(rows) + "\n")


def write_scannet_unpacked(root: Path, scene: str, images: np.ndarray, cam_to_world: np.ndarray) -> None:
    """As SensReader leaves it."""
    for number, (image, pose) in enumerate(zip(images, cam_to_world, strict=True)):
        save_picture(root / f"{scene}/color/{number}.jpg", image)
        (root / f"{scene}/pose").mkdir(exist_ok=True)
        np.savetxt(root / f"{scene}/pose/{number}.txt", pose, fmt="%f")  # six digits
