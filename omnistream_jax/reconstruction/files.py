"""Files of a reconstruction in formats that others read: PLY, TUM trajectories, 16-bit PNG, safetensors, JSON.

Every file is written under its name with ".tmp" at the end, and gets its name when it is whole. That holds where the
process ends at any moment; nothing is synchronised to the disk for the sake of a machine that does.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from safetensors.numpy import save
from scipy.spatial.transform import Rotation

from omnistream_jax.data.opencv import cv2
from omnistream_jax.utils.files import written_aside

MILLIMETRES = 1000  # a metre
FARTHEST = 65535  # millimetres in 16 bits
_PNG_COMPRESSION = 3  # of 9: beyond it, little smaller and far slower
_ROTATION_TOLERANCE = 1e-3
_VERTEX = np.dtype([("position", "<f4", 3), ("colour", "u1", 3)])
_PLY_HEADER = """ply
format binary_little_endian 1.0
element vertex {count}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
"""
_PIXELS = "row-major 3 x 3, in pixels; the pixel of column u and row v has its centre at (u + 0.5, v + 0.5)"


class ReconstructionError(ValueError):
    """What cannot be written; the message names the file and says why."""


def write_ply(path: str | os.PathLike, points: np.ndarray, colours: np.ndarray) -> None:
    """Writes a point cloud as binary little-endian PLY: float x, y, z and uchar red, green, blue.

    Args:
      path: of the file, in a folder that exists; replaced if it exists.
      points: [N, 3] of any float type, written as float32; N may be 0.
      colours: uint8 [N, 3].

    Raises:
      ReconstructionError: the arrays do not fit, or the file cannot be written.
    """
    fits = points.shape == (len(points), 3) == colours.shape and colours.dtype == np.uint8
    found = f"points {points.shape}, colours {colours.dtype} {colours.shape}"
    _require(fits, path, f"{found}: expected [N, 3] and uint8 [N, 3]")
    vertices = np.empty(len(points), _VERTEX)
    vertices["position"], vertices["colour"] = points, colours
    with _aside(path) as aside, aside.open("wb") as file:
        file.write(_PLY_HEADER.format(count=len(points)).encode("ascii"))
        file.write(memoryview(vertices).cast("B") if len(vertices) else b"")


def write_depth_png(path: str | os.PathLike, depth_metres: np.ndarray) -> None:
    """Writes depth as a 16-bit grey PNG in millimetres, as ScanNet publishes it.

    0 says not known: where depth is not finite, below half a millimetre, or beyond 65.535 m.

    Args:
      path: of the file, in a folder that exists; replaced if it exists.
      depth_metres: [H, W].

    Raises:
      ReconstructionError: not a picture, or the file cannot be written.
    """
    _require(depth_metres.ndim == 2 and depth_metres.size, path, f"depth {depth_metres.shape}: expected [H, W]")
    with np.errstate(over="ignore"):
        millimetres = np.rint(depth_metres.astype(np.float64) * MILLIMETRES)
    known = (millimetres > 0) & (millimetres <= FARTHEST)  # False for NaN
    pixels = np.where(known, millimetres, 0).astype(np.uint16)
    coded, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION])
    _require(coded, path, f"depth {depth_metres.shape}: cannot be coded as PNG")
    with _aside(path) as aside:
        aside.write_bytes(data)


def write_depth_safetensors(
    path: str | os.PathLike,
    depth: np.ndarray,
    *,
    index: np.ndarray | None = None,
    time: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes depth as it is, values that are not finite too, as the tensor "depth" of a safetensors file.

    Args:
      path: of the file, in a folder that exists; replaced if it exists.
      depth: [T, H, W], written as float32.
      index: [T], the frames' numbers, written as "index", int64; None: left out.
      time: [T], their times in seconds, written as "time", float64; None: left out.
      confidence: [T, H, W], written as "confidence", float32; None: left out.
      metadata: what else is to be known.

    Raises:
      ReconstructionError: the arrays do not fit, or the file cannot be written.
    """
    _require(depth.ndim == 3, path, f"depth {depth.shape}: expected [T, H, W]")
    parts = {
        "depth": (depth, np.float32, depth.shape),
        "index": (index, np.int64, depth.shape[:1]),
        "time": (time, np.float64, depth.shape[:1]),
        "confidence": (confidence, np.float32, depth.shape),
    }
    tensors = {}
    for name, (values, dtype, shape) in parts.items():
        if values is not None:
            _require(np.shape(values) == shape, path, f"{name} {np.shape(values)}: expected {list(shape)}")
            tensors[name] = np.ascontiguousarray(values, dtype)
    with _aside(path) as aside:  # not save_file: its own temporary file outlives a kill, and only its owner may read it
        aside.write_bytes(save(tensors, dict(metadata or {})))


