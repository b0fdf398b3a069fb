"""The projector against its formula in float64, and its weights at the start."""

import jax
import jax.numpy as jnp
import numpy as np
from goldens import relative_error
from scipy.special import erf

from omnistream_jax.models.projector import Projector


def make_projector(width=12, tokens=(2, 5, 7), dtype=jnp.float32):
    """A projector, its parameters with biases that are not zero, and visual tokens."""
    random = np.random.default_rng(0)
    projector = Projector(width, dtype=dtype)
    visual = random.standard_normal(tokens).astype(np.float32)
    params = jax.jit(projector.init)(jax.random.key(0), visual)["params"]
    # Larger than at the start, so that the GELU bends: its two forms then differ by more than the tolerance.
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), params)
    return projector, params, visual


def reference(params, visual):
    """Dense - x Phi(x) - Dense in float64."""
    kernels = [np.float64(params[name]["kernel"]) for name in ("mlp_0", "mlp_1")]
    biases = [np.float64(params[name]["bias"]) for name in ("mlp_0", "mlp_1")]
    inner = visual.astype(np.float64) @ kernels[0] + biases[0]
    return 0.5 * inner * (1 + erf(inner / np.sqrt(2))) @ kernels[1] + biases[1]


def test_it_is_two_dense_layers_with_an_exact_gelu_between():
    projector, params, visual = make_projector()
    output = projector.apply({"params": params}, visual)
    assert output.shape == (2, 5, 12)
    assert relative_error(output, reference(params, visual)) <= 1e-6


def test_bfloat16_computes_near_float32_with_float32_params():
    projector, params, visual = make_projector(dtype=jnp.bfloat16)
    output = projector.apply({"params": params}, visual)
    assert output.dtype == jnp.bfloat16
    assert 1e-5 < relative_error(output.astype(jnp.float32), reference(params, visual)) < 2e-2
    fresh = jax.jit(projector.init)(jax.random.key(0), visual)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}


def test_it_starts_with_kernels_of_deviation_002_and_zero_biases():
    params = jax.jit(Projector(256).init)(jax.random.key(1), jnp.zeros((1, 192)))["params"]
    assert params["mlp_0"]["kernel"].shape == (192, 256)
    assert params["mlp_1"]["kernel"].shape == (256, 256)
    for layer in params.values():
        np.testing.assert_allclose(np.std(layer["kernel"]), 0.02, rtol=0.02)
        assert not np.any(layer["bias"])


def test_gradients_reach_the_visual_tokens():
    projector, params, visual = make_projector()
    gradient = jax.grad(lambda tokens: jnp.sum(projector.apply({"params": params}, tokens) ** 2))(visual)
    direction = np.random.default_rng(1).standard_normal(visual.shape)
    ahead, behind = (np.sum(reference(params, visual + step * direction) ** 2) for step in (1e-4, -1e-4))
    np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) / 2e-4, rtol=1e-4)
