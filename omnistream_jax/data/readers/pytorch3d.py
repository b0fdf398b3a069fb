"""The annotations of CO3Dv2 and Dynamic Replica: gzipped lists of FrameAnnotation, in PyTorch3D's conventions.

Layout and meaning of the fields: facebookresearch/co3d, co3d/dataset/data_types.py.
A point is a row, X_camera = X_world @ R + T, in a camera whose axes are x left, y up, z forward. Focal lengths and
principal point are in normalised device coordinates: 0 in the middle of the image, positive to the left and up, and 1
away is half the image's width and height ("ndc_norm_image_bounds") or half its shorter side ("ndc_isotropic"). The
image's borders are what is normalised, so that pixel centres lie at + 0.5.
Depth is a 16-bit PNG whose bits are those of float16; 0 is not valid.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import posed_frame
from omnistream_jax.data.readers.cameras import intrinsics_matrix, rigid
from omnistream_jax.data.readers.files import read_json, read_png16
from omnistream_jax.data.schema import PosedFrame

_FLIP_XY = np.diag([-1.0, -1.0, 1.0])  # right, down, forward <-> left, up, forward
_EXPECTED = "FrameAnnotations of PyTorch3D"


class AnnotatedFrame(NamedTuple):
    """What is told of one frame; paths are relative to the folder that the annotations name.

    Attributes:
      image: the picture.
      depth: the depth; None: there is none.
      depth_mask: 0 where depth must not be trusted; None: not told.
      depth_scale: what depth must be multiplied by.
      number: of the frame in its sequence, which its file's name need not have.
      time: in seconds, or the same for all frames of a sequence.
      size: height and width of the picture.
      intrinsics: float64 [3, 3], as ours.
      cam_to_world: float64 [4, 4], as ours.
    """

    image: str
    depth: str | None
    depth_mask: str | None
    depth_scale: float
    number: int
    time: float
    size: tuple[int, int]
    intrinsics: np.ndarray
    cam_to_world: np.ndarray


@functools.lru_cache(maxsize=64)  # CO3D has 51 files; a frame takes less than a kilobyte
def read_annotations(path: Path) -> Mapping[str, tuple[AnnotatedFrame, ...]]:
    """The frames of a file of annotations by the folder of their sequence, two above the picture, in order of time.

    Frames without a viewpoint, or with one that is not finite, are left out.

    Raises:
      DataError: the file is missing or damaged, or holds something else; the message names it.
    """
    sequences: defaultdict[str, list[AnnotatedFrame]] = defaultdict(list)

    def take(value: dict[str, Any]) -> dict[str, Any] | None:
        if "sequence_name" not in value:
            return value  # a part of a frame
        try:
            frame = _frame(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: expected {_EXPECTED}, but one cannot be read ({error!r})") from error
        if frame is not None:
            sequences[str(PurePosixPath(frame.image).parent.parent)].append(frame)
        return None  # so that the file, of hundreds of megabytes, is never held as dictionaries

    read_json(path, take)
    if not sequences:
        raise DataError(f"{path}: expected {_EXPECTED}, found none that has a viewpoint")
    return {name: tuple(sorted(frames, key=lambda f: (f.time, f.image))) for name, frames in sequences.items()}


def read_annotated(root: Path, frame: AnnotatedFrame) -> PosedFrame:
    """Reads one frame; `root` is the folder that its paths are relative to."""
    path = root / frame.image
    image = read_image(path)
    if image.shape[:2] != frame.size:
        told, found = ("{} x {}".format(*size) for size in (frame.size, image.shape))
        raise DataError(f"{path}: its annotation says {told}, the image is {found}")
    depth, hidden = None, None
    if frame.depth is not None:
        depth = read_png16(root / frame.depth).view(np.float16).astype(np.float64) * frame.depth_scale
    if frame.depth_mask is not None:
        hidden = read_image(root / frame.depth_mask)[..., 0] == 0
    return posed_frame(image, frame.intrinsics, depth, frame.cam_to_world, str(path), hidden=hidden)


def _frame(value: Mapping[str, Any]) -> AnnotatedFrame | None:
    viewpoint, depth = value.get("viewpoint"), value.get("depth")
    if viewpoint is None:
        return None
    height, width = (int(side) for side in value["image"]["size"])
    rotation = np.array(viewpoint["R"], np.float64).reshape(3, 3)
    translation = np.array(viewpoint["T"], np.float64).reshape(3)
    focal_x, focal_y = (float(focal) for focal in viewpoint["focal_length"])
    centre_x, centre_y = (float(offset) for offset in viewpoint["principal_point"])
    unit_x, unit_y = _unit(viewpoint.get("intrinsics_format", "ndc_norm_image_bounds"), height, width)
    intrinsics = intrinsics_matrix(
        focal_x * unit_x, focal_y * unit_y, width / 2 - centre_x * unit_x, height / 2 - centre_y * unit_y
    )
    if not all(np.isfinite(part).all() for part in (rotation, translation, intrinsics)):
        return None
    return AnnotatedFrame(
        image=_inside(value["image"]["path"]),
        depth=None if depth is None else _inside(depth["path"]),
        depth_mask=None if depth is None or depth.get("mask_path") is None else _inside(depth["mask_path"]),
        depth_scale=1.0 if depth is None else float(depth["scale_adjustment"]),
        number=int(value["frame_number"]),
        time=float(value["frame_timestamp"]),
        size=(height, width),
        intrinsics=intrinsics,
        # from X_camera = X_world @ R + T: X_world = R @ X_camera - R @ T, as columns
        cam_to_world=rigid(rotation @ _FLIP_XY, -rotation @ translation),
    )


def _unit(intrinsics_format: str, height: int, width: int) -> tuple[float, float]:
    """Pixels to one unit of normalised device coordinates, in x and y."""
    match intrinsics_format.lower():
        case "ndc_isotropic":
            return min(height, width) / 2, min(height, width) / 2
        case "ndc_norm_image_bounds":
            return width / 2, height / 2
    raise ValueError(f"intrinsics_format {intrinsics_format!r} is neither ndc_isotropic nor ndc_norm_image_bounds")


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or len(pure.parts) < 3:
        raise ValueError(f"the path {path!r} is not of the form SEQUENCE/FOLDER/FILE")
    return path
