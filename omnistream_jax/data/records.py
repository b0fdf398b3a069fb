"""The record of prepared shards: some frames of one sequence with their cameras, in the bytes of a safetensors file.

Tensors, for n frames (data/schema.py has axes and units):

    header         uint8 [...]     JSON, see below
    images         uint8 [...]     n JPEG or PNG files behind each other
    image_ends     int64 [n]       where each of them ends
    depths         uint8 [...]     n depth maps behind each other; one of no bytes: there is none
    depth_ends     int64 [n]
    intrinsics     float32 [n, 3, 3]
    cam_to_world   float32 [n, 4, 4]    NaN: not known

header: {"format", "source", "sequence", "paths": the frames' files, "depth": of each frame null or its encoding}.

A depth map is a 16-bit PNG of codes: 0 is not valid, 65535 is sky, and others mean

    {"kind": "linear", "per_unit": s}          code / s, where that gives every value exactly (millimetres, centimetres)
    {"kind": "log", "start": a, "step": b}     exp(a + b * (code - 1)), within a relative error of 1e-4

or {"kind": "float32", "shape": [H, W]}: little-endian floats in zlib, exact, -1 for sky; where values lie so far
apart (a factor of 480,000) that 16 bits would err by more. "depth" and "sky" beside them say whether each is told.

A sequence without order has one record more, who sees what: `encode_neighbours`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from safetensors import numpy as safetensors

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import MAX_PIXELS
from omnistream_jax.data.record_bytes import pack, unpack
from omnistream_jax.data.schema import PosedFrame

DEPTH_ERROR = 1e-4
"""Largest relative error of a stored depth."""

_SKY, _LARGEST = 65535, 65534
_UNITS = (1000, 100)  # codes a metre
_ROUNDING = 1e-7  # of float32, left to it from DEPTH_ERROR

ImageFormat = Literal["jpeg", "png"]


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """How frames are stored.

    Attributes:
      format: "jpeg", with colours at half resolution as cameras have it, or "png", exact.
      quality: of JPEG, 1 to 95.
      short_side: larger frames are scaled down to it; 0 keeps every size.
    """

    format: ImageFormat = "jpeg"
    quality: int = 95
    short_side: int = 512

    def check(self) -> None:
        """Raises UsageError for values that make no sense."""
        if self.short_side < 0:
            raise UsageError(f"short_side: expected a number of pixels, or 0 to keep it, got {self.short_side}")
        if not 1 <= self.quality <= 95:
            raise UsageError(f"quality: expected 1 to 95, got {self.quality}")


@dataclasses.dataclass(frozen=True)
class Record:
    """A record that was read; frames are decoded one by one.

    Attributes:
      paths: of the frames' files, as the reader of the published layout called them.
    """

    paths: tuple[str, ...]
    _depth: tuple[dict[str, Any] | None, ...]
    _tensors: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.paths)

    def frame(self, number: int, where: str) -> PosedFrame:
        """Decodes one frame; `where` names the record in messages. Raises DataError where it is damaged."""
        try:
            path = f"{where}: {self.paths[number]}"
            image = _read_image(self._slice("image", number))
            depth = sky = valid = None
            if (encoding := self._depth[number]) is not None:
                depth, sky = decode_depth(self._slice("depth", number), encoding)
                depth, sky = (depth if encoding["depth"] else None), (sky if encoding["sky"] else None)
                valid = None if depth is None else depth > 0
            pose = self._tensors["cam_to_world"][number]
            return PosedFrame(
                image,
                self._tensors["intrinsics"][number],
                depth,
                valid,
                sky,
                None if np.isnan(pose).any() else pose,
                path,
            )
        except Exception as error:  # decoders raise what they like
            raise DataError(f"{where}: frame {number} of a prepared record cannot be read ({error})") from error

    def _slice(self, kind: str, number: int) -> bytes:
        ends = self._tensors[f"{kind}_ends"]
        return self._tensors[f"{kind}s"][ends[number - 1] if number else 0 : ends[number]].tobytes()


def encode_record(
    frames: Sequence[PosedFrame],
    *,
    source: str,
    sequence: str,
    paths: Sequence[str],
    options: ImageOptions,
) -> bytes:
    """The bytes of a record, the same for the same arguments.

    Args:
      frames: of one sequence, in their size to be stored (see `scaled`).
      source: the data set and its split.
      sequence: its name in the data set.
      paths: what to call each frame's file.
      options: how images are stored.
    """
    depths = [encode_depth(frame.depth, frame.sky) for frame in frames]
    unknown = np.full((4, 4), np.nan, np.float32)
    header = {
        "source": source,
        "sequence": sequence,
        "paths": list(paths),
        "depth": [encoding for _, encoding in depths],
    }
    poses = [unknown if frame.cam_to_world is None else frame.cam_to_world for frame in frames]
    tensors = {
        "intrinsics": np.stack([frame.intrinsics for frame in frames]).astype(np.float32),
        "cam_to_world": np.stack(poses).astype(np.float32),
    }
    tensors["images"], tensors["image_ends"] = _join([image_file(frame.image, options) for frame in frames])
    tensors["depths"], tensors["depth_ends"] = _join([data for data, _ in depths])
    return pack(header, tensors)


def decode_record(data: bytes, where: str) -> Record:
    """Reads a record; no image is decoded yet. Raises DataError, naming `where`, for bytes that are none."""
    return unpack(
        data,
        where,
        "prepared frames",
        lambda header, tensors: Record(tuple(header["paths"]), tuple(header["depth"]), tensors),
    )


def encode_neighbours(neighbours: Sequence[Sequence[int]]) -> bytes:
    """Of each frame of a sequence the frames that see what it sees: tensors "neighbours" int32 and "ends" int64."""
    flat = [number for numbers in neighbours for number in numbers]
    ends = np.cumsum([len(numbers) for numbers in neighbours], dtype=np.int64)
    return safetensors.save({"neighbours": np.array(flat, np.int32), "ends": ends})


def decode_neighbours(data: bytes, where: str) -> list[list[int]]:
    """What `encode_neighbours` was given. Raises DataError, naming `where`, for other bytes."""
    try:
        tensors = safetensors.load(data)
        return [part.tolist() for part in np.split(tensors["neighbours"], tensors["ends"][:-1])]
    except Exception as error:
        raise DataError(f"{where}: expected a record of neighbours, but reading it failed ({error})") from error


def encode_depth(depth: np.ndarray | None, sky: np.ndarray | None) -> tuple[bytes, dict[str, Any] | None]:
    """A depth map [H, W] and where the sky is [H, W], as bytes and their encoding; either may be None."""
    if depth is None and sky is None:
        return b"", None
    told = {"depth": depth is not None, "sky": sky is not None}
    depth = np.zeros(sky.shape, np.float32) if depth is None else depth
    valid = depth > 0
    codes, encoding = _linear_codes(depth, valid) or _log_codes(depth, valid) or (None, {})
    if codes is None:
        values = depth.astype("<f4")
        if sky is not None:
            values[sky] = -1
        return zlib.compress(values.tobytes(), 3), {"kind": "float32", "shape": list(depth.shape)} | told
    codes = np.where(valid, codes, 0).astype(np.uint16)
    if sky is not None:
        codes[sky] = _SKY
    buffer = io.BytesIO()
    Image.fromarray(codes).save(buffer, "png", compress_level=3)  # its filters save a third beside zlib alone
    return buffer.getvalue(), encoding | told


def decode_depth(data: bytes, encoding: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [H, W], 0 where not valid, and bool [H, W], sky. Raises ValueError and others where it is damaged."""
    if encoding["kind"] == "float32":
        height, width = encoding["shape"]
        unpacker = zlib.decompressobj()
        values = np.frombuffer(unpacker.decompress(data, 4 * height * width), "<f4").reshape(height, width)
        return np.maximum(values, 0), values < 0
    with Image.open(io.BytesIO(data), formats=["png"]) as image:
        _check_size(image)
        codes = np.asarray(image).astype(np.uint16)
    known = (codes > 0) & (codes < _SKY)
    if encoding["kind"] == "linear":
        values = _from_linear(codes, encoding["per_unit"])
    elif encoding["kind"] == "log":
        # One exponential for each code that occurs would be a table of 65,535; pixels are mostly more.
        table = np.exp(encoding["start"] + encoding["step"] * (np.arange(_SKY + 1.0) - 1)).astype(np.float32)
        values = table[codes]
    else:
        raise ValueError(f"depth is stored as {encoding['kind']!r}, which is not known")
    return np.where(known, values, np.float32(0)), codes == _SKY


