"""The attentive probe against V-JEPA 2's (golden 08a), its start, and its files in both layouts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error
from safetensors.numpy import save_file

from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.vjepa2_probe import (
    ProbeSizes,
    attentive_probe_tensors,
    convert_attentive_probe,
    find_sizes,
    load_attentive_probe,
    save_attentive_probe,
)
from omnistream_jax.models.attentive_probe import AttentivePooler, AttentiveProbe, token_attention
from omnistream_jax.utils.trees import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 2e-5
SIZES = ProbeSizes(width=64, hidden=256, depth=4, classes=10)


@pytest.fixture(scope="module")
def golden():
    return load_golden("08a_vjepa2_attentive_classifier")


def _transformers_tensors(tensors):
    """The original's tensors under the names of VJEPA2ForVideoClassification, with some of the backbone's."""
    renamed = {"vjepa2.encoder.layernorm.weight": np.ones(64, np.float32)}
    for name, tensor in tensors.items():
        name = name.replace("pooler.blocks.", "pooler.self_attention_layers.")
        name = name.replace("cross_attention_block", "cross_attention_layer").replace("linear.", "classifier.")
        name = name.replace(".norm", ".layer_norm").replace(".attn.proj.", ".self_attn.out_proj.")
        name = name.replace(".xattn.q.", ".cross_attn.q_proj.")
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", np.split(tensor, 3), strict=True):
                renamed[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = piece
        elif ".xattn.kv." in name:
            for part, piece in zip("kv", np.split(tensor, 2), strict=True):
                renamed[name.replace(".xattn.kv.", f".cross_attn.{part}_proj.")] = piece
        else:
            renamed[name] = tensor
    return renamed


def test_probe_agrees_with_vjepa_2_in_values_and_gradients(golden):
    probe = AttentiveProbe(classes=10, heads=16, depth=4)
    params = convert_attentive_probe(golden.weights, SIZES)

    def loss(params, tokens):
        logits = probe.apply({"params": params}, tokens)
        return jnp.sum(logits * golden.cotangents["logits"]), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, golden.inputs["x"])
    pooler = AttentivePooler(heads=16, depth=4, hidden=256)
    pooled = jax.jit(pooler.apply)({"params": params["pooler"]}, golden.inputs["x"])
    assert relative_error(logits, golden.outputs["logits"]) <= TOLERANCE
    assert relative_error(pooled, golden.outputs["pooled"][:, 0]) <= TOLERANCE
    assert relative_error(value, golden.grads["loss"]) <= TOLERANCE
    assert relative_error(gradients[1], golden.grads["input:x"]) <= TOLERANCE
    ours = attentive_probe_tensors(gradients[0])
    assert ours.keys() == golden.weights.keys()
    known = golden.grads.keys() - {"loss", "input:x"}
    errors = {name: relative_error(ours[name], golden.grads[name]) for name in known}
    assert max(errors.values()) <= TOLERANCE, errors


def test_long_videos_are_attended_in_chunks_to_the_same_numbers():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 21, 4, 8))

    def summed(chunk):
        def total(*inputs):
            attended = token_attention(*inputs, query_chunk=chunk)
            return jnp.sum(attended * jnp.arange(8)), attended

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)

    (_, whole), whole_gradients = summed(None)
    (_, chunked), chunked_gradients = summed(5)
    assert relative_error(chunked, whole) <= 1e-6
    for ours, expected in zip(chunked_gradients, whole_gradients, strict=True):
        assert relative_error(ours, expected) <= 1e-5


def test_probe_starts_as_vjepa_2s():
    tokens = jnp.zeros((1, 2, 256))
    params = jax.jit(AttentiveProbe(classes=300, heads=16, depth=4).init)(jax.random.key(1), tokens)["params"]
    pooler = params["pooler"]
    expected = {
        ("block_0", "qkv"): 0.02,
        ("block_0", "projection"): 0.02 / 2**0.5,
        ("block_1", "projection"): 0.02 / 4**0.5,
        ("block_2", "projection"): 0.02 / 6**0.5,
        ("cross", "query"): 0.02,
        ("cross", "key_value"): 0.02,
    }
    for (block, name), std in expected.items():
        assert np.std(pooler[block][name]["kernel"]) == pytest.approx(std, rel=0.03), (block, name)
    for block, layer in {"block_0": 1, "block_1": 2, "block_2": 3, "cross": 3}.items():
        assert np.std(pooler[block]["mlp"]["hidden"]["kernel"]) == pytest.approx(0.02, rel=0.03)
        assert np.std(pooler[block]["mlp"]["output"]["kernel"]) == pytest.approx(0.02 / (2 * layer) ** 0.5, rel=0.03)
    assert np.std(pooler["query"]) == pytest.approx(0.02, rel=0.2)
    linear = params["linear"]
    for values in linear.values():  # uniform within 1 / sqrt(256)
        assert np.std(values) == pytest.approx(1 / 16 / 3**0.5, rel=0.1)
        assert 0.95 / 16 < np.max(np.abs(values)) <= 1 / 16
    biases = {name: leaf for name, leaf in named_leaves(pooler).items() if name.endswith("bias")}
    assert len(biases) == 24
    assert not any(np.any(bias) for bias in biases.values())
    assert "projection" not in pooler["cross"]


@pytest.mark.parametrize("layout", ["vjepa2", "transformers"])
def test_weights_load_from_either_layout_and_come_back(golden, tmp_path, layout):
    tensors = golden.weights if layout == "vjepa2" else _transformers_tensors(golden.weights)
    save_file(tensors, tmp_path / "theirs.safetensors")
    probe, params = load_attentive_probe(tmp_path / "theirs.safetensors")
    assert (probe.classes, probe.heads, probe.depth, probe.hidden) == (10, 16, 4, 256)
    assert probe.norm_epsilon == {"vjepa2": 1e-5, "transformers": 1e-6}[layout]
    logits = jax.jit(probe.apply)({"params": params}, golden.inputs["x"])
    assert relative_error(logits, golden.outputs["logits"]) <= (TOLERANCE if layout == "vjepa2" else 1e-3)
    save_attentive_probe(tmp_path / "ours.safetensors", params, layout)
    again, same_params = load_attentive_probe(tmp_path / "ours.safetensors")
    assert again == probe
    jax.tree.map(np.testing.assert_array_equal, same_params, params)
    back = attentive_probe_tensors(params, layout)
    expected = {name: tensor for name, tensor in tensors.items() if not name.startswith("vjepa2.")}
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_a_directory_tells_heads_and_epsilon_in_its_config(golden, tmp_path):
    save_file(_transformers_tensors(golden.weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8, "layer_norm_eps": 1e-3}))
    probe, _ = load_attentive_probe(tmp_path)
    assert (probe.heads, probe.norm_epsilon) == (8, 1e-3)


def test_tensors_alone_have_the_heads_that_the_caller_names(golden, tmp_path):
    save_file(golden.weights, tmp_path / "probe.safetensors")
    assert load_attentive_probe(tmp_path / "probe.safetensors", heads=8)[0].heads == 8
    with pytest.raises(WeightsError, match="heads that divides the width 64, got 5"):
        load_attentive_probe(tmp_path / "probe.safetensors", heads=5)


def test_names_of_training_on_several_devices_are_read(golden, tmp_path):
    save_file({f"module.{name}": tensor for name, tensor in golden.weights.items()}, tmp_path / "probe.safetensors")
    probe, _ = load_attentive_probe(tmp_path / "probe.safetensors")
    assert probe.classes == 10


def test_every_tensor_that_does_not_fit_is_named_at_once(golden, tmp_path):
    tensors = dict(golden.weights)
    del tensors["pooler.blocks.1.attn.proj.bias"], tensors["pooler.cross_attention_block.norm2.weight"]
    tensors["pooler.blocks.0.mlp.fc1.weight"] = np.zeros((3, 64), np.float32)
    tensors["pooler.cross_attention_block.xattn.proj.weight"] = np.zeros((64, 64), np.float32)
    save_file(tensors, tmp_path / "probe.safetensors")
    with pytest.raises(WeightsError) as error:
        load_attentive_probe(tmp_path / "probe.safetensors")
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/probe.safetensors: 4 tensors")
    for line in (
        "missing pooler.blocks.1.attn.proj.bias [64]",
        "missing pooler.cross_attention_block.norm2.weight [64]",
        "wrong shape pooler.blocks.0.mlp.fc1.weight: expected [256, 64], got [3, 64]",
        "unexpected pooler.cross_attention_block.xattn.proj.weight [64, 64]",
    ):
        assert line in message


def test_files_that_are_no_probe_are_refused(golden, tmp_path):
    save_file({"fc.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors: expected an attentive probe.*found fc\.weight"):
        load_attentive_probe(tmp_path / "other.safetensors")
    (tmp_path / "ssv2-vitl-16x2x3.pt").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=r"ssv2-vitl-16x2x3\.pt: pickled weights are refused"):
        load_attentive_probe(tmp_path / "ssv2-vitl-16x2x3.pt")
    tensors = {name: tensor for name, tensor in golden.weights.items() if name != "pooler.query_tokens"}
    with pytest.raises(WeightsError, match=r"file: pooler\.query_tokens is missing, expected an array of 3 axes"):
        find_sizes(tensors, "vjepa2", "file")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads: expected a divisor of the tokens' width 60, got 16"):
        AttentiveProbe(classes=2, heads=16, depth=4).init(jax.random.key(0), jnp.zeros((1, 2, 60)))
