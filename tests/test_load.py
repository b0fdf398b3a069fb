"""Weights in and out: what is written is what was read, and config.json decides how."""

import dataclasses
import json
import os
from pathlib import Path

import backbone_cases as cases
import jax
import ml_dtypes
import numpy as np
import pytest
from goldens import load_golden
from load_cases import assert_equal_models, copy_official, error_of, reconfigure, rewrite, tensor_bytes
from safetensors import safe_open
from safetensors.numpy import load_file

import omnistream_jax


@pytest.fixture
def directory(tmp_path):
    """A writable copy of a small released model."""
    return copy_official(tmp_path / "weights")


# There and back.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["01b_omnistream_camera", "01h_omnistream_swiglu", "02a_square_dinov3_hf"])
def test_load_save_load_gives_equal_arrays_and_bytes(name, dtype, tmp_path):
    golden = load_golden(name)
    weights = {key: tensor.astype(getattr(ml_dtypes, dtype, dtype)) for key, tensor in golden.weights.items()}
    first = omnistream_jax.load(cases.write_model(tmp_path / "first", weights, golden.config))
    first.save(tmp_path / "second")
    assert_equal_models(omnistream_jax.load(tmp_path / "second"), first)
    written = tensor_bytes(tmp_path / "second" / "model.safetensors")
    assert written == tensor_bytes(tmp_path / "first" / "model.safetensors")
    assert {kind for kind, _, _ in written.values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("first", "second"))
    assert set(before) <= set(after)
    assert after["dtype"] == dtype


def test_every_parameter_comes_from_a_tensor_of_its_own(directory):
    """Any change of any tensor reaches the parameters, and comes back."""
    seed = iter(range(1000))

    def shuffle(tensors):
        for name, tensor in tensors.items():
            tensors[name] = np.random.default_rng(next(seed)).normal(size=tensor.shape).astype(np.float32)

    rewrite(directory, shuffle)
    model = omnistream_jax.load(directory)
    drawn = np.concatenate([tensor.ravel() for tensor in load_file(directory / "model.safetensors").values()])
    ours = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(model.params)])
    assert np.sort(ours).tobytes() == np.sort(drawn).tobytes()


def test_saving_over_the_directory_that_was_loaded(directory):
    before = tensor_bytes(directory / "model.safetensors")
    omnistream_jax.load(directory).save(directory)
    assert tensor_bytes(directory / "model.safetensors") == before
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_the_original_dinov3_layout_is_saved_as_hugging_face(tmp_path):
    golden = load_golden("02c_dinov3_meta_layout")
    original = omnistream_jax.load(cases.write_model(tmp_path / "original", golden.weights, golden.config))
    original.save(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "np") as file:
        assert "layer.0.attention.q_proj.weight" in file.keys()  # noqa: SIM118 -- not a dict
    assert_equal_models(omnistream_jax.load(tmp_path / "saved"), original)


# What config.json decides.


@pytest.mark.parametrize(
    ("name", "family_default"), [("01b_omnistream_camera", "released"), ("02a_square_dinov3_hf", "dinov3_2d")]
)
def test_rope_is_the_option_then_our_key_then_the_family(name, family_default, tmp_path):
    golden = load_golden(name)
    path = cases.write_model(tmp_path / "first", golden.weights, golden.config)
    assert omnistream_jax.load(path).config.rope == family_default
    chosen = omnistream_jax.load(path, rope="dinov3")
    assert chosen.config.rope == "dinov3"
    chosen.save(tmp_path / "second")
    assert omnistream_jax.load(tmp_path / "second").config.rope == "dinov3"
    assert omnistream_jax.load(tmp_path / "second", rope=family_default).config.rope == family_default


def test_a_trained_model_loads_without_options_to_equal_outputs(tmp_path):
    model = cases.random_model(
        rope="dinov3", time_unit=8.0, norm_epsilon=1e-3, rope_base=50.0, mlp_width=90, registers=2
    )
    model.save(tmp_path)
    loaded = omnistream_jax.load(tmp_path)
    assert_equal_models(loaded, model)
    clip = cases.random_frames(1, 2, 16, 32)
    cases.assert_same_bits(loaded.encode(clip), model.encode(clip))
    cases.assert_same_bits(model.encode(clip, time_unit=8), model.encode(clip))


def test_a_trained_swiglu_model_loads_to_equal_parameters(tmp_path):
    model = cases.random_model(mlp="swiglu", mlp_width=90)  # a width that mlp_ratio cannot say
    model.save(tmp_path)
    assert_equal_models(omnistream_jax.load(tmp_path), model)


def test_released_classes_defaults_and_the_keys_that_are_ignored(directory):
    """layer_norm_eps and intermediate_size of an OmniStream config.json are not what its code uses."""
    reconfigure(directory, layer_norm_eps=0.5, intermediate_size=7)
    config = omnistream_jax.load(directory).config
    assert (config.norm_epsilon, config.mlp_width, config.time_unit) == (1e-5, 4 * config.width, 16.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.5),
        ("hidden_size", -64),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("video_aggregator_layer", None),
        ("patch_size", [16]),
        ("mlp_ratio", "4"),
        ("mlp_ratio", float("inf")),
        ("mlp_ratio", float("nan")),
        ("mlp_ratio", 10**400),
        ("ffn_layer", "moe"),
        ("omnistream_jax", ["rope"]),
        ("omnistream_jax", {"rope": "4d"}),
        ("omnistream_jax", {"rope": 3}),
        ("omnistream_jax", {"ropes": "dinov3"}),
        ("omnistream_jax", {"time_unit": 0}),
        ("omnistream_jax", {"rope_base": 0}),
        ("omnistream_jax", {"norm_epsilon": -1.0}),
        ("omnistream_jax", {"norm_epsilon": None}),
    ],
    ids=str,
)
def test_a_wrong_value_in_the_config_is_named(key, value, directory):
    reconfigure(directory, **{key: value})
    message = error_of(directory)
    named = {key, "heads"} | (set(value) if isinstance(value, (dict, list)) else set())
    assert "config.json" in message or str(directory) in message
    assert any(str(name) in message for name in named), message
    assert "\n" not in message


@pytest.mark.parametrize("rope", ["4d", "", 3])
def test_an_unknown_rope_is_named(rope, directory):
    assert "rope: expected one of dinov3, released, dinov3_2d" in error_of(directory, rope=rope)


def test_an_unknown_type_is_named(directory):
    with pytest.raises(ValueError, match=r"^dtype: expected"):
        omnistream_jax.load(directory, dtype="int8")


# Saving that fails.


@pytest.mark.parametrize("failing", ["save_file", "weights rename", "config text"])
def test_a_failing_save_leaves_the_old_files_whole(failing, directory, monkeypatch):
    model = omnistream_jax.load(directory)
    model = dataclasses.replace(model, params=jax.tree.map(lambda leaf: 2 * leaf, model.params))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*args, **kwargs):
        if failing == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if failing == "save_file":
        monkeypatch.setattr("omnistream_jax.utils.tensor_file.save_file", fail)
    elif failing == "weights rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(directory)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
