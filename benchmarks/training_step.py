"""One forward and backward pass over clips of T frames, beside the released PyTorch model, in one run.

    python benchmarks/training_step.py --model=small --size=112 --frames=8 --modes=released,stored,tuned \
        --peer-python=/path/to/venv/bin/python --peer-code=/path/to/released/OmniStream

The loss is the squared distance of all patch and CLS features to a fixed random target; its value and its gradients
for all parameters are computed, frame-causally, without an optimiser. Ours keeps all activations, or with --remat a
block's input alone. The peer runs in its own interpreters, one for each way, from an installed PyTorch and a folder
that holds the released `model/` package (none of it is in this repository):

    released    as it is trained: a dense mask, every block recomputed in the backward pass, positions jittered
    stored      the same without recomputation and without jitter
    tuned       the same mathematics by hand: static key prefixes and no mask, rotary tables made once, eager;
                with --remat every block is recomputed, as in ours

So without --remat compare with stored and tuned, and with it with released and tuned. Parameters and their gradients
are float32 on both sides. With --dtype=bfloat16 ours has bfloat16 activations, and the peer runs under autocast, which
keeps its residual stream and norms in float32.

TFLOP count the model's arithmetic, 3 x (linear maps + frame-causal attention), whatever a program really does (a dense
mask, a recomputation); MFU is that over --peak-tflops. Samples alternate, and those taken while other processes used
more than half a core are repeated; the table gives medians. On a GPU all processes hold their memory at once.
"""

import argparse
import os
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer, jax_peak_gb, quiet

from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig, preset

MODES = ("released", "stored", "tuned")


