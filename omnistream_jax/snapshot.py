"""One stream's state apart from its batch: taken out, put into another place, saved to a file and read back.

A snapshot holds the frames that exist and not the capacity around them, so it fits any batch of streams of the same
kind. The stream goes on bit for bit where the batch and the capacity are those it came from, and within rounding in
others, because their programs sum in another order.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from omnistream_jax.model import Model
from omnistream_jax.ops.cache import CACHE_DTYPES, BlockCache, empty_cache
from omnistream_jax.stream import Stream, StreamOptions, StreamState, with_room
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.tensor_file import write_tensors
from omnistream_jax.utils.trees import describe, fingerprint, named_leaves

_VERSION = 1
_HEADER = "omnistream_jax.stream"  # the key of our entry in the metadata of a safetensors file
_OPTIONS = tuple(field.name for field in dataclasses.fields(StreamOptions) if field.name != "batch")
_NOT_MATHEMATICS = ("layer_scale", "time_unit")  # of a config: an initial value, and what a stream's options hold


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of one stream, on the host.

    Attributes:
        options: of the stream, with batch 1.
        weights: `weights_fingerprint` of the model that filled the cache.
        frame_index: the index that the stream's next frame will have.
        aspect_ratio: height / width for the camera token, or None.
        cache: one BlockCache per block, with NumPy leaves [frames, ...] and no axis of streams: the frames so far, or
            the slots of a window's ring that are written.
    """

    options: StreamOptions
    weights: str
    frame_index: int
    aspect_ratio: float | None
    cache: tuple[BlockCache, ...]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file with a JSON header in its metadata, aside and then renamed."""
        path = Path(path)
        options = dataclasses.asdict(self.options)
        header = {
            "version": _VERSION,
            "weights": self.weights,
            "frame_index": self.frame_index,
            "aspect_ratio": self.aspect_ratio,
            "options": {name: options[name] for name in _OPTIONS},
            "sizes": _sizes(self.cache),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, durable=True) as aside:
            write_tensors(aside, named_leaves(self.cache), {_HEADER: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Snapshot":
        """Read what `save` wrote.

        Raises:
            ValueError: naming the file and what is wrong with it: missing, cut off, of another kind or version.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if _HEADER not in metadata:
                    raise ValueError("its metadata have no entry of omnistream_jax")
                header = json.loads(metadata[_HEADER])
                expected = _expected_leaves(header)
                _check_names(set(file.keys()), set(expected))
                tensors = {name: file.get_tensor(name) for name in expected}
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # AttributeError is how safetensors says that NumPy has no such type.
            reason = f"its header lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: not the whole of a stream saved by omnistream_jax ({reason})") from error
        for name, leaf in tensors.items():
            if describe(leaf) != describe(expected[name]):
                raise ValueError(f"{path}: {name}: expected {describe(expected[name])}, got {describe(leaf)}")
        return cls(
            options=_options(header),
            weights=header["weights"],
            frame_index=header["frame_index"],
            aspect_ratio=header["aspect_ratio"],
            cache=_cache_of(tensors, header["sizes"]["depth"]),
        )


def weights_fingerprint(model: Model) -> str:
    """What a cache depends on besides its stream's options: sha256 over every parameter's bits and the configuration.

    Reads all parameters once; keep the result.
    """
    config = dataclasses.asdict(model.config)
    mathematics = {
        name: value if isinstance(value, str) else float(value)
        for name, value in config.items()
        if name not in _NOT_MATHEMATICS
    }
    sums, leaves = fingerprint(model.params), named_leaves(model.params)
    record = {"config": mathematics, "params": {name: [describe(leaves[name]), sums[name]] for name in leaves}}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def take(stream: Stream, index: int, weights: str) -> Snapshot:
    """The state of stream `index`; the stream goes on as if nothing had been taken.

    Args:
        stream: is not consumed.
        index: 0 to batch - 1.
        weights: `weights_fingerprint` of the model that steps the stream.

    Raises:
        ValueError: an index that names no stream, or a stream that a step has consumed.
    """
    stream.check_alive()
    index = _check_index(index, stream.options.batch)
    frame_index = int(stream.frame_index[index])
    frames = _filled_slots(frame_index, stream.options.window)
    lane = jax.device_get(_read_lane(stream.state, np.int32(index)))
    return Snapshot(
        options=dataclasses.replace(stream.options, batch=1),
        weights=weights,
        frame_index=frame_index,
        aspect_ratio=None if lane.aspect_ratio is None else float(lane.aspect_ratio),
        cache=jax.tree.map(lambda leaf: leaf[:frames].copy(), lane.cache),
    )


