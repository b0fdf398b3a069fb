"""Streaming: the state of a batch of streams, and the one compiled program that advances it.

The program is a `scan` over the frames of a chunk; each iteration runs the backbone on one new frame of every stream
against its key-value cache. It is compiled once per chunk length and cache capacity: a windowed stream keeps one
capacity for ever, an unbounded one moves through the buckets of `bucket_capacity`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omnistream_jax.models.backbone import Backbone, BackboneOutput
from omnistream_jax.ops.cache import BlockCache, empty_cache, grow_cache

# Capacities in frames: 16, 64, 128, 256, ... The first step is a factor 4 because short buffers cost little.
_FIRST_BUCKET, _SECOND_BUCKET = 16, 64


def bucket_capacity(frames: int) -> int:
    """The smallest capacity bucket that holds `frames` frames."""
    if frames <= _FIRST_BUCKET:
        return _FIRST_BUCKET
    return max(_SECOND_BUCKET, 1 << (frames - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What is fixed when a stream is opened, and therefore compiled in; the fields are those of `open_stream`."""

    batch: int
    height: int
    width: int
    window: int | None
    sinks: int
    layers: tuple[int, ...]
    camera_token: bool
    time_unit: float
    cache_dtype: str


@struct.dataclass
class StreamState:
    """The arrays of a batch of streams.

    Attributes:
        cache: one BlockCache per block.
        frame_index: int32 [B], the index that each stream's next frame will have.
        aspect_ratio: float32 [B], height / width for the camera token, or None.
    """

    cache: tuple[BlockCache, ...]
    frame_index: jax.Array
    aspect_ratio: jax.Array | None

    @property
    def capacity(self) -> int:
        """Frames that the cache holds."""
        return self.cache[0].capacity


@dataclasses.dataclass(frozen=True)
class Stream:
    """A batch of streams: fixed options, the state on the device, and the host's copy of the frame indices.

    A value, not an object with memory: `Model.step` returns the next one and consumes the cache of the last.
    """

    options: StreamOptions
    state: StreamState
    frame_index: np.ndarray  # int64 [B]; lets the capacity be chosen without waiting for the device

    def reset(self, index: int | np.ndarray) -> "Stream":
        """Start some streams anew; the others keep every bit.

        Args:
            index: which streams: an int, an integer array, or a bool mask [B].

        Raises:
            ValueError: an index that names no stream, or a stream that a step has consumed.
        """
        self.check_alive()
        mask = _stream_mask(index, self.options.batch)
        return dataclasses.replace(
            self, state=_reset_program(self.state, mask), frame_index=np.where(mask, 0, self.frame_index)
        )

    def check_alive(self) -> None:
        """Raise ValueError if a step has consumed this stream."""
        if self.state.frame_index.is_deleted():
            raise ValueError("stream: a step has consumed it already; go on with the stream that the step returned")


