"""What the records of all prepared shards share: a header of JSON and tensors, in the bytes of a safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from safetensors import numpy as safetensors

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.shard_index import FORMAT

Record = TypeVar("Record")


def pack(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a record, the same for the same values; `header` is what JSON can tell."""
    text = json.dumps({"format": FORMAT} | dict(header), sort_keys=True)
    # Not in safetensors' own metadata, whose order of keys is left to chance.
    return safetensors.save({"header": as_tensor(text.encode()), **tensors})


def pack_fields(record: Any, **tensors: np.ndarray) -> bytes:
    """`pack` of a dataclass: the fields of which no tensor is given are its header."""
    names = [field.name for field in dataclasses.fields(record) if field.name not in tensors]
    return pack({name: getattr(record, name) for name in names}, tensors)


def as_tensor(data: bytes) -> np.ndarray:
    """uint8 [n], a file within a record."""
    return np.frombuffer(data, np.uint8)


def unpack(
    data: bytes, where: str, what: str, make: Callable[[dict[str, Any], dict[str, np.ndarray]], Record]
) -> Record:
    """A record that `pack` wrote.

    Args:
      data: its bytes.
      where: names it in messages.
      what: what it is a record of, for messages.
      make: makes it of its header and its tensors.

    Raises:
      DataError: these are no bytes of such a record.
    """
    try:
        tensors = safetensors.load(data)
        header = json.loads(tensors.pop("header").tobytes())
        if (found := header.pop("format")) != FORMAT:
            raise ValueError(f"its format is {found}, expected {FORMAT}")
        return make(header, tensors)
    except Exception as error:  # safetensors' are of several types
        raise DataError(f"{where}: expected a record of {what}, but reading it failed ({error})") from error
