"""The record of prepared videos: one MP4 file and what it is, in the bytes of a safetensors file.

header   uint8 [...]   JSON: {"format", "source", "name", "label", "label_name", "size", "frame_rate", "frames"}
video    uint8 [...]   the MP4 file
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from safetensors import numpy as safetensors

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.shard_index import FORMAT


@dataclasses.dataclass(frozen=True)
class VideoRecord:
    """A prepared video.

    Attributes:
      source: the data set and its split.
      name: the video's in the data set: its path below the folder of the published layout.
      label: its class, None where that is not published.
      label_name: the name of its class, None where that is not published.
      size: (height, width) that it was published in, in pixels, as players show it.
      frame_rate: that it was published in, frames per second on average; 0: not told.
      frames: how many there are.
      video: an MP4 file.
    """

    source: str
    name: str
    label: int | None
    label_name: str | None
    size: tuple[int, int]
    frame_rate: float
    frames: int
    video: bytes


def encode_record(record: VideoRecord) -> bytes:
    """The bytes of a record, the same for the same values."""
    header = {"format": FORMAT}
    header |= {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.name != "video"}
    text = json.dumps(header, sort_keys=True).encode()
    tensors = {"header": np.frombuffer(text, np.uint8), "video": np.frombuffer(record.video, np.uint8)}
    return safetensors.save(tensors)


def decode_record(data: bytes, where: str) -> VideoRecord:
    """Reads a record; nothing is decoded yet. Raises DataError, naming `where`, for bytes that are none."""
    try:
        tensors = safetensors.load(data)
        header = json.loads(tensors["header"].tobytes())
        if (found := header.pop("format")) != FORMAT:
            raise ValueError(f"its format is {found}, expected {FORMAT}")
        return VideoRecord(**header | {"size": tuple(header["size"]), "video": tensors["video"].tobytes()})
    except Exception as error:  # safetensors' are of several types
        raise DataError(f"{where}: expected a record of a prepared video, but reading it failed ({error})") from error
