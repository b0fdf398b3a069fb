"""Qwen3 in the Hugging Face layout <-> ours: files, shards, types, and what errors say."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from goldens import load_golden
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.qwen3 import load_decoder, save_decoder
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config, init_decoder
from omnistream_jax.utils.trees import named_leaves

GOLDEN = load_golden("03_qwen3")
TENSORS = GOLDEN.weights
SIZES = Qwen3Config(
    vocabulary_size=256, width=64, depth=3, heads=4, kv_heads=2, head_width=32, hidden=96, max_length=512
)


def write(directory, tensors=TENSORS, **changes):
    """A directory as the hub has it; None removes a key of config.json."""
    directory.mkdir(exist_ok=True)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **GOLDEN.config, **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(dict(tensors), directory / "model.safetensors")
    return directory


def write_shards(directory, count=3):
    write(directory)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        shard = {name: TENSORS[name] for name in sorted(TENSORS)[number::count]}
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def assert_same_leaves(actual, expected):
    actual, expected = named_leaves(actual), named_leaves(expected)
    assert actual.keys() == expected.keys()
    for name, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_the_parameters_are_those_of_the_module(tmp_path):
    config, params = load_decoder(write(tmp_path / "model"))
    assert config == SIZES
    expected = jax.eval_shape(lambda: init_decoder(Qwen3(config), jax.random.key(0)))
    shapes = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in named_leaves(params).items()}
    assert shapes == {name: (leaf.shape, leaf.dtype) for name, leaf in named_leaves(expected).items()}


def test_shards_hold_what_one_file_holds(tmp_path):
    one, shards = load_decoder(write(tmp_path / "one")), load_decoder(write_shards(tmp_path / "shards"))
    assert one[0] == shards[0]
    assert_same_leaves(one[1], shards[1])


def test_what_is_saved_is_what_was_loaded(tmp_path):
    config, params = load_decoder(write(tmp_path / "theirs"))
    save_decoder(tmp_path / "ours", config, params)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == TENSORS.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor, TENSORS[name], err_msg=name)
    again = load_decoder(tmp_path / "ours")
    assert again[0] == config
    assert_same_leaves(again[1], params)


def test_an_untied_decoder_goes_both_ways(tmp_path):
    tensors = {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"][::-1].copy()}
    config, params = load_decoder(write(tmp_path / "theirs", tensors, tie_word_embeddings=False))
    assert not config.tied
    np.testing.assert_array_equal(params["output"], tensors["lm_head.weight"])
    save_decoder(tmp_path / "ours", config, params)
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == tensors.keys()
    assert load_decoder(tmp_path / "ours")[0] == config


def test_bfloat16_is_read_and_written(tmp_path):
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in TENSORS.items()}
    config, params = load_decoder(write(tmp_path / "theirs", half))
    expected = half["model.embed_tokens.weight"].astype(np.float32)
    assert params["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["embedding"], expected)
    save_decoder(tmp_path / "ours", config, params, dtype="bfloat16")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_leaves(load_decoder(tmp_path / "ours")[1], params)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        save_decoder(tmp_path / "ours", config, params, dtype="int8")


def test_transformers_reads_the_saved_configuration(tmp_path):
    config = dataclasses.replace(SIZES, rope_theta=5e5, norm_eps=1e-5, max_length=2048)
    params = jax.tree.map(np.asarray, jax.jit(lambda: init_decoder(Qwen3(config), jax.random.key(0)))())
    save_decoder(tmp_path, config, params)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3Config"
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta}  # transformers 5, or 4
    assert rope["rope_theta"] == 5e5
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.head_dim, theirs.vocab_size) == (64, 3, 32, 256)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.intermediate_size) == (4, 2, 96)
    assert (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.attention_bias) == (1e-5, True, False)
    assert theirs.max_position_embeddings == 2048
    # What their class writes in turn is read here.
    theirs.architectures = ["Qwen3ForCausalLM"]
    theirs.save_pretrained(tmp_path)
    assert load_decoder(tmp_path)[0] == config


def test_a_tied_copy_of_the_embedding_is_ignored_unless_it_differs(tmp_path):
    """The published Qwen3-0.6B stores one."""
    copy = {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"]}
    assert "output" not in load_decoder(write(tmp_path / "copy", copy))[1]
    other = {**copy, "lm_head.weight": copy["lm_head.weight"] + 1}
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_decoder(write(tmp_path / "other", other))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0),
        ({"rope_theta": 7, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({"rope_theta": None}, 10_000.0),  # their class's default
    ],
)
def test_the_base_of_the_rotation_is_found_where_either_version_puts_it(tmp_path, changes, expected):
    assert load_decoder(write(tmp_path, **changes))[0].rope_theta == expected


def test_keys_and_values_have_as_many_heads_as_queries_where_null_says_so(tmp_path):
    """As their class reads it; an absent key means its default, 32."""
    config = dataclasses.replace(SIZES, kv_heads=4)
    params = jax.tree.map(np.asarray, jax.jit(lambda: init_decoder(Qwen3(config), jax.random.key(0)))())
    save_decoder(tmp_path, config, params)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_key_value_heads": None}))
    assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 4
    assert load_decoder(tmp_path)[0] == config


@pytest.mark.parametrize(("written", "expected"), [(4096, 4096), (None, 32_768)])
def test_rows_are_as_long_as_the_configuration_says(tmp_path, written, expected):
    """32,768 is their class's default."""
    assert load_decoder(write(tmp_path, max_position_embeddings=written))[0].max_length == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: expected rope_type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling: expected rope_type 'default'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters: expected rope_type"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta: 1000000.0 here, other than in rope_parameters"),
        ({"use_sliding_window": True}, "use_sliding_window: expected false, since it is not computed here"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types: expected 'full_"),
        ({"attention_bias": True}, "attention_bias: expected false, since it is not computed here"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"model_type": "qwen2"}, "model_type: expected 'qwen3', got 'qwen2'"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, r"architectures: expected \['Qwen3ForCausalLM'\]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: expected weights that are not"),
        ({"hidden_size": "64"}, "hidden_size: expected int, got '64'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected bool, got 1"),
        ({"num_key_value_heads": 3}, "heads: 4 query heads do not share 3 key-value heads evenly"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=f"config.json: .*{message}"):
        load_decoder(write(tmp_path, **changes))


