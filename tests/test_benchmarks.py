"""What the benchmarks print besides times: the FLOP count, the choice of samples, the peer's answers."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig, preset

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("peer", "training_step"):
        sys.modules.pop(name, None)


def matrix_product_flops(jaxpr) -> int:
    """Of all products in a traced program; a scan's body counts as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = 1
            for axis in contracted:
                inner *= equation.invars[0].aval.shape[axis]
            total += 2 * equation.outvars[0].aval.size * inner
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for parameter in equation.params.values():
            inner_jaxpr = getattr(parameter, "jaxpr", parameter)  # closed or open
            if hasattr(inner_jaxpr, "eqns"):
                total += repeats * matrix_product_flops(inner_jaxpr)
    return total


def test_flops_equal_a_count_by_hand(benchmark_module):
    training_flops = benchmark_module("training_step").training_flops
    config = BackboneConfig(width=16, depth=2, heads=2, mlp_width=64)
    # 2 frames of 2 x 1 patches + 5 specials = 7 tokens.
    embedding = 2 * 4 * 768 * 16
    linear = 2 * 14 * (4 * 16 * 16 + 2 * 16 * 64)
    attention = 4 * 16 * (7 * 7 + 7 * 14)
    assert training_flops(config, 3, 2, 32, 16) == 3 * 3 * (embedding + 2 * (linear + attention))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_flops_are_three_times_the_matrix_products_of_a_forward_pass(benchmark_module, mlp):
    training_flops = benchmark_module("training_step").training_flops
    config = preset("small", mlp=mlp)
    backbone = Backbone(config)
    frames = jax.ShapeDtypeStruct((2, 3, 64, 32, 3), jnp.float32)
    params = jax.eval_shape(backbone.init, jax.random.key(0), frames)
    forward = jax.make_jaxpr(lambda p, x: backbone.apply(p, x, layers=()))(params, frames)
    assert training_flops(config, 2, 3, 64, 32) == 3 * matrix_product_flops(forward.jaxpr)


def test_a_busy_sample_is_repeated_and_at_last_marked(benchmark_module, monkeypatch):
    peer = benchmark_module("peer")
    clock = {"now": 0.0, "busy": 0.0}
    monkeypatch.setattr(peer, "_busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(peer, "_own_seconds", lambda pids: clock["now"] * 2)
    monkeypatch.setattr(peer.time, "monotonic", lambda: clock["now"])

    def sampler(others):
        left = iter(others)

        def sample():
            clock["now"] += 1.0
            clock["busy"] += 2.0 + next(left)  # two cores of our own
            return {"ms": clock["now"]}

        return sample

    assert peer.quiet(sampler([0.9, 0.6, 0.1, 0.0]), []) == {"ms": 3.0}
    assert peer.quiet(sampler([0.9] * peer.MAX_REPEATS), []) == {"ms": 3.0 + peer.MAX_REPEATS, "busy": True}


def test_a_peer_answers_tells_its_errors_and_its_end(benchmark_module, tmp_path):
    peer = benchmark_module("peer")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from peer import serve\n"
        "def measure(request):\n"
        "    if request['frames'] == 0:\n"
        "        sys.exit(3)\n"
        "    if request['frames'] > 9:\n"
        "        raise RuntimeError('CUDA out of memory. Tried to allocate')\n"
        "    return {'ms': request['frames'], 'argument': sys.argv[1]}\n"
        "serve(measure)\n"
    )
    process = peer.Peer(sys.executable, str(script), size=32)
    assert process.measure(frames=4) == {"ms": 4, "argument": "--size=32"}
    assert process.measure(frames=10) == {"error": "out of memory"}
    assert process.measure(frames=5)["ms"] == 5
    with pytest.raises(SystemExit, match="status 3"):
        process.measure(frames=0)