def write_tum(path: str | os.PathLike, timestamps: np.ndarray, cam_to_world: np.ndarray) -> None:
    """Writes a trajectory as TUM's RGB-D benchmark has it, "timestamp tx ty tz qx qy qz qw" on each line.

    Args:
      path: of the file, in a folder that exists; replaced if it exists.
      timestamps: [T], seconds.
      cam_to_world: [T, 4, 4].

    Raises:
      ReconstructionError: T differs or is 0, a number is not finite, a rotation is none, or the file cannot be written.
    """
    fits = len(timestamps) and cam_to_world.shape == (len(timestamps), 4, 4)
    found = f"timestamps {np.shape(timestamps)}, cam_to_world {cam_to_world.shape}"
    _require(fits, path, f"{found}: expected [T] and [T, 4, 4]")
    lines = [tum_line(path, *each) for each in zip(timestamps, cam_to_world, strict=True)]
    with _aside(path) as aside:
        aside.write_text("".join([TrajectoryWriter.HEADER, *lines]), encoding="utf-8")


def write_intrinsics_json(path: str | os.PathLike, intrinsics: np.ndarray, height: int, width: int) -> None:
    """Writes {"height", "width", "pixels" (the convention in words), "intrinsics"}, the last as nested lists.

    Args:
      path: of the file, in a folder that exists; replaced if it exists.
      intrinsics: [3, 3], or [T, 3, 3] of T frames.
      height: of the pictures that they belong to, in pixels.
      width: likewise.

    Raises:
      ReconstructionError: the shape is another, a number is not finite, or the file cannot be written.
    """
    fits = intrinsics.ndim in (2, 3) and intrinsics.shape[-2:] == (3, 3)
    _require(fits, path, f"intrinsics {intrinsics.shape}: expected [3, 3] or [T, 3, 3]")
    matrices = [intrinsics_line(path, each) for each in intrinsics.reshape(-1, 3, 3)]
    text = matrices[0] if intrinsics.ndim == 2 else IntrinsicsWriter.join(matrices)
    with _aside(path) as aside:
        aside.write_text(IntrinsicsWriter.header(height, width) + text + IntrinsicsWriter.END, encoding="utf-8")


def tum_line(path: str | os.PathLike, timestamp: float, cam_to_world: np.ndarray) -> str:
    """A line of a trajectory; digits enough for every bit. Raises ReconstructionError for what is no pose."""
    pose = np.asarray(cam_to_world, np.float64)
    rotation = pose[:3, :3]
    finite = np.isfinite(timestamp) and np.isfinite(pose).all()
    _require(finite, path, f"the pose at {timestamp} s: a number is not finite")
    straight = np.abs(rotation @ rotation.T - np.eye(3)).max() < _ROTATION_TOLERANCE and np.linalg.det(rotation) > 0
    _require(straight, path, f"the pose at {timestamp} s: {rotation.tolist()}, expected a rotation")
    values = [timestamp, *pose[:3, 3], *Rotation.from_matrix(rotation).as_quat(canonical=True)]
    return " ".join(repr(float(value)) for value in values) + "\n"