def test_all_refusals_come_in_one_error(tmp_path):
    with pytest.raises(WeightsError, match=r"attention_bias.*use_sliding_window.*hidden_size") as caught:
        load_decoder(write(tmp_path, attention_bias=True, use_sliding_window=True, hidden_size=[]))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_all_tensors_that_do_not_fit_come_in_one_error(tmp_path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "model.norm.weight"}
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((95, 64), np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((256, 64), np.int32)
    with pytest.raises(WeightsError) as caught:
        load_decoder(write(tmp_path, tensors))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'model.safetensors'}: 4 tensors do not fit the configuration"
    assert sorted(line.strip() for line in lines[1:]) == [
        "missing model.norm.weight [64]",
        "unexpected model.layers.3.mlp.up_proj.weight [96, 64]",
        "wrong shape model.layers.1.mlp.up_proj.weight: expected [96, 64], got [95, 64]",
        "wrong type model.embed_tokens.weight: expected floats, got int32",
    ]


def test_weights_of_another_size_name_the_file(tmp_path):
    path = write_shards(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    # All 35 but the norms of queries and keys, which are as wide as a head.
    with pytest.raises(WeightsError, match=r"model.safetensors.index.json: 29 tensors do not fit the"):
        load_decoder(path)


def test_missing_and_broken_files_name_themselves(tmp_path):
    with pytest.raises(WeightsError, match="no-such-folder: no such directory"):
        load_decoder(tmp_path / "no-such-folder")
    path = write_shards(tmp_path / "shards")
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00003.safetensors: no such file"):
        load_decoder(path)
    path = write(tmp_path / "cut")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"model.safetensors: not a whole safetensors file"):
        load_decoder(path)


def test_parameters_of_another_size_are_not_saved(tmp_path):
    config, params = load_decoder(write(tmp_path / "theirs"))
    params["blocks"]["down"]["kernel"] = params["blocks"]["down"]["kernel"][:, :-1]
    params["output"] = params["embedding"]
    with pytest.raises(WeightsError, match=r"unexpected output; wrong shape blocks/down/kernel: expected \[3, 96"):
        save_decoder(tmp_path / "ours", config, params)
    assert not (tmp_path / "ours").exists()
