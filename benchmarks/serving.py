"""Cost of a frame when many streams are served in one batch, and when each is stepped alone, in one run.

    python benchmarks/serving.py --model=base --size=224 --streams=16 --frames=16 --dtype=float32 [--window=64]

At context T a step sees T frames, its own included; with a window, at most that many. "Batch" is a `StreamPool` whose
streams all take a frame, "alone" as many streams of their own stepped in turn by one program. Samples alternate and are
taken on a quiet machine, as in streaming.py; the table gives medians, from the host's frames to the features.
"""

import argparse
import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from peer import quiet

from omnistream_jax.model import Model, build_model
from omnistream_jax.models.presets import preset
from omnistream_jax.serving import StreamPool
from omnistream_jax.stream import Stream, with_room


class Batch:
    """All streams in one pool; they stand at context `frames` before each sample."""

    def __init__(self, model: Model, arguments: argparse.Namespace, frames: int):
        self._context = frames - 1
        self._pool = StreamPool(
            model, arguments.streams, arguments.size, arguments.size, window=arguments.window, layers=()
        )
        self._frames = {self._pool.start(): frame for frame in _random_frames(arguments)}
        self._pool.stream = _filled(self._pool.stream, frames)

    def measure(self) -> dict:
        """Milliseconds of one frame of one stream."""
        self._pool.stream = _at(self._pool.stream, self._context)
        started = time.perf_counter()
        out = self._pool.step(self._frames)
        jax.block_until_ready((out, self._pool.stream.state))
        return {"ms": 1e3 * (time.perf_counter() - started) / len(self._frames)}


class Alone:
    """Each stream in a batch of one, stepped in turn; likewise."""

    def __init__(self, model: Model, arguments: argparse.Namespace, frames: int):
        self._model = model
        self._context = frames - 1
        self._frames = _random_frames(arguments)[:, None]
        options = {"window": arguments.window, "layers": ()}
        self._streams = [
            _filled(model.open_stream(1, arguments.size, arguments.size, **options), frames) for _ in self._frames
        ]

    def measure(self) -> dict:
        """Milliseconds of one frame of one stream."""
        streams = [_at(stream, self._context) for stream in self._streams]
        started = time.perf_counter()
        # As a server would, all are dispatched before any is waited for.
        pairs = [self._model.step(stream, frame) for stream, frame in zip(streams, self._frames, strict=True)]
        self._streams = [stream for _, stream in pairs]
        jax.block_until_ready([(out, stream.state) for out, stream in pairs])
        return {"ms": 1e3 * (time.perf_counter() - started) / len(pairs)}


def _random_frames(arguments: argparse.Namespace) -> np.ndarray:
    """A frame of each stream, [streams, 1, H, W, 3]."""
    shape = (arguments.streams, 1, arguments.size, arguments.size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _filled(stream: Stream, frames: int) -> Stream:
    """The streams with random keys and values of all frames."""
    stream = with_room(stream, frames)

    def fill(leaf: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)

    return dataclasses.replace(stream, state=stream.state.replace(cache=jax.tree.map(fill, stream.state.cache)))


def _at(stream: Stream, frame_index: int) -> Stream:
    """The streams with all their clocks at `frame_index`."""
    clocks = np.full(stream.options.batch, frame_index)
    state = stream.state.replace(frame_index=jax.device_put(clocks.astype(np.int32)))
    jax.block_until_ready(state.frame_index)
    return dataclasses.replace(stream, state=state, frame_index=clocks)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", choices=["small", "base", "large"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--frames", default="16", help="contexts T, separated by commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--window", type=int, help="frames that a query sees; none: all")
    parser.add_argument("--samples", type=int, default=7)
    arguments = parser.parse_args()

    config, dtype = preset(arguments.model, rope="released"), jnp.dtype(arguments.dtype)
    init = build_model(config, {}, dtype=dtype).backbone.init
    params = jax.jit(init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
    model = build_model(config, params, dtype=dtype)
    window = f", window {arguments.window}" if arguments.window else ""
    device = jax.local_devices()[0].device_kind
    print(f"{arguments.model}, {arguments.size} px, {arguments.dtype}{window}, jax {jax.__version__}, {device}")
    print("| T | streams | batch ms/frame | alone ms/frame | batch / alone |\n|---|---|---|---|---|")
    for frames in map(int, arguments.frames.split(",")):
        ways = {"batch": Batch(model, arguments, frames), "alone": Alone(model, arguments, frames)}
        samples: dict[str, list[dict]] = {name: [] for name in ways}
        for way in ways.values():
            way.measure()  # compiles
        for _ in range(arguments.samples):
            for name, way in ways.items():
                samples[name].append(quiet(way.measure, [os.getpid()]))
        batch, alone = (float(np.median([sample["ms"] for sample in samples[name]])) for name in ("batch", "alone"))
        busy = " (busy)" if any("busy" in sample for taken in samples.values() for sample in taken) else ""
        print(f"| {frames}{busy} | {arguments.streams} | {batch:.2f} | {alone:.2f} | {batch / alone:.2f} |", flush=True)
        del ways, way  # before the next context takes its memory


if __name__ == "__main__":
    main()