def training_flops(config: BackboneConfig, batch: int, frames: int, height: int, width: int) -> int:
    """Floating-point operations of the matrix products of one forward and backward pass, no recomputation.

    Three times the forward pass: a product's backward pass is two of its size. (The patch embedding needs one only,
    as nobody asks for the gradient of the pixels; that is below 1 %.)
    """
    patches = (height // config.patch_size) * (width // config.patch_size)
    tokens = patches + 1 + config.registers
    mlp_kernels = 3 if config.mlp == "swiglu" else 2
    block_kernels = 4 * config.width**2 + mlp_kernels * config.width * config.mlp_width
    embedding = 2 * frames * patches * 3 * config.patch_size**2 * config.width
    linear = 2 * frames * tokens * block_kernels
    visible_frames = frames * (frames + 1) // 2  # of all queries' frames together
    attention = 2 * 2 * visible_frames * tokens**2 * config.width  # scores, and the sum of the values
    return 3 * batch * (embedding + config.depth * (linear + attention))


class Ours:
    """The backbone with random weights, its step compiled ahead."""

    def __init__(self, arguments: argparse.Namespace, config: BackboneConfig):
        backbone = Backbone(config, dtype=jnp.dtype(arguments.dtype), remat="block" if arguments.remat else "auto")
        params = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
        random = np.random.default_rng(0)
        shape = (arguments.batch, arguments.frames, arguments.size, arguments.size, 3)
        side = arguments.size // config.patch_size
        targets = {"patches": (*shape[:2], side, side, config.width), "cls": (*shape[:2], config.width)}
        frames, targets = jax.device_put(
            (
                random.standard_normal(shape, np.float32),
                {name: random.standard_normal(target, np.float32) for name, target in targets.items()},
            )
        )

        def loss(params: Mapping, frames: jax.Array, targets: Mapping[str, jax.Array]) -> jax.Array:
            out = backbone.apply({"params": params}, frames, layers=())
            distances = [getattr(out, name).astype(jnp.float32) - target for name, target in targets.items()]
            return sum(jnp.square(distance).mean() for distance in distances)

        self._inputs = (params, frames, targets)
        started = time.perf_counter()
        self._step = jax.jit(jax.value_and_grad(loss)).lower(*self._inputs).compile()
        self.compile_seconds = time.perf_counter() - started

    def measure(self) -> dict:
        """As `Peer.measure`."""
        try:
            started = time.perf_counter()
            jax.block_until_ready(self._step(*self._inputs))  # the loss and every gradient
            return {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": jax_peak_gb()}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"error": "out of memory"}


def main() -> None:
    """Measure and print the table."""
    arguments = _arguments()
    # The peer needs room on the same GPU; JAX would take three quarters of it at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = preset(arguments.model, rope="released")
    tflop = training_flops(config, arguments.batch, arguments.frames, arguments.size, arguments.size) / 1e12
    ours = Ours(arguments, config)
    modes = arguments.modes if arguments.peer_python else []
    options = {name: getattr(arguments, name) for name in ("model", "size", "frames", "batch", "dtype")}
    options.update(code=arguments.peer_code, remat=int(arguments.remat))
    peers = {mode: Peer(arguments.peer_python, "training_step_peer.py", mode=mode, **options) for mode in modes}
    pids = [os.getpid(), *(peer.pid for peer in peers.values())]
    print(
        f"{arguments.model}, {arguments.size} px, T = {arguments.frames}, batch {arguments.batch}, {arguments.dtype}, "
        f"remat {'on' if arguments.remat else 'off'}, jax {jax.__version__}, {jax.local_devices()[0].device_kind}; "
        f"{tflop:.4g} TFLOP a step, ours compiled in {ours.compile_seconds:.1f} s",
        flush=True,
    )
    measures = {"ours": ours.measure, **{mode: peer.measure for mode, peer in peers.items()}}
    warm = {name: measure() for name, measure in measures.items()}  # all are ready before the first sample
    samples = {name: [first] if "error" in first else [] for name, first in warm.items()}
    for _ in range(arguments.samples):
        for name, measure in measures.items():
            if not (samples[name] and "error" in samples[name][-1]):
                samples[name].append(quiet(measure, pids))
    for peer in peers.values():
        peer.close()
    print(_table(samples, tflop, arguments.peak_tflops))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=["small", "base", "large"])
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels, a multiple of 16")
    parser.add_argument("--frames", type=int, default=16, help="T, frames of a clip")
    parser.add_argument("--batch", type=int, default=1, help="clips of a step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--remat", action="store_true", help="recompute each block's activations in the backward pass")
    parser.add_argument("--modes", default="released,tuned", help=f"of the peer: {', '.join(MODES)}")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    parser.add_argument("--peer-python", help="an interpreter with PyTorch and transformers; none: ours alone")
    parser.add_argument("--peer-code", help="the folder that holds the released `model` package")
    arguments = parser.parse_args()
    if bool(arguments.peer_python) != bool(arguments.peer_code):
        parser.error("--peer-python and --peer-code go together")
    for name in ("frames", "batch", "samples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.size < 16 or arguments.size % 16:
        parser.error(f"--size: expected a multiple of 16, got {arguments.size}")
    arguments.modes = arguments.modes.split(",")
    wrong = [mode for mode in arguments.modes if mode not in MODES]
    if wrong:
        parser.error(f"--modes: expected some of {', '.join(MODES)}, got {', '.join(wrong)}")
    return arguments


def _table(samples: dict[str, list[dict]], tflop: float, peak_tflops: float | None) -> str:
    """A row for each way; ours / theirs compares medians."""
    head = ["", "ms", "ours / theirs", "GB", "TFLOP/s"] + ([] if peak_tflops is None else ["MFU"])
    rows = [head, ["---"] * len(head)]
    medians = {
        name: float(np.median([sample["ms"] for sample in taken]))
        for name, taken in samples.items()
        if "error" not in taken[-1]
    }
    for name, taken in samples.items():
        label = f"{name} (busy)" if any("busy" in sample for sample in taken) else name
        if name not in medians:
            rows.append([label, taken[-1]["error"], *[""] * (len(head) - 2)])
            continue
        ratio = f"{medians['ours'] / medians[name]:.2f}" if name != "ours" and "ours" in medians else ""
        rate = tflop / (medians[name] / 1e3)
        cells = [label, f"{medians[name]:.1f}", ratio, f"{taken[-1]['peak_gb']:.2f}", f"{rate:.3g}"]
        rows.append(cells + ([] if peak_tflops is None else [f"{rate / peak_tflops:.1%}"]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
