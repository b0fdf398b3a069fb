"""DL3DV-10K (Ling et al. 2024), as its two smaller releases unpack (480P and 960P), the layout partly from memory:

    benchmark-meta.csv                        of DL3DV-10K-Benchmark: the 140 scenes that must not be trained on
    {1K,...,11K}/HASH/images_4/frame_NNNNN.png    960 x 540 (960P), or images_8, 480 x 270 (480P)
    {1K,...,11K}/HASH/transforms.json         nerfstudio's: w, h, fl_x, fl_y, cx, cy, k1, k2, p1, p2 in pixels of the 4K
                                              video; frames: file_path, transform_matrix, camera-to-world, OpenGL

Depth was not published: these scenes have cameras only. Frames are undistorted. A scene may instead (or as well) have
the form that CUT3R computed with COLMAP, which has depth and is preferred:

    {1K,...,11K}/HASH/dense*/rgb/NAME.png     undistorted
    {1K,...,11K}/HASH/dense*/cam/NAME.npz     intrinsic [3, 3], pose [4, 4], camera-to-world, OpenCV
    {1K,...,11K}/HASH/dense*/depth/NAME.npy   float32, units of the scene, 0 or not finite where not valid
    {1K,...,11K}/HASH/dense*/{sky_mask,outlier_mask}/NAME.png    127 and more: sky, and depth not to be trusted

Of that depth the farthest 2 % of a frame are not valid either, as CUT3R trains on it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import far_outliers, from_opengl
from omnistream_jax.data.readers.files import read_json, read_lines, read_npy, read_npz, reading
from omnistream_jax.data.readers.undistort import Undistortion, undistortion
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_BENCHMARK = "benchmark-meta.csv"
_LENS = ("k1", "k2", "p1", "p2")
_LAYOUT = "{1K,...,11K}/HASH/transforms.json and none of HASH/dense*/cam"


class DL3DV(SequenceReader):
    """Walks around and through places, frames of a hand-held or flown camera."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=False, dynamic=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 10179, "benchmark": 140}  # 10,319 in all; the split from memory

    @classmethod
    def open(cls, root: Path, split: str = "train") -> DL3DV:
        """The scenes of a split that are there. Raises DataError where the layout is another."""
        if split not in cls.EXPECTED:
            raise DataError(f"dl3dv has no split {split!r}, expected one of {', '.join(cls.EXPECTED)}")
        expected = "the list of the benchmark's scenes, from the data set DL3DV-10K-Benchmark"
        held_out = _hashes(require(root, _BENCHMARK, expected=expected))
        dense = [path.parent for path in root.glob("*K/*/dense*/cam")]
        whole = {path.parent for path in dense}
        plain = [path.parent for path in root.glob("*K/*/transforms.json") if path.parent not in whole]
        names = [path.relative_to(root).as_posix() for path in dense + plain]
        names = [name for name in names if (name.split("/")[1] in held_out) == (split == "benchmark")]
        return cls(f"dl3dv ({split})", root, require_some(names, root, f"{_LAYOUT} of the split"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        folder = self.root / sequence
        if not _is_dense(sequence):
            return sorted(name for name, pose in _transforms(folder)[1].items() if np.isfinite(pose).all())
        stored = sorted(path.stem for path in (folder / "cam").glob("*.npz"))
        return [name for name in stored if all(np.isfinite(array).all() for array in _dense_camera(folder, name))]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        read = _read_dense if _is_dense(sequence) else _read_photograph
        return [read(self.root / sequence, name) for name in names]


def _is_dense(sequence: str) -> bool:
    return sequence.count("/") == 2  # NK/HASH/dense


def _read_photograph(folder: Path, name: str) -> PosedFrame:
    fields, poses = _transforms(folder)
    path = _images_of(folder) / f"{name}.png"
    image = read_image(path)
    with reading(folder / "transforms.json", f"nerfstudio's fields w, h, fl_x, fl_y, cx, cy, {', '.join(_LENS)}"):
        pinhole_view = _pinhole_view(fields, image.shape[1], image.shape[0])
    return posed_frame(pinhole_view.image(image), pinhole_view.intrinsics, None, from_opengl(poses[name]), str(path))


def _pinhole_view(fields: Mapping[str, Any], width: int, height: int) -> Undistortion:
    """For an image of that size, whatever size the fields speak of."""
    across, down = width / float(fields["w"]), height / float(fields["h"])
    pinhole = tuple(
        float(fields[name]) * scale for name, scale in (("fl_x", across), ("fl_y", down), ("cx", across), ("cy", down))
    )
    lens = tuple(float(fields[name]) for name in _LENS)
    return undistortion((width, height), pinhole, lens, fisheye=False)


def _images_of(folder: Path) -> Path:
    for name in ("images_4", "images_8"):
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder}: holds no images_4 and no images_8, expected one of them")


def _read_dense(folder: Path, name: str) -> PosedFrame:
    path = folder / "rgb" / f"{name}.png"
    intrinsics, pose = _dense_camera(folder, name)
    depth = read_npy(folder / "depth" / f"{name}.npy").astype(np.float64)
    sky, outlier = (read_image(folder / kind / f"{name}.png")[..., 0] >= 127 for kind in ("sky_mask", "outlier_mask"))
    if sky.shape != depth.shape or outlier.shape != depth.shape:
        raise DataError(f"{folder}: the masks of {name} have other sizes than its depth, {depth.shape}")
    hidden = outlier | far_outliers(np.where(sky | outlier, 0.0, depth), 98.0)
    return posed_frame(read_image(path), intrinsics, depth, pose, str(path), sky=sky, hidden=hidden)


def _dense_camera(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """intrinsics [3, 3] and camera-to-world [4, 4]; COLMAP's pixel centres are ours."""
    return read_npz(folder / "cam" / f"{name}.npz", "intrinsic", "pose")


@functools.lru_cache(maxsize=64)
def _transforms(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, np.ndarray]]:
    """(all fields, camera-to-world [4, 4], OpenGL, by the frame's name without its ending)."""
    path = folder / "transforms.json"
    with reading(path, "nerfstudio's transforms.json: frames with file_path and transform_matrix"):
        fields = read_json(path)
        poses = {
            Path(frame["file_path"]).stem: np.array(frame["transform_matrix"], np.float64).reshape(4, 4)
            for frame in fields["frames"]
        }
    return fields, poses


def _hashes(path: Path) -> frozenset[str]:
    """The names of scenes in a table, wherever they stand in it."""
    found = frozenset(re.findall(r"\b[0-9a-f]{64}\b", "\n".join(read_lines(path))))
    if not found:
        raise DataError(f"{path}: expected a table that names scenes by 64 hexadecimal digits")
    return found