def _from_linear(codes: np.ndarray, per_unit: int) -> np.ndarray:
    return (codes / np.float64(per_unit)).astype(np.float32)


def _linear_codes(depth: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, dict[str, Any]] | None:
    for per_unit in _UNITS:
        codes = np.where(valid, np.rint(depth.astype(np.float64) * per_unit), 0)
        if codes.max() <= _LARGEST and (_from_linear(codes, per_unit) == np.where(valid, depth, 0)).all():
            return codes, {"kind": "linear", "per_unit": per_unit}
    return None


def _log_codes(depth: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, dict[str, Any]] | None:
    """None where one frame's depths lie too far apart for DEPTH_ERROR."""
    logs = np.log(np.where(valid, depth, 1).astype(np.float64))
    start, stop = float(logs[valid].min()), float(logs[valid].max())
    step = (stop - start) / (_LARGEST - 1)
    if math.expm1(step / 2) + _ROUNDING > DEPTH_ERROR:
        return None
    codes = 1 + (np.rint((logs - start) / step) if step else np.zeros_like(logs))
    return codes, {"kind": "log", "start": start, "step": step}


def scaled(frame: PosedFrame, short_side: int) -> PosedFrame:
    """The frame with its short side scaled down to `short_side`, its intrinsics with it; smaller ones and 0 as it is.

    Depth is never averaged: a pixel takes the sample at its centre, or where that is not valid the nearest surface
    among the samples that it covers, so that sparse depth (LiDAR) keeps what it has.
    """
    height, width = frame.image.shape[:2]
    if not short_side or min(height, width) <= short_side:
        return frame
    image = scaled_image(frame.image, short_side)
    new_height, new_width = image.shape[:2]
    intrinsics = np.diag([new_width / width, new_height / height, 1.0]) @ frame.intrinsics.astype(np.float64)
    rows = (2 * np.arange(new_height) + 1) * height // (2 * new_height)
    columns = (2 * np.arange(new_width) + 1) * width // (2 * new_width)
    at_centres = np.ix_(rows, columns)
    sky = None if frame.sky is None else frame.sky[at_centres]
    depth = valid = None
    if frame.depth is not None:
        depth = _scaled_depth(frame.depth, at_centres, (new_height, new_width))
        if sky is not None:
            depth[sky] = 0
        valid = depth > 0
    return dataclasses.replace(
        frame, image=image, intrinsics=intrinsics.astype(np.float32), depth=depth, valid=valid, sky=sky
    )


