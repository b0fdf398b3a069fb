"""Who asks for float32 gets products of float32 on every device; what is lowered says so."""

import re

import jax
import jax.numpy as jnp
import pytest

from omnistream_jax.losses.language import language_loss
from omnistream_jax.models.attentive_probe import AttentiveProbe
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.geometry import GeometryConfig, GeometryHeads
from omnistream_jax.models.heads import DinoHead
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.models.projector import Projector
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config
from omnistream_jax.ops.cache import empty_cache

BACKBONE = BackboneConfig(width=32, depth=4, heads=2, mlp_width=64, patch_size=8)
DECODER = Qwen3Config(vocabulary_size=50, width=32, depth=2, heads=2, kv_heads=1, head_width=16, hidden=64)
TOKENS = jnp.zeros((1, 3, 32))


def of_backbone(dtype):
    return Backbone(BACKBONE, dtype=dtype), (jnp.zeros((1, 2, 16, 16, 3)),), {"layers": ()}


def of_geometry(dtype):
    heads = GeometryHeads(GeometryConfig((0, 1, 2, 3), features=8, out_channels=(8, 8, 8, 8)), 32, 8, dtype)
    return heads, ([jnp.zeros((1, 1, 10, 32))] * 4, jnp.zeros((1, 1, 32)), 16, 16), {}


def of_decoder(dtype):
    whole = jnp.ones((1, 3), jnp.int32)
    return Qwen3(DECODER, dtype=dtype), (TOKENS, jnp.arange(3)[None], whole), {}


def of_logits(dtype):
    return Qwen3(DECODER, dtype=dtype), (TOKENS,), {"method": "logits"}


def of_others(module):
    return lambda dtype: (module(dtype=dtype), (TOKENS,), {})


PARTS = {
    "backbone": of_backbone,
    "geometry": of_geometry,
    "decoder": of_decoder,
    "logits": of_logits,
    "projector": of_others(lambda dtype: Projector(16, dtype=dtype)),
    "dino_head": of_others(lambda dtype: DinoHead(16, hidden=16, bottleneck=8, dtype=dtype)),
    "attentive_probe": of_others(lambda dtype: AttentiveProbe(5, 2, 2, dtype=dtype)),
}


def precisions(program, *arguments):
    """Of all products and convolutions of a lowered program: True where both factors are taken as they are."""
    text = jax.jit(program).lower(*arguments).as_text()
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    return [line.count("HIGHEST") == 2 for line in products]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
def test_a_module_multiplies_as_exactly_as_its_dtype(part, dtype):
    module, inputs, options = PARTS[part](jnp.dtype(dtype))
    params = jax.eval_shape(lambda key: module.init(key, *inputs, **options), jax.random.key(0))

    def total(params):
        out = module.apply(params, *inputs, **options)
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(out))

    found = precisions(jax.grad(total), params)
    assert found
    if dtype == "float32":
        assert all(found)
    else:  # the last products of camera head and classifier are float32 whatever the rest is
        assert sum(found) <= 3
        assert not all(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_multiplies_as_exactly_as_its_dtype(dtype):
    backbone = Backbone(BACKBONE, dtype=jnp.dtype(dtype), streaming=True)
    cache = tuple(empty_cache(1, 2, 9, BACKBONE.heads, BACKBONE.head_width, backbone.dtype) for _ in range(4))
    inputs = jnp.zeros((1, 1, 16, 16, 3)), cache, jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(lambda key: backbone.init(key, *inputs, method="step"), jax.random.key(0))
    found = precisions(lambda params: backbone.apply(params, *inputs, method="step"), params)
    assert len(found) > 4 * 6  # of each block four products and two of attention
    assert set(found) == {dtype == "float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_of_language_multiplies_as_exactly_as_its_dtype(dtype):
    def loss(hidden, embedding):
        return language_loss(hidden, embedding, jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool))[0]

    found = precisions(jax.grad(loss, (0, 1)), TOKENS.astype(dtype), jnp.zeros((50, 32)))
    assert len(found) == 3
    assert set(found) == {dtype == "float32"}
