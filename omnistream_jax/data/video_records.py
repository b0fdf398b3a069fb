"""The record of prepared videos: one MP4 file and what it is, in the bytes of a safetensors file.

header   uint8 [...]   JSON: {"format", "source", "name", "label", "label_name", "size", "frame_rate", "frames"}
video    uint8 [...]   the MP4 file
"""

from __future__ import annotations

import dataclasses

from omnistream_jax.data.record_bytes import as_tensor, pack_fields, unpack


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
    return pack_fields(record, video=as_tensor(record.video))


def decode_record(data: bytes, where: str) -> VideoRecord:
    """Reads a record; nothing is decoded yet. Raises DataError, naming `where`, for bytes that are none."""
    return unpack(
        data,
        where,
        "a prepared video",
        lambda header, tensors: VideoRecord(
            **header | {"size": tuple(header["size"])}, video=tensors["video"].tobytes()
        ),
    )
