"""TFRecord files of protocol buffers, read without TensorFlow and without generated classes.

TFRecord: records of uint64 length, uint32 checksum of the length, data, uint32 checksum of the data; little-endian.
Checksums are CRC-32C, masked: turned right by 15 bits, plus 0xa282ead8.
Protocol buffers: a message is a row of fields, each a tag (number << 3 | wire type) and a value.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from omnistream_jax.data.readers.files import need, reading

_HEADER = 12
_FOOTER = 4
Fields = Mapping[int, Sequence[int | memoryview]]
"""Field number -> its values, in order: an int for a varint, else the bytes, not copied."""


@functools.lru_cache(maxsize=256)
def record_spans(path: Path) -> tuple[tuple[int, int], ...]:
    """Where the data of each record begins and how many bytes it has; reads the headers only.

    Raises:
      DataError: a header is damaged or the file is cut short.
    """
    with reading(path, "a TFRecord file"), path.open("rb") as file:
        size, start, spans = path.stat().st_size, 0, []
        while start < size:
            file.seek(start)
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                raise ValueError(f"it is cut short after {len(spans)} records")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise ValueError(f"the checksum of the length of record {len(spans)} is wrong")
            spans.append((start + _HEADER, length))
            start += _HEADER + length + _FOOTER
        if start > size:
            raise ValueError(f"it is cut short within record {len(spans) - 1}")
        return tuple(spans)


def read_record(path: Path, start: int, length: int) -> bytes:
    """The data of one record, its checksum tested. Raises DataError where it is damaged."""
    with reading(path, "a TFRecord file"), path.open("rb") as file:
        file.seek(start)
        data = file.read(length + _FOOTER)
        if len(data) != length + _FOOTER:
            raise ValueError(f"the record at byte {start} is cut short")
        if masked_crc32c(data[:length]) != struct.unpack("<I", data[length:])[0]:
            raise ValueError(f"the checksum of the record at byte {start} is wrong")
        return data[:length]


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of some bytes."""
    value = need("google_crc32c").value(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def message_fields(data: bytes | memoryview) -> Fields:
    """The fields of a message. Raises ValueError where it is cut short or not of the wire format."""
    view, position, fields = memoryview(data), 0, {}
    while position < len(view):
        tag, position = _varint(view, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(view, position)
        elif wire_type in (1, 2, 5):
            length, position = _varint(view, position) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], position)
            value, position = view[position : position + length], position + length
        else:
            raise ValueError(f"field {number} has the wire type {wire_type}")
        if number == 0 or position > len(view):
            raise ValueError("a message is cut short")
        fields.setdefault(number, []).append(value)
    return fields


def messages(fields: Fields, number: int) -> list[Fields]:
    """The messages that a field holds, [] where it is missing."""
    return [message_fields(value) for value in fields.get(number, [])]


def one(fields: Fields, number: int) -> int | memoryview:
    """The value of a field that is there once; the last one counts. Raises ValueError where it is missing."""
    if number not in fields:
        raise ValueError(f"a message has no field {number}")
    return fields[number][-1]


def numbers(fields: Fields, number: int, dtype: str) -> np.ndarray:
    """[N] of a repeated double ("<f8"), float ("<f4") or int32 ("varint"), packed or not; [0] where it is missing."""
    values = fields.get(number, [])
    if dtype != "varint":
        return np.frombuffer(b"".join(values), dtype)
    whole = [np.array([value], np.uint64) if isinstance(value, int) else _packed_varints(value) for value in values]
    return np.concatenate([np.zeros(0, np.uint64), *whole]).view(np.int64)  # negative numbers have 64 bits


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, each but the last with the top bit set, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise ValueError("a message is cut short")
        value |= (view[position] & 0x7F) << shift
        position += 1
        if view[position - 1] < 0x80:
            return value, position
    raise ValueError("a number has more than 64 bits")


def _packed_varints(data: memoryview) -> np.ndarray:
    """uint64 [N]; a loop over millions of them would take seconds."""
    groups = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(groups < 0x80)
    if len(groups) and (len(ends) == 0 or ends[-1] != len(groups) - 1):
        raise ValueError("a list of numbers is cut short")
    if len(ends) == 0:
        return np.zeros(0, np.uint64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a number has more than 64 bits")
    values = (groups[starts] & 0x7F).astype(np.uint64)
    for group in range(1, lengths.max()):
        longer = np.flatnonzero(lengths > group)
        values[longer] |= (groups[starts[longer] + group] & 0x7F).astype(np.uint64) << np.uint64(7 * group)
    return values
