"""MegaDepth v1 (Li and Snavely 2018), with its structure from motion:

    MegaDepth_v1/SCENE/denseK/imgs/NAME.jpg     undistorted photographs
    MegaDepth_v1/SCENE/denseK/depths/NAME.h5    "depth", float32; 0 not valid
    MegaDepth_v1_SfM/SCENE/sparse/manhattan/K/{cameras,images}.txt   COLMAP; also MegaDepth_SfM_v1 or MegaDepth_v1

Photographs of one place each, by many people, in no order; a model has a scale of its own. COLMAP's cameras are those
of the photographs before they were undistorted. As in DUSt3R's preparation, the camera of an undistorted one is
OpenCV's largest without blank pixels, with the principal point in the middle. Depth files with a negative number hold
the order of things, not their distance: nothing in them is valid [M]. Scenes 0015 and 0022 are the split "val", as in
DUSt3R and CUT3R; all others "train".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from scipy import sparse

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix, invert
from omnistream_jax.data.readers.colmap import ColmapCamera, intrinsics_of, read_cameras, read_images
from omnistream_jax.data.readers.files import read_hdf5
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

HELD_OUT = ("0015", "0022")
_MODELS = ("MegaDepth_v1_SfM", "MegaDepth_SfM_v1", "MegaDepth_v1")  # as unpacked; in one folder with the pictures


class MegaDepth(SequenceReader):
    """Photographs of sights from the web, with depth by multi-view stereo."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=False, dynamic=False, ordered=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {}  # 196 scenes are published, with one or more models (sequences) each [M]

    @classmethod
    def open(cls, root: Path, split: str = "train") -> MegaDepth:
        """The models of a split that are there. Raises DataError where the layout is another."""
        if split not in ("train", "val"):
            raise DataError(f"MegaDepth has no split {split!r}, expected train or val")
        pictures = require(root, "MegaDepth_v1", expected="the folder of scenes with pictures and depth")
        found = []
        for folder in pictures.glob("*/dense*/imgs"):
            sequence = folder.parent.relative_to(root)
            if (sequence.parts[1] in HELD_OUT) == (split == "val") and _model_folder(root, str(sequence)) is not None:
                found.append(str(sequence))
        expected = f"SCENE/denseK/imgs of the split with a model SCENE/sparse/manhattan/K in {' or '.join(_MODELS)}"
        return cls(f"megadepth ({split})", root, require_some(found, pictures, expected))

    def neighbours(self, index: int, frame: int) -> Sequence[int]:
        """The frames that share points of the model with this one, most first."""
        seen = self._model(self.sequences[index]).seen
        shared = (seen @ seen[[frame]].T).toarray()[:, 0]
        shared[frame] = 0
        order = np.argsort(-shared, kind="stable")
        return [int(other) for other in order if shared[other] > 0]

    def _frame_names(self, sequence: str) -> Sequence[str]:
        return self._model(sequence).names

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder, model = self.root / sequence, self._model(sequence)
        place = {name: number for number, name in enumerate(model.names)}
        frames = []
        for name in names:
            path = folder / "imgs" / name
            image, depth = read_image(path), read_hdf5(_depth_file(folder, name), "depth")
            camera = model.cameras[place[name]]
            intrinsics = _undistorted(camera, (image.shape[1], image.shape[0]), path)
            if (depth < 0).any():
                depth = np.zeros_like(depth)
            pose = invert(model.world_to_cam[place[name]])
            frames.append(posed_frame(image, intrinsics, depth, pose, str(path)))
        return frames

    def _model(self, sequence: str) -> _Model:
        folder = _model_folder(self.root, sequence)
        if folder is None:
            raise DataError(f"{self.root / sequence}: its model is no longer there")
        return _read_model(folder, self.root / sequence)


class _Model(NamedTuple):
    """Of the frames that can be read: names, cameras, poses [N, 4, 4], and 1 [N, points] where one sees a point."""

    names: tuple[str, ...]
    cameras: tuple[ColmapCamera, ...]
    world_to_cam: np.ndarray
    seen: sparse.csr_array


def _model_folder(root: Path, sequence: str) -> Path | None:
    _, scene, dense = sequence.split("/")
    folders = (root / name / scene / "sparse" / "manhattan" / dense.removeprefix("dense") for name in _MODELS)
    return next((folder for folder in folders if (folder / "images.txt").is_file()), None)


def _depth_file(folder: Path, name: str) -> Path:
    return folder / "depths" / f"{Path(name).stem}.h5"


@functools.lru_cache(maxsize=32)  # text of up to hundreds of megabytes each
def _read_model(folder: Path, pictures: Path) -> _Model:
    cameras, images = read_cameras(folder / "cameras.txt"), read_images(folder / "images.txt")
    there = {path.name for path in (pictures / "imgs").iterdir()}
    deep = {path.stem for path in (pictures / "depths").iterdir()}
    names = [n for n in sorted(images) if n in there and Path(n).stem in deep]
    names = [name for name in names if np.isfinite(images[name].world_to_cam).all()]
    missing = [name for name in names if images[name].camera_id not in cameras]
    if missing:
        raise DataError(f"{folder / 'cameras.txt'}: no camera {images[missing[0]].camera_id}, which {missing[0]} has")
    points = [np.unique(images[name].point_ids) for name in names]
    columns = np.concatenate(points) if points else np.zeros(0, np.int64)
    ends = np.cumsum([0, *map(len, points)])
    shape = len(names), int(columns.max(initial=-1)) + 1
    return _Model(
        names=tuple(names),
        cameras=tuple(cameras[images[name].camera_id] for name in names),
        world_to_cam=np.array([images[name].world_to_cam for name in names]).reshape(-1, 4, 4),
        seen=sparse.csr_array((np.ones(len(columns), np.int32), columns, ends), shape=shape),
    )


def _undistorted(camera: ColmapCamera, size: tuple[int, int], path: Path) -> np.ndarray:
    """Intrinsics [3, 3] of a photograph of `camera` after it was undistorted to `size`, width and height."""
    intrinsics, coefficients = intrinsics_of(camera, path)
    intrinsics[:2, 2] -= 0.5  # OpenCV counts from pixel centres
    matrix, _ = cv2.getOptimalNewCameraMatrix(
        intrinsics, coefficients, (camera.width, camera.height), 0, newImgSize=size, centerPrincipalPoint=True
    )
    return intrinsics_matrix(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], centre=0.0)
