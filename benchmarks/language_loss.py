"""The language loss and its gradients, chunk by chunk, beside the plain way with optax, in one process.

    python benchmarks/language_loss.py --rows=2 --length=256 --width=256 --vocabulary=32768 --chunks=64,256
    python benchmarks/language_loss.py --rows=4 --length=1024 --width=1024 --vocabulary=151936 --samples=0

Both take the decoder's last states [rows, length, width] and its embedding, float32 as parameters are, to the mean
cross-entropy over the answers and to the gradients of states and embedding. The plain way makes all logits, with
float32 accumulation, and gives them to optax.softmax_cross_entropy_with_integer_labels. Answers are --answers of the
positions; the fused loss passes over the others, and `--answers=1` shows it without that.

MB is the memory that XLA's compiler plans for intermediate values, inputs and results not counted. With --samples=0
nothing runs, so that sizes beyond this machine's memory can be compared. Samples alternate, and those taken while
other processes used more than half a core are repeated; ms are medians.
"""

import argparse
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peer import quiet

from omnistream_jax.losses.language import language_loss

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def plain_loss(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The same loss from all logits, [B, L, V] float32."""
    logits = jnp.einsum("bld,vd->blv", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1)


def main() -> None:
    """Compile, measure and print the table."""
    arguments = _arguments()
    losses: dict[str, Callable[..., jax.Array]] = {"plain": plain_loss}
    for chunk in arguments.chunks:
        losses[f"chunks of {chunk}"] = lambda *inputs, chunk=chunk: language_loss(*inputs, chunk=chunk)[0]
    shapes = _shapes(arguments)
    full = arguments.rows * arguments.length * arguments.vocabulary * 4
    print(
        f"B = {arguments.rows}, L = {arguments.length}, D = {arguments.width}, V = {arguments.vocabulary}, "
        f"{arguments.dtype}, answers {arguments.answers:.0%}, jax {jax.__version__}, "
        f"{jax.local_devices()[0].device_kind}; all logits are {full / 1e6:.1f} MB",
        flush=True,
    )
    programs = {
        name: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile() for name, loss in losses.items()
    }
    megabytes = {name: program.memory_analysis().temp_size_in_bytes / 1e6 for name, program in programs.items()}
    samples: dict[str, list[dict]] = {name: [] for name in programs}
    if arguments.samples:
        inputs = _inputs(arguments)
        for program in programs.values():  # all are ready before the first sample
            jax.block_until_ready(program(*inputs))
    for _ in range(arguments.samples):
        for name, program in programs.items():
            samples[name].append(quiet(lambda program=program: _measure(program, inputs), [os.getpid()]))
    print(_table(megabytes, samples))


def _measure(program: Callable, inputs: Inputs) -> dict:
    started = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return {"ms": 1e3 * (time.perf_counter() - started)}


def _shapes(arguments: argparse.Namespace) -> tuple[jax.ShapeDtypeStruct, ...]:
    row = (arguments.rows, arguments.length)
    return (
        jax.ShapeDtypeStruct((*row, arguments.width), jnp.dtype(arguments.dtype)),
        jax.ShapeDtypeStruct((arguments.vocabulary, arguments.width), jnp.float32),
        jax.ShapeDtypeStruct(row, jnp.int32),
        jax.ShapeDtypeStruct(row, jnp.bool_),
    )


def _inputs(arguments: argparse.Namespace) -> Inputs:
    """States of unit size, an embedding of deviation 0.02 as Qwen3's, answers at the end of each row."""
    random = np.random.default_rng(0)
    hidden, embedding, targets, mask = _shapes(arguments)
    first = round(arguments.length * (1 - arguments.answers))
    return jax.device_put(
        (
            random.standard_normal(hidden.shape, np.float32).astype(hidden.dtype),
            0.02 * random.standard_normal(embedding.shape, np.float32),
            random.integers(arguments.vocabulary, size=targets.shape, dtype=np.int32),
            np.broadcast_to(np.arange(arguments.length) >= first, mask.shape),
        )
    )


def _table(megabytes: dict[str, float], samples: dict[str, list[dict]]) -> str:
    """A row for each way; the last two columns compare it with the plain one."""
    rows = [["", "MB", "ms", "MB / plain", "ms / plain"], ["---"] * 5]
    medians = {name: float(np.median([sample["ms"] for sample in taken])) for name, taken in samples.items() if taken}
    for name, taken in samples.items():
        label = f"{name} (busy)" if any("busy" in sample for sample in taken) else name
        cells = [label, f"{megabytes[name]:.1f}", "", f"{megabytes[name] / megabytes['plain']:.2f}", ""]
        if name in medians:
            cells[2], cells[4] = f"{medians[name]:.1f}", f"{medians[name] / medians['plain']:.2f}"
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2, help="B")
    parser.add_argument("--length", type=int, default=256, help="L, positions of a row")
    parser.add_argument("--width", type=int, default=256, help="D, of the decoder")
    parser.add_argument("--vocabulary", type=int, default=32768, help="V; Qwen3's is 151936")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the states")
    parser.add_argument("--answers", type=float, default=0.25, help="share of the positions that are learned, 0 to 1")
    parser.add_argument("--chunks", default="64,128,256", help="tokens of a chunk, to be compared")
    parser.add_argument("--samples", type=int, default=5, help="0: only compile, and compare memory")
    arguments = parser.parse_args()
    arguments.chunks = [int(chunk) for chunk in arguments.chunks.split(",")]
    for name in ("rows", "length", "width", "vocabulary"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if min(arguments.chunks) < 1:
        parser.error(f"--chunks: expected at least 1 each, got {arguments.chunks}")
    if arguments.samples < 0:
        parser.error(f"--samples: expected at least 0, got {arguments.samples}")
    if not 0 <= arguments.answers <= 1:
        parser.error(f"--answers: expected 0 to 1, got {arguments.answers}")
    return arguments


if __name__ == "__main__":
    main()
