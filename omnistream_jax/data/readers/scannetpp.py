"""ScanNet++ (Yeshwanth et al. 2023), with what its toolkit (github.com/scannetpp/scannetpp) exports:

    splits/nvs_sem_{train,val}.txt                      a scene a line
    data/SCENE/dslr/resized_images/DSCNNNNN.JPG         fisheye, 1752 x 1168
    data/SCENE/iphone/rgb/frame_NNNNNN.jpg              iphone.prepare_iphone_data, 1920 x 1440
    data/SCENE/iphone/depth/frame_NNNNNN.png            likewise: the phone's depth, uint16 millimetres, 256 x 192
    data/SCENE/iphone/render_depth/frame_NNNNNN.png     common.render: depth of the scan's mesh, uint16 millimetres
    data/SCENE/{dslr,iphone}/colmap/{cameras,images}.txt    world-to-camera, metric; OPENCV_FISHEYE and OPENCV

Each scene gives up to two sequences. Of an iPhone's, depth is that of render_depth where this folder is, else that of
depth, else there is none. A DSLR's has none: cameras only. Both are undistorted, depth with the images (the renderer
draws through the lens); the frames of a sequence are those that COLMAP registered. Not read: masks of faces, panoramas,
depth.bin and rgb.mkv themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import invert
from omnistream_jax.data.readers.colmap import ColmapImage, intrinsics_of, read_cameras, read_images
from omnistream_jax.data.readers.files import read_lines, read_png16
from omnistream_jax.data.readers.undistort import Undistortion, undistortion
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_PICTURES = {"dslr": "resized_images", "iphone": "rgb"}


class ScanNetPP(SequenceReader):
    """Rooms seen by a fisheye camera on a walk and by a phone's video."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 1712, "val": 100}  # version 2: 856 and 50 scenes, from memory

    @classmethod
    def open(cls, root: Path, split: str = "train") -> ScanNetPP:
        """The sequences of a split that are there. Raises DataError where the layout is another."""
        data = require(root, "data", expected="the folder of scenes")
        listed = read_lines(require(root, "splits", f"nvs_sem_{split}.txt", expected="the list of the split's scenes"))
        devices = [f"{scene}/{device}" for scene in listed for device in _PICTURES]
        found = [f"data/{name}" for name in devices if (data / name / "colmap" / "images.txt").is_file()]
        expected = "SCENE/{dslr,iphone}/colmap/images.txt of the split's scenes"
        return cls(f"scannetpp ({split})", root, require_some(found, data, expected))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        images = _images(self.root / sequence)
        return sorted(name for name, image in images.items() if np.isfinite(image.world_to_cam).all())

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        frames = []
        for name in names:
            image = _images(folder)[name]
            view = _pinhole_view(folder / "colmap" / "cameras.txt", image.camera_id)
            path = folder / _PICTURES[folder.name] / name
            picture = read_image(path)
            if picture.shape[:2] != view.columns.shape:
                raise DataError(f"{path}: its size {picture.shape[:2]} is not that of its camera, {view.columns.shape}")
            depth = _depth(folder, name)
            if depth is not None:
                depth = view.nearest(depth) / 1000.0
            pose = invert(image.world_to_cam)
            frames.append(posed_frame(view.image(picture), view.intrinsics, depth, pose, str(path)))
        return frames


def _depth(folder: Path, name: str) -> np.ndarray | None:
    """uint16 millimetres through the lens, [h, w] of any size; None where the sequence has no depth."""
    for kind in ("render_depth", "depth") if folder.name == "iphone" else ():
        if (folder / kind).is_dir():
            return read_png16(folder / kind / f"{Path(name).stem}.png")
    return None


@functools.lru_cache(maxsize=16)
def _images(folder: Path) -> Mapping[str, ColmapImage]:
    """The registered images by file name; COLMAP may have stored them with a folder before it."""
    return {PurePosixPath(name).name: image for name, image in read_images(folder / "colmap" / "images.txt").items()}


def _pinhole_view(path: Path, camera_id: int) -> Undistortion:
    camera = _cameras(path).get(camera_id)
    if camera is None:
        raise DataError(f"{path}: has no camera {camera_id}, which images.txt names")
    intrinsics, lens = intrinsics_of(camera, path)
    pinhole = (intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2])
    fisheye = camera.model == "OPENCV_FISHEYE"
    return undistortion((camera.width, camera.height), tuple(map(float, pinhole)), tuple(map(float, lens)), fisheye)


_cameras = functools.lru_cache(maxsize=64)(read_cameras)
