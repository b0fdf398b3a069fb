"""A windowed stream over thousands of frames: does latency or memory grow?

    python benchmarks/window.py --model=tiny --size=32 --window=8 --frames=2000

Prints, for stretches of 100 frames, the median latency of a step, this process's memory and, where there is one, the
accelerator's; then what the last stretch costs beside the frames 100 to 200, and the growth of memory since frame 100.
Nothing is compared with a peer: the stream is its own.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.model import build_model
from omnistream_jax.models.presets import PRESETS, preset

STRETCH = 100


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def device_mb() -> float | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_in_use"] / 1e6 if "bytes_in_use" in stats else None


def main() -> None:
    """Run the stream and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--frames", type=int, default=2000)
    arguments = parser.parse_args()
    if arguments.frames < 3 * STRETCH:
        parser.error(f"--frames: expected at least {3 * STRETCH}")

    config = preset(arguments.model)
    empty = build_model(config, {}, dtype=arguments.dtype)
    params = jax.jit(empty.backbone.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
    model = build_model(config, params, dtype=arguments.dtype)
    size = arguments.size
    stream = model.open_stream(1, size, size, window=arguments.window, sinks=arguments.sinks, layers=())
    frames = np.random.default_rng(0).integers(0, 256, (16, 1, 1, size, size, 3), np.uint8)

    device = jax.local_devices()[0].device_kind
    print(
        f"{arguments.model}, {size} px, {arguments.dtype}, window {arguments.window}, jax {jax.__version__}, {device}"
    )
    print("| frames | ms a frame | process MB | device MB |\n|---|---|---|---|")
    medians, resident, on_device = [], [], []
    for start in range(0, arguments.frames - STRETCH + 1, STRETCH):
        samples = []
        for index in range(start, start + STRETCH):
            began = time.perf_counter()
            out, stream = model.step(stream, frames[index % len(frames)])
            jax.block_until_ready((out, stream.state))
            samples.append(1e3 * (time.perf_counter() - began))
        medians.append(float(np.median(samples)))
        resident.append(resident_mb())
        on_device.append(device_mb())
        shown = "" if on_device[-1] is None else f"{on_device[-1]:.1f}"
        print(f"| {start} to {start + STRETCH} | {medians[-1]:.3f} | {resident[-1]:.1f} | {shown} |", flush=True)
    print(f"latency, last {STRETCH} frames / frames {STRETCH} to {2 * STRETCH}: {medians[-1] / medians[1]:.3f}")
    print(f"memory of the process since frame {STRETCH}: {resident[-1] - resident[0]:+.1f} MB")
    if on_device[0] is not None:
        print(f"memory of the device since frame {STRETCH}: {on_device[-1] - on_device[0]:+.1f} MB")


if __name__ == "__main__":
    main()