def intrinsics_line(path: str | os.PathLike, intrinsics: np.ndarray) -> str:
    """One matrix as JSON. Raises ReconstructionError where a number is not finite: JSON has no such numbers."""
    _require(np.isfinite(intrinsics).all(), path, f"intrinsics {intrinsics.tolist()}: a number is not finite")
    return json.dumps(intrinsics.tolist())


class _GrowingText:
    """A text file that grows under its name with ".tmp", line by line to the system, and is renamed in the end.

    If the process ends before that, the lines until then stay there.
    """

    def __init__(self, path: str | os.PathLike, header: str):
        self.path = Path(path)
        self._temporary = aside_name(self.path)
        self._file: TextIO | None = None
        with _explained(self.path):
            self._file = self._temporary.open("w", encoding="utf-8")
        self._write(header)

    def _write(self, text: str) -> None:
        with _explained(self.path):
            self._file.write(text)
            self._file.flush()

    def discard(self) -> None:
        """Removes what was written, for want of anything to keep; after `close`, does nothing."""
        if self._file is not None:
            with _explained(self.path), self._file:
                self._temporary.unlink()
            self._file = None

    def _end(self, text: str) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with _explained(self.path), file:
            file.write(text)
        with _explained(self.path):
            self._temporary.replace(self.path)


class TrajectoryWriter(_GrowingText):
    """A trajectory like `write_tum`'s that grows pose by pose.

    Until `close`, it is PATH.tmp, and a whole trajectory of the poses so far.

    Raises:
      ReconstructionError: the file cannot be written, here and in all methods.
    """

    HEADER = "# timestamp tx ty tz qx qy qz qw\n"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, self.HEADER)

    def add(self, timestamp: float, cam_to_world: np.ndarray) -> None:
        """Adds a pose [4, 4] at a time in seconds; ReconstructionError for numbers that are none."""
        self._write(tum_line(self.path, timestamp, cam_to_world))

    def close(self) -> None:
        """Gives the file its name; a second call does nothing."""
        self._end("")


class IntrinsicsWriter(_GrowingText):
    """Intrinsics [T, 3, 3] like `write_intrinsics_json`'s that grow frame by frame.

    Until `close`, they are PATH.tmp, one matrix a line, without the brackets that end the list.

    Raises:
      ReconstructionError: the file cannot be written, here and in all methods.
    """

    END = "}\n"

    def __init__(self, path: str | os.PathLike, height: int, width: int):
        super().__init__(path, self.header(height, width) + "[")
        self._between = "\n"

    @staticmethod
    def header(height: int, width: int) -> str:
        """What stands before the matrices."""
        return json.dumps({"height": height, "width": width, "pixels": _PIXELS})[:-1] + ', "intrinsics": '

    @staticmethod
    def join(matrices: list[str]) -> str:
        """The list of all matrices."""
        return "[\n" + ",\n".join(matrices) + "\n]"

    def add(self, intrinsics: np.ndarray) -> None:
        """Adds a matrix [3, 3]; ReconstructionError where a number is not finite."""
        self._write(self._between + intrinsics_line(self.path, intrinsics))
        self._between = ",\n"

    def close(self) -> None:
        """Ends the list and gives the file its name; a second call does nothing."""
        self._end("\n]" + self.END)


def aside_name(path: Path) -> Path:
    """Under which a file grows until it is whole."""
    return path.with_name(f"{path.name}.tmp")


@contextlib.contextmanager
def _aside(path: str | os.PathLike) -> Iterator[Path]:
    """Where to write; renamed to `path` at the end of the block, removed if it is left by an exception."""
    path = Path(path)
    with _explained(path), written_aside(path, aside_name(path)) as aside:
        yield aside


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReconstructionError(f"{path}: cannot be written ({error})") from error


def _require(condition: object, path: str | os.PathLike, message: str) -> None:
    if not condition:
        raise ReconstructionError(f"{path}: {message}")
