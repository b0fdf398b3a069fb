"""The accelerators' attention against the reference: on a CPU where a kernel can be interpreted, else it is lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnistream_jax.ops.attention import attend_cache, attention_path, frame_causal_attention
from omnistream_jax.ops.cache import BlockCache, empty_cache
from omnistream_jax.ops.splash import splash_frame_causal

ON_CUDA = jax.default_backend() == "gpu" and attention_path(jnp.bfloat16, 64) == "cudnn"
GOLDEN_SIZE = jax.ShapeDtypeStruct((2, 4, 201, 4, 64), jnp.bfloat16)  # 201 tokens: an odd length


def random_heads(shape, dtype=jnp.float32):
    return (jnp.asarray(x, dtype) for x in np.random.default_rng(0).normal(size=(4, *shape)))


def test_a_cpu_takes_the_products_of_xla():
    if jax.default_backend() == "cpu":
        assert attention_path(jnp.float32, 64) == attention_path(jnp.bfloat16, 64) == "xla"


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "path"),
    [
        ("bfloat16", 64, 8.0, "cudnn"),
        ("bfloat16", 128, 8.9, "cudnn"),
        ("float16", 256, 9.0, "cudnn"),
        ("float32", 64, 9.0, "xla"),
        ("bfloat16", 64, 7.5, "xla"),
        ("bfloat16", 136, 8.9, "xla"),
        ("bfloat16", 264, 9.0, "xla"),
        ("bfloat16", 36, 9.0, "xla"),
    ],
)
def test_cudnn_is_taken_for_what_it_can_compute(dtype, width, capability, path):
    assert attention_path(jnp.dtype(dtype), width, "cuda", capability) == path


@pytest.mark.parametrize(("dtype", "path"), [("bfloat16", "splash"), ("float32", "xla")])
def test_splash_attention_is_not_taken_for_float32(dtype, path):
    assert attention_path(jnp.dtype(dtype), 64, "tpu") == path


# Splash attention.


@pytest.mark.parametrize(("window", "sinks"), [(None, 1), (2, 1), (3, 0)])
def test_splash_attention_and_its_gradients_equal_the_reference(window, sinks):
    """Three frames of 50 tokens: neither frames nor clips are a multiple of the kernel's blocks."""
    query, key, value, weight = random_heads((2, 3, 50, 2, 64))

    def loss(attend, *heads):
        return (attend(*heads, window=window, sinks=sinks) * weight).sum()

    def interpreted(*heads, **options):
        return splash_frame_causal(*heads, **options, interpret=True)

    both = [
        jax.value_and_grad(lambda *heads, attend=attend: loss(attend, *heads), (0, 1, 2))(query, key, value)
        for attend in (frame_causal_attention, interpreted)
    ]
    for expected, actual in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_splash_attention_lowers_for_a_tpu():
    def loss(query, key, value):
        return frame_causal_attention(query, key, value, path="splash").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(GOLDEN_SIZE, GOLDEN_SIZE, GOLDEN_SIZE)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 2  # forward and backward


# cuDNN.


@pytest.fixture
def as_on_hopper(monkeypatch):
    """JAX asks the device before it lowers for it."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(module, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(module, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize("frames", [4, 20])
def test_clips_of_odd_lengths_lower_to_fused_attention_forward_and_backward(frames, as_on_hopper):
    def loss(query, key, value):
        return frame_causal_attention(query, key, value, path="cudnn").astype(jnp.float32).sum()

    clip = jax.ShapeDtypeStruct((2, frames, 201, 4, 64), jnp.bfloat16)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(clip, clip, clip).lower(lowering_platforms=("cuda",)).as_text()
    groups = frames if frames <= 16 else frames // 2  # 20 frames go in 10 groups of two
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == groups
    assert text.count("@__cudnn$fmhaSoftmax(") == groups
    assert "fmhaScaleBias" not in text  # a mask would have become a bias


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_lowers_to_fused_attention(dtype, as_on_hopper):
    cache = jax.eval_shape(lambda: empty_cache(2, 16, 201, 4, 64, jnp.dtype(dtype)))
    query, visible = jax.ShapeDtypeStruct((2, 201, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(lambda *operands: attend_cache(*operands, path="cudnn")).trace(query, cache, visible)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@__cudnn$fmhaSoftmax(") == 1


@pytest.mark.skipif(not ON_CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("frames", "window"), [(5, None), (5, 3), (20, None)])
def test_cudnn_attention_and_its_gradients_equal_the_reference(frames, window):
    query, key, value, weight = random_heads((2, frames, 201, 2, 64), jnp.bfloat16)

    def loss(path, *heads):
        return (frame_causal_attention(*heads, window=window, path=path) * weight).astype(jnp.float32).sum()

    both = [
        jax.value_and_grad(lambda *heads, path=path: loss(path, *heads), (0, 1, 2))(query, key, value)
        for path in ("xla", "cudnn")
    ]
    for expected, actual in zip(*map(jax.tree.leaves, both), strict=True):
        error = jnp.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32)).max()
        assert error <= 2e-2 * jnp.abs(expected).max().astype(jnp.float32)


@pytest.mark.skipif(not ON_CUDA, reason="needs an NVIDIA GPU")
def test_cudnn_attention_to_a_cache_sees_only_what_is_there():
    query, _, key, value = random_heads((2, 8, 201, 2, 64), jnp.bfloat16)
    cache, visible = BlockCache(key, value), jnp.array([1, 6])
    expected, actual = (attend_cache(query[:, 0], cache, visible, path=path) for path in ("xla", "cudnn"))
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)