def put(stream: Stream, index: int, snapshot: Snapshot, weights: str) -> Stream:
    """The streams with stream `index` replaced by the snapshot's; the others keep every bit.

    Args:
        stream: is consumed, unless an error is raised. An unbounded one grows if the snapshot needs it.
        index: 0 to batch - 1.
        snapshot: of a stream with the same options; `batch` and `layers` may differ.
        weights: `weights_fingerprint` of the model that steps the stream.

    Raises:
        ValueError: naming the first field in which the snapshot differs, an index that names no stream, or a stream
            that a step has consumed.
    """
    stream.check_alive()
    index = _check_index(index, stream.options.batch)
    _check_fits(snapshot, stream, weights)
    stream = with_room(stream, snapshot.frame_index)
    capacity = stream.state.capacity

    def pad(leaf: np.ndarray) -> np.ndarray:
        room = np.zeros((capacity, *leaf.shape[1:]), leaf.dtype)
        room[: len(leaf)] = leaf
        return room

    ratio = None if snapshot.aspect_ratio is None else np.float32(snapshot.aspect_ratio)
    lane = StreamState(jax.tree.map(pad, snapshot.cache), np.int32(snapshot.frame_index), ratio)
    frame_index = stream.frame_index.copy()
    frame_index[index] = snapshot.frame_index
    return dataclasses.replace(stream, state=_write_lane(stream.state, lane, np.int32(index)), frame_index=frame_index)


# The index is traced: one program serves all streams of a batch.


@jax.jit
def _read_lane(state: StreamState, index: jax.Array) -> StreamState:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), state)


@jax.jit(donate_argnums=0)
def _write_lane(state: StreamState, lane: StreamState, index: jax.Array) -> StreamState:
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), state, lane)


def _check_index(index: int, batch: int) -> int:
    if not isinstance(index, (int, np.integer)) or isinstance(index, bool) or not 0 <= index < batch:
        raise ValueError(f"index: expected a stream from 0 to {batch - 1}, got {index!r}")
    return int(index)


def _filled_slots(frame_index: int, window: int | None) -> int:
    return frame_index if window is None else min(frame_index, window)


def _sizes(cache: tuple[BlockCache, ...]) -> dict[str, int]:
    tokens, heads, head_width = cache[0].key.shape[-3:]
    return {"depth": len(cache), "tokens": tokens, "heads": heads, "head_width": head_width}


def _check_fits(snapshot: Snapshot, stream: Stream, weights: str) -> None:
    """Raise ValueError at the first field in which a snapshot differs from the streams it shall join."""
    ours, theirs = stream.options, snapshot.options
    ignored = {"layers"} | ({"sinks"} if ours.window is None else set())  # without a window there are no sinks
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in _OPTIONS if name not in ignored}
    found = _sizes(snapshot.cache)
    pairs |= {name: (size, found[name]) for name, size in _sizes(stream.state.cache).items()}
    pairs["aspect_ratio"] = tuple(
        "one" if ratio is not None else None for ratio in (stream.state.aspect_ratio, snapshot.aspect_ratio)
    )
    for name, (expected, got) in pairs.items():
        if expected != got:
            raise ValueError(f"snapshot: {name}: expected {expected}, as of the streams it shall join, got {got}")
    if snapshot.weights != weights:
        raise ValueError(
            f"snapshot: weights: it is of other weights (fingerprint {snapshot.weights[:12]}) than this model "
            f"({weights[:12]}), and its keys and values mean nothing here"
        )


# What a file must hold.


def _options(header: dict[str, Any]) -> StreamOptions:
    options = header["options"]
    return StreamOptions(**{**options, "layers": tuple(options["layers"])}, batch=1)


def _expected_leaves(header: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The tensors that belong to a header; ValueError, TypeError or KeyError if it is no header of ours."""
    if header["version"] != _VERSION:
        raise ValueError(f"version: expected {_VERSION}, got {header['version']!r}")
    options, sizes = _options(header), header["sizes"]
    numbers = {"frame_index": header["frame_index"], "window": 1 if options.window is None else options.window, **sizes}
    for name, value in numbers.items():
        if type(value) is not int or value < (name != "frame_index"):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if not isinstance(header["weights"], str) or not isinstance(header["aspect_ratio"], (float, type(None))):
        raise ValueError("weights and aspect_ratio: expected text, and a number or null")
    if options.cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype: expected one of {', '.join(CACHE_DTYPES)}, got {options.cache_dtype!r}")

    frames = _filled_slots(header["frame_index"], options.window)
    dtype = jnp.dtype(options.cache_dtype)

    def empty() -> tuple[BlockCache, ...]:
        cache = empty_cache(1, frames, sizes["tokens"], sizes["heads"], sizes["head_width"], dtype)
        return jax.tree.map(lambda leaf: leaf[0], (cache,) * sizes["depth"])

    return named_leaves(jax.eval_shape(empty))


def _check_names(found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise ValueError(f"missing tensors {sorted(expected - found)}, unexpected {sorted(found - expected)}")


def _cache_of(tensors: dict[str, np.ndarray], depth: int) -> tuple[BlockCache, ...]:
    fields = [field.name for field in dataclasses.fields(BlockCache)]
    return tuple(BlockCache(**{name: tensors.get(f"{i}/{name}") for name in fields}) for i in range(depth))
