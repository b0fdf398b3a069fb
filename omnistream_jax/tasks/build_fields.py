"""What building any task needs: checks of config fields, and the sources that `paths` names."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from omnistream_jax.config import ConfigError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.registry import ENTRIES, find_entry, open_dataset
from omnistream_jax.data.sources import embedded_source, image_source, video_source
from omnistream_jax.sharding import mesh_sizes

EMBEDDED = "embedded"
KINDS = {"image": "images", "clip": "videos", "posed": "posed", "captioned": "captions"}
"""Of a task -> of its sources."""
_NAMED = "data sets as NAME:DIR, the names being those of data/registry.py"
_EXPECTED = {
    "image": "folders or .txt lists of photographs",
    "clip": "folders or .txt lists of videos",
    "posed": _NAMED,
    "captioned": _NAMED,
}


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError, naming a field and what was expected of it, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {value!r}")


@contextlib.contextmanager
def data_of_task(name: str) -> Iterator[None]:
    """A DataError of the block, which builds a task's data, as a ConfigError with the field's whole name."""
    try:
        yield
    except DataError as error:
        raise ConfigError(f"tasks.{name}.{error}") from error


def check_loader(loader: ConfigDict) -> None:
    """Raises ConfigError for values of `config.loader`, numbers from 0 on, that cannot be or do not go together."""
    share = loader.max_failed_fraction
    require(0 <= share <= 1, "loader.max_failed_fraction", share, "a share, 0 to 1")
    ahead = loader.prefetch >= 1 or loader.workers == 0
    require(ahead, "loader.prefetch", loader.prefetch, "1 or more with loader.workers")


def require_numbers(
    field: str, value: Sequence[Any], expected: str, *, count: int = 2, whole: bool = False
) -> tuple[Any, ...]:
    """The value of a field as a tuple of `count` finite numbers, whole ones if asked for; ConfigError if it is none."""
    kinds = int if whole else (int, float)
    fits = isinstance(value, (tuple, list)) and len(value) == count
    fits = fits and all(isinstance(each, kinds) and math.isfinite(each) for each in value)
    require(fits, field, value, expected)
    return tuple(value)


def require_stride(name: str, fields: ConfigDict) -> tuple[int, int]:
    """The smallest and largest stride of a task's clips. Raises ConfigError where they are none."""
    field, expected = f"tasks.{name}.stride", "(smallest, largest), whole numbers from 1 on"
    smallest, largest = require_numbers(field, fields.stride, expected, whole=True)
    require(1 <= smallest <= largest, field, fields.stride, expected)
    return smallest, largest


def require_whole_batches(name: str, fields: ConfigDict, mesh: ConfigDict) -> None:
    """Raises ConfigError unless every device gets equally many samples of each of a task's micro-batches.

    Args:
        name, fields: of the task.
        mesh: `config.mesh`; its axes "data" and "fsdp" split batches.
    """
    sizes = mesh_sizes(**mesh)
    shards = sizes["data"] * sizes["fsdp"]
    whole = fields.batch_size >= 1 and fields.batch_size % shards == 0
    expected = f"a multiple of the {shards} parts into which mesh.data x mesh.fsdp split it (fewer devices: mesh.data)"
    require(whole, f"tasks.{name}.batch_size", fields.batch_size, expected)
    own = fields.batch_size // shards
    divides = fields.micro_batches >= 1 and own % fields.micro_batches == 0
    expected = f"a divisor of the {own} samples of a device"
    require(divides, f"tasks.{name}.micro_batches", fields.micro_batches, expected)


def open_sources(name: str, fields: ConfigDict) -> tuple[tuple[Any, ...], tuple[float, ...] | None]:
    """The sources of a task's paths and their shares. Raises ConfigError for what cannot be opened."""
    sources = tuple(_source(name, fields, path.strip()) for path in fields.paths.split(",") if path.strip())
    if not sources:
        raise ConfigError(f"tasks.{name}.paths: give {_EXPECTED[fields.kind]}, separated by commas")
    weights = tuple(fields.path_weights)
    if weights:
        field, expected = f"tasks.{name}.path_weights", f"a positive number for each of the {len(sources)} paths"
        require(min(require_numbers(field, weights, expected, count=len(sources))) > 0, field, weights, expected)
    return sources, weights or None


def _source(name: str, fields: ConfigDict, path: str) -> Any:
    """What one entry of a task's paths names: EMBEDDED, DATASET:DIR of data/registry.py, or a folder, list or file."""
    kind = KINDS[fields.kind]
    dataset, colon, root = path.partition(":")
    sampling = {}
    if kind == "videos":
        for field in ("short_side", "frame_rate"):
            require(fields[field] >= 0, f"tasks.{name}.{field}", fields[field], "0 or more")
        sampling = {"short_side": fields.short_side or None, "frame_rate": fields.frame_rate or None}
    try:
        # The world is rendered as large as it is needed.
        if path == EMBEDDED and kind == "posed":
            return open_dataset("world", "train", size=max(fields.height, fields.width))
        if path == EMBEDDED and kind == "captions":
            return open_dataset("world_captions", "train", size=fields.size)
        if path == EMBEDDED:
            return dataclasses.replace(embedded_source(kind, "train"), **sampling)
        if colon and dataset in ENTRIES:
            if ENTRIES[dataset].kind != kind:
                raise ConfigError(f"tasks.{name}.paths: {dataset} holds {ENTRIES[dataset].kind}, expected {kind}")
            source = open_dataset(dataset, root)
            return dataclasses.replace(source, **sampling) if sampling else source
        if colon and dataset.isidentifier() and not os.path.exists(path):
            find_entry(dataset)  # tells what the name may have been meant to be
        if kind not in ("images", "videos"):
            raise ConfigError(f"tasks.{name}.paths: {path!r}, expected {_EXPECTED[fields.kind]}")
        return image_source(path) if kind == "images" else video_source(path, **sampling)
    except DataError as error:
        raise ConfigError(f"tasks.{name}.paths: {error}") from error
