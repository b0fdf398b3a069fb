"""Per-frame latency of a stream at context T, beside the released PyTorch model, in one run.

    python benchmarks/streaming.py --model=base --size=224 --frames=1,8,16,32,64 \
        --peer-python=/path/to/venv/bin/python --peer-code=/path/to/released/OmniStream

At context T a step sees T frames, its own included. The peer runs in its own interpreter, from an installed PyTorch and
a folder that holds the released `model/` package (none of it is in this repository), in these ways:

    cache       the released model's own cache: keys and values concatenated, a dense mask
    recompute   no cache: all T frames through the model again, mask off, as in the paper's Table 9
    tuned       the same mathematics by hand: preallocated cache, no mask, rotary tables made once

Ours and the peer's samples alternate, so that a busy machine troubles both; samples taken while other processes used
more than half a core are repeated. The table gives medians and ours / theirs.
"""

import argparse
import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer, jax_peak_gb, quiet

from omnistream_jax.model import Model, build_model
from omnistream_jax.models.presets import preset
from omnistream_jax.stream import Stream, bucket_capacity


class Ours:
    """A model with random weights, and streams that stand at a given context."""

    def __init__(self, arguments: argparse.Namespace):
        config = preset(arguments.model, rope="released")
        self._size = arguments.size
        dtype = jnp.dtype(arguments.dtype)
        empty = build_model(config, {}, dtype=dtype)
        params = jax.jit(empty.backbone.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
        self._model: Model = build_model(config, params, dtype=dtype)
        self._frame = np.random.default_rng(0).standard_normal((1, 1, self._size, self._size, 3), np.float32)
        self._stream: Stream | None = None
        self._frames = 0

    def measure(self, frames: int) -> dict:
        """As `Peer.measure`; the first sample at a context compiles, and is not counted."""
        if frames != self._frames:
            self._stream, self._frames = None, frames
            self._stream = self._at(frames)
            self._step()
        started = time.perf_counter()
        self._step()
        return {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": jax_peak_gb()}

    def _at(self, frames: int) -> Stream:
        stream = self._model.open_stream(1, self._size, self._size, layers=())
        capacity, key = bucket_capacity(frames), jax.random.key(1)

        def fill(leaf: jax.Array) -> jax.Array:
            return jax.random.normal(key, (1, capacity, *leaf.shape[2:]), leaf.dtype)

        state = stream.state.replace(cache=jax.tree.map(fill, stream.state.cache))
        return self._rewound(dataclasses.replace(stream, state=state))

    def _rewound(self, stream: Stream) -> Stream:
        index = self._frames - 1
        state = stream.state.replace(frame_index=jnp.full((1,), index, jnp.int32))
        return dataclasses.replace(stream, state=state, frame_index=np.full(1, index))

    def _step(self) -> None:
        stream = self._rewound(self._stream)
        jax.block_until_ready(stream.state.frame_index)
        out, self._stream = self._model.step(stream, self._frame)
        jax.block_until_ready((out, self._stream.state))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", choices=["small", "base", "large"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--frames", default="1,8,16,32,64", help="contexts T, separated by commas")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--modes", default="cache", help="of the peer: cache, recompute, tuned, separated by commas")
    parser.add_argument("--peer-python", help="an interpreter with PyTorch and transformers; none: ours alone")
    parser.add_argument("--peer-code", help="the folder that holds the released `model` package")
    arguments = parser.parse_args()
    if bool(arguments.peer_python) != bool(arguments.peer_code):
        parser.error("--peer-python and --peer-code go together")

    ours = Ours(arguments)
    peer = None
    if arguments.peer_python:
        options = {name: getattr(arguments, name) for name in ("model", "size", "dtype")}
        peer = Peer(arguments.peer_python, "streaming_peer.py", code=arguments.peer_code, **options)
    modes = arguments.modes.split(",") if peer else []
    pids = [os.getpid()] + ([peer.pid] if peer else [])
    device = jax.local_devices()[0]
    print(f"{arguments.model}, {arguments.size} px, {arguments.dtype}, jax {jax.__version__}, {device.device_kind}")
    print("| T | ours ms | GB |" + "".join(f" {mode} ms | GB | ours / {mode} |" for mode in modes))
    print("|---|---|---|" + "---|---|---|" * len(modes))
    for frames in map(int, arguments.frames.split(",")):
        samples: dict[str, list[dict]] = {"ours": [], **{mode: [] for mode in modes}}
        for _ in range(arguments.samples):
            samples["ours"].append(quiet(lambda frames=frames: ours.measure(frames), pids))
            for mode in modes:
                if not (samples[mode] and "error" in samples[mode][-1]):
                    samples[mode].append(
                        quiet(lambda mode=mode, frames=frames: peer.measure(mode=mode, frames=frames), pids)
                    )
        print(_row(frames, samples, modes), flush=True)
    if peer:
        peer.close()


def _row(frames: int, samples: dict[str, list[dict]], modes: list[str]) -> str:
    ours = float(np.median([sample["ms"] for sample in samples["ours"]]))
    busy = any("busy" in sample for taken in samples.values() for sample in taken)
    cells = [f"{frames}{' (busy)' if busy else ''}", f"{ours:.1f}", f"{samples['ours'][-1]['peak_gb']:.2f}"]
    for mode in modes:
        if "error" in samples[mode][-1]:
            cells += [samples[mode][-1]["error"], "", ""]
            continue
        theirs = float(np.median([sample["ms"] for sample in samples[mode]]))
        cells += [f"{theirs:.1f}", f"{samples[mode][-1]['peak_gb']:.2f}", f"{ours / theirs:.2f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
