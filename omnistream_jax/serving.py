"""Many streams served by one program: named streams come and go in the slots of one batch."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax import snapshot as snapshots
from omnistream_jax.model import Frames, Model
from omnistream_jax.models.backbone import BackboneOutput
from omnistream_jax.snapshot import Snapshot
from omnistream_jax.stream import Stream, StreamState


class StreamPool:
    """Streams that start, pause, end and restart independently, in a batch of fixed size.

    A step takes the time of a batch of `slots`, however many take part; its program is compiled once per number of
    frames (and, without a window, per capacity bucket), whichever streams come and go. Without a window the capacity
    is that of the longest stream so far, and stays when it ends. Not for several threads at once.

    Args:
        model: steps the streams.
        slots: streams at the same time.
        height, width: of the frames in pixels.
        aspect_ratio: height / width for the camera token of streams that start without their own; None: streams have
            none.
        options: window, sinks, layers, camera_token, time_unit and cache_dtype as in `Model.open_stream`.

    Attributes:
        stream: the batch of streams behind the pool, in which `slot(name)` is a stream's place.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        model: Model,
        slots: int = 16,
        height: int = 224,
        width: int = 224,
        *,
        aspect_ratio: float | None = None,
        **options: Any,
    ):
        if not isinstance(slots, (int, np.integer)) or isinstance(slots, bool) or slots < 1:
            raise ValueError(f"slots: expected a whole number >= 1, got {slots!r}")
        ratios = None if aspect_ratio is None else [aspect_ratio] * slots
        self._model = model
        self._default_ratio = aspect_ratio
        self.stream: Stream = model.open_stream(slots, height, width, aspect_ratio=ratios, **options)
        self._slots: dict[str, int] = {}
        self._indices = [jax.device_put(np.int32(slot)) for slot in range(slots)]
        self._numbers = itertools.count()

    @property
    def names(self) -> tuple[str, ...]:
        """The streams in the order in which they started."""
        return tuple(self._slots)

    @property
    def free(self) -> int:
        """How many more streams can start."""
        return self.stream.options.batch - len(self._slots)

    def slot(self, name: str) -> int:
        """The place of a stream in the batch; ValueError if there is none of that name."""
        if name not in self._slots:
            raise ValueError(f"{name!r}: no such stream; the pool has {', '.join(map(repr, self._slots)) or 'none'}")
        return self._slots[name]

    def start(
        self, name: str | None = None, *, snapshot: Snapshot | None = None, aspect_ratio: float | None = None
    ) -> str:
        """A new stream, or one that goes on from a snapshot; returns its name.

        Args:
            name: None makes one.
            snapshot: of a stream of the same model and options.
            aspect_ratio: height / width for the camera token; None takes the pool's. A snapshot has its own.

        Raises:
            ValueError: the pool is full, the name is taken, or naming the argument that does not fit.
        """
        name, slot = self._new_name(name), self._free_slot()
        if snapshot is not None:
            if aspect_ratio is not None:
                raise ValueError("aspect_ratio: a snapshot has its own")
            self.stream = snapshots.put(self.stream, slot, snapshot, self._weights)
        else:
            ratio = self._check_ratio(aspect_ratio)
            self._replace(slot, 0, _clear_slot(self.stream.state, self._indices[slot], ratio))
        self._slots[name] = slot
        return name

    def step(self, frames: Mapping[str, Frames], *, check: bool = False) -> dict[str, BackboneOutput]:
        """Feed the next frames to some streams; the others pause.

        Args:
            frames: [n, H, W, 3] of each stream that takes part, as in `Model.encode`, with the same n and type for
                all. They pass through the host's memory.
            check: refuse frames with NaN or infinities. Without it they spoil their own stream until that is reset.

        Returns:
            Features [n, ...] of each stream: those of `Model.step` without the axis of streams.

        Raises:
            ValueError: naming the stream whose frames do not fit; then no stream has moved.
        """
        if not frames:
            return {}
        batch, active = self._batch(frames, check)
        out, self.stream = self._model.step(self.stream, batch, active=active)
        return {name: _slot_output(out, self._indices[self._slots[name]]) for name in frames}

    def end(self, name: str) -> None:
        """Free the slot of a stream."""
        slot = self.slot(name)
        # The clock goes back at once, so that a long stream that is gone makes the capacity grow no further.
        frame_index = self.stream.frame_index.copy()
        frame_index[slot] = 0
        clock = jax.device_put(frame_index.astype(np.int32))
        self._replace(slot, 0, self.stream.state.replace(frame_index=clock))
        del self._slots[name]

    def reset(self, name: str) -> None:
        """Start a stream anew, under its name and with its aspect ratio."""
        slot = self.slot(name)
        self._replace(slot, 0, _clear_slot(self.stream.state, self._indices[slot], None))

    def fork(self, name: str, new_name: str | None = None) -> str:
        """A second stream with the same past, copied on the device; returns its name, made if None.

        Raises:
            ValueError: no such stream, the pool is full, or the name is taken.
        """
        source, new_name, target = self.slot(name), self._new_name(new_name), self._free_slot()
        state = _copy_slot(self.stream.state, self._indices[source], self._indices[target])
        self._replace(target, int(self.stream.frame_index[source]), state)
        self._slots[new_name] = target
        return new_name

    def snapshot(self, name: str) -> Snapshot:
        """The state of a stream, to `save` or to `start` from; the stream goes on."""
        return snapshots.take(self.stream, self.slot(name), self._weights)

    @functools.cached_property
    def _weights(self) -> str:
        return snapshots.weights_fingerprint(self._model)

    def _replace(self, slot: int, frame_index: int, state: StreamState) -> None:
        """Set the state, and the host's copy of a slot's clock."""
        clocks = self.stream.frame_index.copy()
        clocks[slot] = frame_index
        self.stream = dataclasses.replace(self.stream, state=state, frame_index=clocks)

    def _new_name(self, name: str | None) -> str:
        if name is None:
            return next(made for number in self._numbers if (made := f"stream-{number}") not in self._slots)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected text, got {name!r}")
        if name in self._slots:
            raise ValueError(f"{name!r}: the pool has a stream of that name already")
        return name

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        free = [slot for slot in range(self.stream.options.batch) if slot not in taken]
        if not free:
            raise ValueError(f"the pool is full: all its {len(taken)} slots have streams")
        return free[0]

    def _check_ratio(self, aspect_ratio: float | None) -> np.float32 | None:
        if aspect_ratio is None:
            aspect_ratio = self._default_ratio
        elif self._default_ratio is None:
            raise ValueError("aspect_ratio: only streams of a pool that was made with one have any")
        if aspect_ratio is None:
            return None
        try:
            ratio = np.float32(aspect_ratio)
        except (TypeError, ValueError):
            ratio = np.float32(np.nan)
        if ratio.shape != () or not 0 < ratio < np.inf:
            raise ValueError(f"aspect_ratio: expected a positive height / width, got {aspect_ratio!r}")
        return ratio

    def _batch(self, frames: Mapping[str, Frames], check: bool) -> tuple[np.ndarray, np.ndarray]:
        """Frames [slots, n, H, W, 3] with zeros for the paused, and the mask of those that take part."""
        options = self.stream.options
        arrays = {name: np.asarray(clip) for name, clip in frames.items()}
        first = next(iter(arrays))
        count = arrays[first].shape[:1]
        for name, clip in arrays.items():
            self.slot(name)
            if clip.ndim != 4 or clip.shape[0] == 0 or clip.shape[1:] != (options.height, options.width, 3):
                raise ValueError(
                    f"{name!r}: expected frames [n, {options.height}, {options.width}, 3], got {list(clip.shape)}"
                )
            if clip.dtype != np.uint8 and not jnp.issubdtype(clip.dtype, jnp.floating):
                raise ValueError(f"{name!r}: expected frames of uint8 or normalised floats, got {clip.dtype}")
            if (clip.shape[:1], clip.dtype) != (count, arrays[first].dtype):
                raise ValueError(
                    f"{name!r}: expected {count[0]} frames of {arrays[first].dtype} as of {first!r}, "
                    f"got {len(clip)} of {clip.dtype}"
                )
            if check and clip.dtype != np.uint8 and not np.isfinite(clip.astype(np.float32)).all():
                raise ValueError(f"{name!r}: some of its frames are not finite")
        slots = [self._slots[name] for name in arrays]
        # A new array each time: the program may still read the last one.
        batch = np.zeros((options.batch, *count, options.height, options.width, 3), arrays[first].dtype)
        for slot, clip in zip(slots, arrays.values(), strict=True):
            batch[slot] = clip
        active = np.zeros(options.batch, bool)
        active[slots] = True
        return batch, active


# The slots are traced: one program each serves all of them.


@jax.jit
def _slot_output(out: BackboneOutput, slot: jax.Array) -> BackboneOutput:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), out)


@jax.jit(donate_argnums=0)
def _clear_slot(state: StreamState, slot: jax.Array, aspect_ratio: jax.Array | None) -> StreamState:
    """Zeros in the cache and the clock: a NaN left in a hidden frame would leak through its zero weight."""

    def clear(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, jnp.zeros(leaf.shape[1:], leaf.dtype), slot, 0)

    ratios = state.aspect_ratio if aspect_ratio is None else state.aspect_ratio.at[slot].set(aspect_ratio)
    return StreamState(jax.tree.map(clear, state.cache), clear(state.frame_index), ratios)


@jax.jit(donate_argnums=0)
def _copy_slot(state: StreamState, source: jax.Array, target: jax.Array) -> StreamState:
    def copy(leaf: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(leaf, source, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(leaf, one, target, 0)

    return jax.tree.map(copy, state)
