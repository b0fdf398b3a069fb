"""The DINO head against DINOv3's (golden 05b)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error

from omnistream_jax.models.heads import DinoHead

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return load_golden("05b_dino_head")


def make_head(golden, **options):
    config = golden.config
    return DinoHead(config["out_dim"], config["hidden_dim"], config["bottleneck_dim"], config["nlayers"], **options)


def to_ours(tensors):
    """PyTorch's names and [out, in] kernels -> our tree; the activations between count as layers there."""
    tree = {"last_layer": {"kernel": tensors["last_layer.weight"].T}}
    for layer in range(3):
        tree[f"mlp_{layer}"] = {
            "kernel": tensors[f"mlp.{2 * layer}.weight"].T,
            "bias": tensors[f"mlp.{2 * layer}.bias"],
        }
    return tree


def test_head_agrees_with_dinov3_in_values_and_gradients(golden):
    head = make_head(golden)
    params = to_ours(golden.weights)

    def loss(params, features):
        return jnp.sum(head.apply({"params": params}, features) * golden.cotangents["logits"])

    features = golden.inputs["x"]
    assert relative_error(head.apply({"params": params}, features), golden.outputs["logits"]) <= TOLERANCE
    bottleneck = head.apply({"params": params}, features, method="embed")
    assert relative_error(bottleneck, golden.outputs["bottleneck_normalised"]) <= TOLERANCE

    value, (params_grad, features_grad) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, features)
    assert relative_error(value, golden.grads["loss"]) <= TOLERANCE
    assert relative_error(features_grad, golden.grads["input:x"]) <= TOLERANCE
    errors = jax.tree.map(relative_error, params_grad, to_ours(golden.grads))
    assert max(jax.tree.leaves(errors)) <= TOLERANCE, errors


def test_bfloat16_head_has_float32_params_and_logits_near_those_of_float32(golden):
    head = make_head(golden, dtype=jnp.bfloat16)
    features = golden.inputs["x"]
    params = jax.jit(head.init)(jax.random.key(0), features)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    logits = head.apply({"params": to_ours(golden.weights)}, features)
    assert logits.dtype == jnp.float32
    error = relative_error(logits, golden.outputs["logits"])
    assert 1e-5 < error < 3e-2
    # Not rounded to bfloat16 on the way out.
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(head.apply({"params": p}, features) ** 2)))(params)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_head_starts_with_weights_of_deviation_002_and_zero_biases():
    head = DinoHead(prototypes=512)
    params = jax.jit(head.init)(jax.random.key(1), jnp.zeros((1, 384)))["params"]
    assert set(params) == {"mlp_0", "mlp_1", "mlp_2", "last_layer"}
    assert set(params["last_layer"]) == {"kernel"}
    assert params["last_layer"]["kernel"].shape == (256, 512)
    for layer in params.values():
        np.testing.assert_allclose(np.std(layer["kernel"]), 0.02, rtol=0.02)
        assert not np.any(layer.get("bias", 0))


def test_head_is_finite_at_a_zero_bottleneck_and_refuses_zero_layers():
    head = DinoHead(prototypes=8, hidden=8, bottleneck=4, layers=1)
    features = jnp.zeros((2, 6))
    params = head.init(jax.random.key(2), features)["params"]
    gradient = jax.grad(lambda x: jnp.sum(head.apply({"params": params}, x)))(features)
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="layers"):
        DinoHead(prototypes=8, layers=0).init(jax.random.key(0), features)