def scaled_image(image: np.ndarray, short_side: int) -> np.ndarray:
    """uint8 [H, W, 3] resized to a short side in pixels."""
    height, width = image.shape[:2]
    factor = short_side / min(height, width)
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def image_file(image: np.ndarray, options: ImageOptions) -> bytes:
    """A picture uint8 [H, W, 3] as a JPEG or PNG file. Raises OSError where the format cannot hold it."""
    buffer = io.BytesIO()
    if options.format == "png":
        Image.fromarray(image).save(buffer, "png", compress_level=3)
    else:
        Image.fromarray(image).save(buffer, "jpeg", quality=options.quality, subsampling="4:2:0")
    return buffer.getvalue()


def _scaled_depth(depth: np.ndarray, at_centres: tuple, size: tuple[int, int]) -> np.ndarray:
    result = depth[at_centres]
    row, column = np.nonzero(depth)
    row_to, column_to = row * size[0] // depth.shape[0], column * size[1] // depth.shape[1]
    missing = result[row_to, column_to] == 0
    nearest = np.full(size, np.inf, np.float32)
    np.minimum.at(nearest, (row_to[missing], column_to[missing]), depth[row[missing], column[missing]])
    return np.where(np.isfinite(nearest), nearest, result)


def _join(parts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _read_image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["jpeg", "png"]) as image:
        _check_size(image)
        return np.asarray(image.convert("RGB"))


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are allowed")
