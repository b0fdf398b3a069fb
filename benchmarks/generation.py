"""Tokens per second of greedy generation, beside transformers' Qwen3ForCausalLM of the same weights, in one run.

    python benchmarks/generation.py --peer-python=/path/to/venv/bin/python
    python benchmarks/generation.py --preset=0.6b --depth=4 --tokens=32 --peer-python=/path/to/venv/bin/python

Weights are random, drawn here; the peer reads them from a temporary directory in its own layout. A sample is a whole
call: prompts in, --tokens tokens out for each of the rows, no stop token. Ours is measured in two ways:

    generate    omnistream_jax.generate.generate, several tokens a call of the program
    stream      generate_stream, each token in the host's hands as it comes

The first call compiles and is not counted; then samples of both and of the peer alternate, those taken while other
processes used more than half a core are repeated, and the table gives medians. "same" is the share of our tokens that
the peer said too (random weights leave small margins: a tie that rounding breaks turns the rest of its row).
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer, jax_peak_gb, quiet

from omnistream_jax.convert.qwen3 import save_decoder
from omnistream_jax.generate import embed_prompts, generate, generate_stream
from omnistream_jax.models.qwen3 import DECODER_PRESETS, Qwen3, Qwen3Config, decoder_preset, decoding_params


def main() -> None:
    """Measure and print the table."""
    arguments = _arguments()
    config = decoder_preset(arguments.preset, vocabulary_size=arguments.vocabulary)
    config = dataclasses.replace(config, depth=arguments.depth or config.depth)
    dtype = jnp.dtype(arguments.dtype)
    stacked = _random_params(config)
    decoder, params = Qwen3(config, dtype=dtype, decoding=True), decoding_params(stacked, dtype)
    count = sum(leaf.size for leaf in jax.tree.leaves(stacked))
    print(
        f"{arguments.preset}, {config.depth} blocks, V = {config.vocabulary_size}, {count / 1e6:.1f} M parameters, "
        f"{arguments.dtype}, jax {jax.__version__}, {jax.local_devices()[0].device_kind}; "
        f"{arguments.tokens} tokens behind prompts of {arguments.prompt}",
        flush=True,
    )
    ways = {"generate": _generate, "stream": _stream}
    peer = None
    if arguments.peer_python:
        with tempfile.TemporaryDirectory() as directory:
            save_decoder(directory, config, stacked)
            peer = Peer(arguments.peer_python, "generation_peer.py", weights=directory, dtype=arguments.dtype)
            peer.measure(prompts=[[0]], tokens=1)  # it has read the weights when it answers
    del stacked
    print(
        "| B | generate tokens/s | stream tokens/s | GB |"
        + (" peer tokens/s | GB | generate / peer | same |" * bool(peer))
    )
    print("|---|---|---|---|" + "---|---|---|---|" * bool(peer))
    random = np.random.default_rng(0)
    for batch in arguments.batches:
        prompts = random.integers(config.vocabulary_size, size=(batch, arguments.prompt))
        print(_row(decoder, params, prompts, ways, peer, arguments), flush=True)
    if peer:
        peer.close()


def _random_params(config: Qwen3Config) -> dict:
    """As `init_decoder` makes them, kernels of deviation 0.02 and norms of one, without compiling that."""
    model, key = Qwen3(config), jax.random.key(0)
    row = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(key, jnp.zeros((1, 1, config.width)), row, row)["params"])
    random = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if "scale" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return 0.02 * random.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _generate(decoder: Qwen3, params: dict, prompts: np.ndarray, tokens: int) -> np.ndarray:
    return generate(decoder, params, *embed_prompts(decoder, params, prompts), max_tokens=tokens)


def _stream(decoder: Qwen3, params: dict, prompts: np.ndarray, tokens: int) -> np.ndarray:
    embedded = embed_prompts(decoder, params, prompts)
    return np.stack(list(generate_stream(decoder, params, *embedded, max_tokens=tokens)), axis=1)


def _measure(run: Callable[[], np.ndarray]) -> dict:
    started = time.perf_counter()
    said = run()
    return {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": jax_peak_gb(), "said": said.tolist()}


def _row(
    decoder: Qwen3, params: dict, prompts: np.ndarray, ways: dict, peer: Peer | None, arguments: argparse.Namespace
) -> str:
    tokens, pids = arguments.tokens, [os.getpid()] + ([peer.pid] if peer else [])
    runs = {name: lambda way=way: _measure(lambda: way(decoder, params, prompts, tokens)) for name, way in ways.items()}
    if peer:
        runs["peer"] = lambda: peer.measure(prompts=prompts.tolist(), tokens=tokens)
    samples: dict[str, list[dict]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(arguments.samples):
        for name, run in runs.items():
            samples[name].append(quiet(run, pids))
    return _cells(samples, len(prompts) * tokens)


def _cells(samples: dict[str, list[dict]], tokens: int) -> str:
    busy = any("busy" in sample for taken in samples.values() for sample in taken)
    rates = {
        name: tokens / float(np.median([sample["ms"] for sample in taken])) * 1e3
        for name, taken in samples.items()
        if "error" not in taken[-1]
    }
    batch = len(samples["generate"][-1]["said"])
    cells = [f"{batch}{' (busy)' if busy else ''}", f"{rates['generate']:.1f}", f"{rates['stream']:.1f}"]
    cells.append(f"{samples['generate'][-1]['peak_gb']:.2f}")
    if "peer" in samples:
        theirs = samples["peer"][-1]
        if "error" in theirs:
            cells += [theirs["error"], "", "", ""]
        else:
            same = np.mean(np.array(samples["generate"][-1]["said"]) == np.array(theirs["said"]))
            ratio = rates["generate"] / rates["peer"]
            cells += [f"{rates['peer']:.1f}", f"{theirs['peak_gb']:.2f}", f"{ratio:.2f}", f"{same:.0%}"]
    return "| " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=list(DECODER_PRESETS))
    parser.add_argument("--depth", type=int, default=0, help="blocks; 0: the preset's own")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batches", default="1,8", help="rows, separated by commas")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--peer-python", help="an interpreter with PyTorch and transformers; none: ours alone")
    arguments = parser.parse_args()
    arguments.batches = [int(batch) for batch in arguments.batches.split(",")]
    for name in ("vocabulary", "prompt", "tokens", "samples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if min(arguments.batches) < 1:
        parser.error(f"--batches: expected at least 1 each, got {arguments.batches}")
    return arguments


if __name__ == "__main__":
    main()
