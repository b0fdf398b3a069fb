"""The backbone against outputs of DINOv3 (float32, CPU): an image is a clip of one frame."""

import functools

import backbone_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error

import omnistream_jax
from omnistream_jax.convert import dinov3, layouts
from omnistream_jax.convert.initialise import initial_backbone
from omnistream_jax.convert.rules import to_tensors
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig

TOLERANCE = 2e-4


def load_case(name, tmp_path, weights_of=None):
    golden = load_golden(name)
    weights = golden.weights or load_golden(weights_of).weights
    model = omnistream_jax.load(cases.write_model(tmp_path / name, weights, golden.config), dtype="float32")
    return golden, model, cases.channels_last(golden.inputs["pixel_values"])[:, None]


def all_tokens(out):
    patches = out.patches.reshape(out.patches.shape[0], -1, out.patches.shape[-1])
    return np.concatenate([out.cls[:, 0][:, None], out.registers[:, 0], patches], axis=1)


@pytest.mark.parametrize("name", ["02a_square_dinov3_hf", "02b_nonsquare_dinov3_hf"])
def test_hugging_face_layout_matches(name, tmp_path):
    golden, model, frames = load_case(name, tmp_path, "02a_square_dinov3_hf")
    out = model.encode(frames)
    assert relative_error(all_tokens(out), golden.outputs["last_hidden_state"]) <= TOLERANCE
    assert relative_error(out.cls[:, 0], golden.outputs["pooler_output"]) <= TOLERANCE
    for i, hidden in enumerate(out.hidden):
        assert relative_error(hidden[:, 0], golden.outputs[f"layer.{i}"]) <= TOLERANCE
    masked = jax.jit(model.backbone.apply)({"params": model.params}, frames, masks=golden.inputs["bool_masked_pos"])
    assert relative_error(all_tokens(masked), golden.outputs["masked/last_hidden_state"]) <= TOLERANCE
    assert relative_error(masked.cls[:, 0], golden.outputs["masked/pooler_output"]) <= TOLERANCE


def test_original_layout_matches(tmp_path):
    golden, model, frames = load_case("02c_dinov3_meta_layout", tmp_path)
    out = model.encode(frames)
    flat = np.asarray(out.patches).reshape(golden.outputs["x_norm_patchtokens"].shape)
    assert relative_error(flat, golden.outputs["x_norm_patchtokens"]) <= TOLERANCE
    assert relative_error(out.cls[:, 0], golden.outputs["x_norm_clstoken"]) <= TOLERANCE
    assert relative_error(out.registers[:, 0], golden.outputs["x_storage_tokens"]) <= TOLERANCE


def test_the_weights_as_omnistream_answer_as_the_released_class_does():
    golden = load_golden("02c_dinov3_meta_layout")
    weights = layouts.from_tensors(golden.weights, golden.config)
    config = BackboneConfig(width=64, depth=3, heads=4, mlp_width=256, rope="released")
    backbone = Backbone(config)
    fresh = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
    params = initial_backbone(weights, config, fresh)
    frames = cases.channels_last(golden.inputs["pixel_values"])[:, None]
    out = jax.jit(functools.partial(backbone.apply, layers=()))({"params": params}, frames)
    cases.assert_fields(cases.omnistream_fields(out), golden.derived["omnistream_T1"], TOLERANCE)


@pytest.mark.parametrize("name", ["02a_square_dinov3_hf", "02b_nonsquare_dinov3_hf"])
def test_parameter_gradients_match(name, tmp_path):
    golden, model, frames = load_case(name, tmp_path, "02a_square_dinov3_hf")

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        out = model.backbone.apply({"params": params}, frames)
        patches = out.patches.reshape(out.patches.shape[0], -1, out.patches.shape[-1])
        tokens = jnp.concatenate([out.cls[:, 0][:, None], out.registers[:, 0], patches], axis=1)
        named = {"last_hidden_state": tokens, "pooler_output": out.cls[:, 0]}
        return sum(jnp.vdot(golden.cotangents[key], named[key]) for key in golden.cotangents)

    value, gradient = loss(model.params)
    assert abs(value - golden.grads["loss"]) <= 1e-4 * abs(golden.grads["loss"])
    ours = to_tensors(gradient, dinov3.rules(model.config), model.config.depth)
    for key in set(golden.grads) - {"loss"}:
        assert relative_error(ours[key], golden.grads[key]) <= 1e-3, key
    assert not np.any(ours["embeddings.mask_token"])