def open_state(backbone: Backbone, options: StreamOptions, aspect_ratio: np.ndarray | None) -> StreamState:
    """The state before the first frame."""
    config = backbone.config
    patches = (options.height // config.patch_size) * (options.width // config.patch_size)
    tokens = patches + 1 + int(options.camera_token) + config.registers
    capacity = options.window if options.window is not None else bucket_capacity(1)
    cache = tuple(
        empty_cache(options.batch, capacity, tokens, config.heads, config.head_width, jnp.dtype(options.cache_dtype))
        for _ in range(config.depth)
    )
    return StreamState(
        cache=cache,
        frame_index=jnp.zeros((options.batch,), jnp.int32),
        aspect_ratio=None if aspect_ratio is None else jnp.array(aspect_ratio, jnp.float32),  # a copy: it is donated
    )


def advance(
    backbone: Backbone, params: dict, stream: Stream, frames: jax.Array | np.ndarray, active: np.ndarray | None = None
) -> tuple[BackboneOutput, Stream]:
    """Feed frames [B, n, H, W, 3] to a stream: features [B, n, ...] and the stream after them.

    Args:
        backbone, params: with `streaming=True`, and the parameters of `streaming_params`.
        stream: is consumed.
        frames: of every stream; those of a stream that is not active are ignored.
        active: bool [B], the streams that take these frames; None: all.
    """
    count = frames.shape[1]
    # Paused streams count too: the slot that they write, and overwrite with their next frame, must exist.
    stream = with_room(stream, int(stream.frame_index.max()) + count)
    out, state = step_program(backbone, stream.options, params, stream.state, frames, active)
    frame_index = stream.frame_index + (count if active is None else np.where(active, count, 0))
    return out, dataclasses.replace(stream, state=state, frame_index=frame_index)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def step_program(
    backbone: Backbone,
    options: StreamOptions,
    params: dict,
    state: StreamState,
    frames: jax.Array,
    active: jax.Array | None,
) -> tuple[BackboneOutput, StreamState]:
    """The compiled step: scan over the frames [B, n, H, W, 3] of a chunk; the state is donated."""
    advanced = 1 if active is None else active.astype(jnp.int32)

    def one_frame(state: StreamState, frame: jax.Array) -> tuple[StreamState, BackboneOutput]:
        out, cache = backbone.apply(
            {"params": params},
            frame[:, None],
            state.cache,
            state.frame_index,
            active=active,
            layers=options.layers,
            camera_token=options.camera_token,
            aspect_ratio=state.aspect_ratio,
            time_unit=options.time_unit,
            window=options.window,
            sinks=options.sinks,
            method="step",
        )
        out = jax.tree.map(lambda leaf: leaf[:, 0], out)
        return state.replace(cache=cache, frame_index=state.frame_index + advanced), out

    state, out = jax.lax.scan(one_frame, state, jnp.moveaxis(frames, 1, 0))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), out), state


def with_room(stream: Stream, frames: int) -> Stream:
    """The streams with room for `frames` frames: unbounded ones move to that bucket, windowed ones stay as they are."""
    if stream.options.window is not None or frames <= stream.state.capacity:
        return stream
    return dataclasses.replace(stream, state=_grown(stream.state, bucket_capacity(frames)))


def _grown(state: StreamState, capacity: int) -> StreamState:
    """The same state with room for `capacity` frames."""
    if jax.default_backend() == "cpu":
        # Host memory already: padding there compiles nothing, so a stream compiles one program a bucket.
        def pad(leaf: jax.Array) -> jax.Array:
            room = np.zeros((leaf.shape[0], capacity, *leaf.shape[2:]), leaf.dtype)
            room[:, : leaf.shape[1]] = leaf
            return jax.device_put(room)

        return state.replace(cache=jax.tree.map(pad, state.cache))
    return _grow_program(state, capacity)


@functools.partial(jax.jit, static_argnums=1)
def _grow_program(state: StreamState, capacity: int) -> StreamState:
    return state.replace(cache=tuple(grow_cache(block, capacity) for block in state.cache))


@jax.jit
def _reset_program(state: StreamState, mask: jax.Array) -> StreamState:
    # The slots are zeroed and not only hidden: a NaN left in one would leak through its zero weight.
    def clear(leaf: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros((), leaf.dtype), leaf)

    return state.replace(cache=jax.tree.map(clear, state.cache), frame_index=clear(state.frame_index))


def _stream_mask(index: int | np.ndarray, batch: int) -> np.ndarray:
    index = np.asarray(index)
    if index.dtype == bool:
        if index.shape != (batch,):
            raise ValueError(f"reset: expected a bool mask of shape ({batch},), got {index.shape}")
        return index
    if index.size == 0:
        return np.zeros(batch, bool)
    if not np.issubdtype(index.dtype, np.integer) or np.any((index < 0) | (index >= batch)):
        raise ValueError(f"reset: expected stream indices 0 to {batch - 1}, got {index.tolist()}")
    mask = np.zeros(batch, bool)
    mask[index] = True
    return mask
