"""Hypersim (Roberts et al. 2021), unpacked, with two tables of its repository (github.com/apple/ml-hypersim) in root:

    metadata_images_split_scene_v1.csv   scene_name, camera_name, frame_id, included_in_public_release,
                                         split_partition_name (from evermotion_dataset/analysis)
    metadata_camera_parameters.csv       scene_name, settings_output_img_{width,height}, M_proj_00 to M_proj_33
                                         (from contrib/mikeroberts3000)
    SCENE/_detail/metadata_scene.csv     parameter_name, parameter_value: meters_per_asset_unit
    SCENE/_detail/CAMERA/camera_keyframe_{positions,orientations}.hdf5    camera-to-world, OpenGL axes, asset units
    SCENE/images/scene_CAMERA_final_hdf5/frame.NNNN.color.hdf5            float16 [H, W, 3], linear, high dynamic range
    SCENE/images/scene_CAMERA_final_preview/frame.NNNN.tonemap.jpg        the same after tone mapping
    SCENE/images/scene_CAMERA_geometry_hdf5/frame.NNNN.depth_meters.hdf5  metres ALONG THE RAY, NaN not valid
    SCENE/images/scene_CAMERA_geometry_hdf5/frame.NNNN.render_entity_id.hdf5    -1 where nothing was hit

Pictures come from final_hdf5, tone-mapped as the authors do (scene_generate_images_tonemap.py), or where that folder
was not downloaded from final_preview.

Most scenes were rendered with tilt-shift lenses: their image plane is not at right angles to the stored viewing
direction, by up to 41 degrees. M_proj is then intrinsics times a rotation, which go to K and to the pose. What remains
askew after that (23 of 482 scenes) fits no pinhole of ours and is left out; EXPECTED counts without it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.linalg import rq

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require, require_some
from omnistream_jax.data.readers.cameras import from_opengl, intrinsics_matrix, ray_to_z_depth, rigid
from omnistream_jax.data.readers.files import read_csv, read_hdf5, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

_SPLITS = "metadata_images_split_scene_v1.csv"
_CAMERAS = "metadata_camera_parameters.csv"
_MAX_SKEW = 1e-3  # of the focal length: under half a pixel at the image's border
_GAMMA = 1 / 2.2
_BRIGHT = (90.0, 0.8)  # this percentile of the brightness becomes this share of white


class Hypersim(SequenceReader):
    """Rendered walks through furnished rooms, up to 100 frames each."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 586, "val": 74, "test": 69}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> Hypersim:
        """The camera walks of a split that are there. Raises DataError where the layout is another."""
        table = require(root, _SPLITS, expected="the table of the split, from Hypersim's repository")
        cameras = _scene_cameras(
            require(root, _CAMERAS, expected="the table of the lenses, from Hypersim's repository")
        )
        listed = _public_frames(table)
        known = sorted({name for name, _ in listed})
        if split not in known:
            raise DataError(f"{table}: has no split {split!r}, expected one of {', '.join(known)}")
        found = []
        for name, sequence in listed:
            straight = cameras.get(sequence.split("/")[0]) is not None
            if name == split and straight and (root / sequence).is_dir():
                found.append(sequence)
        return cls(f"hypersim ({split})", root, require_some(found, root, "SCENE/_detail/cam_XX of the split's scenes"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        frames = {name: frames for (_, name), frames in _public_frames(self.root / _SPLITS).items()}[sequence]
        positions, orientations = self._poses(sequence)
        finite = np.isfinite(positions).all(1) & np.isfinite(orientations).all((1, 2))
        return [f"{frame:04d}" for frame in frames if frame < len(finite) and finite[frame]]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        scene, _, camera = sequence.split("/")
        intrinsics, turn = _scene_cameras(self.root / _CAMERAS)[scene]
        positions, orientations = self._poses(sequence)
        images = self.root / scene / "images"
        frames = []
        for name in names:
            geometry = images / f"scene_{camera}_geometry_hdf5" / f"frame.{name}"
            path, image = _picture(images, camera, name)
            distance = read_hdf5(f"{geometry}.depth_meters.hdf5", "dataset").astype(np.float64)
            pose = from_opengl(rigid(orientations[int(name)], positions[int(name)]))
            pose[:3, :3] = pose[:3, :3] @ turn.T
            frames.append(posed_frame(image, intrinsics, ray_to_z_depth(distance, intrinsics), pose, str(path)))
        return frames

    def _poses(self, sequence: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions [N, 3] in metres and orientations [N, 3, 3], OpenGL."""
        folder = self.root / sequence
        positions = read_hdf5(folder / "camera_keyframe_positions.hdf5", "dataset").astype(np.float64)
        orientations = read_hdf5(folder / "camera_keyframe_orientations.hdf5", "dataset").astype(np.float64)
        if positions.shape[1:] != (3,) or orientations.shape != (len(positions), 3, 3):
            raise DataError(f"{folder}: positions {positions.shape} and orientations {orientations.shape} do not match")
        return positions * _metres_per_unit(folder.parent / "metadata_scene.csv"), orientations


def _picture(images: Path, camera: str, name: str) -> tuple[Path, np.ndarray]:
    """(the file, uint8 [H, W, 3]) of a frame."""
    folder = images / f"scene_{camera}_final_hdf5"
    if not folder.is_dir():
        path = images / f"scene_{camera}_final_preview" / f"frame.{name}.tonemap.jpg"
        return path, read_image(path)
    path = folder / f"frame.{name}.color.hdf5"
    entity = images / f"scene_{camera}_geometry_hdf5" / f"frame.{name}.render_entity_id.hdf5"
    colour, hit = read_hdf5(path, "dataset").astype(np.float64), read_hdf5(entity, "dataset") != -1
    if colour.shape != (*hit.shape, 3):
        raise DataError(f"{path}: its shape is {colour.shape}, expected {(*hit.shape, 3)} as {entity.name} has it")
    return path, tone_map(colour, hit)


def tone_map(colour: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as Hypersim's own tone mapping makes it.

    Args:
      colour: [H, W, 3], linear, of any exposure.
      hit: bool [H, W], where something was rendered: only that counts for the exposure.
    """
    scale, (percentile, wanted) = 1.0, _BRIGHT
    if hit.any():
        brightness = colour[hit] @ [0.3, 0.59, 0.11]
        bright = np.percentile(brightness, percentile)
        scale = 0.0 if bright < 1e-4 else wanted ** (1 / _GAMMA) / bright  # a frame that is black stays black
    return np.rint(255 * np.clip(scale * colour, 0, 1) ** _GAMMA).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _public_frames(path: Path) -> Mapping[tuple[str, str], tuple[int, ...]]:
    """The numbers of the released frames, in order, by (split, sequence)."""
    columns = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
    frames: dict[tuple[str, str], list[int]] = {}
    with reading(path, f"a table with {', '.join(columns)}"):
        for row in read_csv(path, *columns):
            scene, camera, frame, released, split = (row[column] for column in columns)
            if released == "True":
                frames.setdefault((split, f"{scene}/_detail/{camera}"), []).append(int(frame))
    return {key: tuple(sorted(numbers)) for key, numbers in frames.items()}


@functools.lru_cache(maxsize=4)
def _scene_cameras(path: Path) -> Mapping[str, tuple[np.ndarray, np.ndarray] | None]:
    """(intrinsics [3, 3], rotation [3, 3] from the stored camera to one that looks straight) by scene; None: askew."""
    cells = [[f"M_proj_{row}{column}" for column in range(3)] for row in (0, 1, 3)]
    sizes = ("settings_output_img_width", "settings_output_img_height")
    cameras = {}
    with reading(path, "a table with M_proj_00 to M_proj_33"):
        for row in read_csv(path, "scene_name", *sizes, *(cell for line in cells for cell in line)):
            projection = np.array([[float(row[cell]) for cell in line] for line in cells])
            cameras[row["scene_name"]] = _straightened(projection, float(row[sizes[0]]), float(row[sizes[1]]))
    return cameras


def _straightened(projection: np.ndarray, width: float, height: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Splits rows x, y and w of an OpenGL projection [3, 3] into intrinsics and a rotation before them; None: askew."""
    to_pixels = np.array([[width / 2, 0, width / 2], [0, -height / 2, height / 2], [0, 0, 1]])  # y of OpenGL points up
    upper, rotation = rq(to_pixels @ projection @ np.diag([1.0, -1.0, -1.0]))
    signs = np.diag(np.sign(np.diag(upper)))
    upper, rotation = upper @ signs, signs @ rotation
    upper = upper / upper[2, 2]
    if abs(upper[0, 1]) > _MAX_SKEW * upper[0, 0] or np.linalg.det(rotation) < 0:
        return None
    return intrinsics_matrix(upper[0, 0], upper[1, 1], upper[0, 2], upper[1, 2]), rotation


@functools.lru_cache(maxsize=1024)
def _metres_per_unit(path: Path) -> float:
    with reading(path, "a table with the row meters_per_asset_unit"):
        rows = {
            row["parameter_name"]: row["parameter_value"] for row in read_csv(path, "parameter_name", "parameter_value")
        }
        return float(rows["meters_per_asset_unit"])
