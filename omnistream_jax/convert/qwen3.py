"""Qwen3's weights as `transformers` names them (`Qwen3ForCausalLM`), read and written: models/qwen3.py is ours."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from omnistream_jax.convert import files
from omnistream_jax.convert.fields import read_field
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.rules import Rule, check_names, dense, same, to_params, to_tensors
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config, init_decoder
from omnistream_jax.utils.trees import named_leaves

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Their key, our field, and the default of their class, which counts where the key is absent.
_FIELDS = (
    ("vocab_size", "vocabulary_size", 151_936),
    ("hidden_size", "width", 4096),
    ("num_hidden_layers", "depth", 32),
    ("num_attention_heads", "heads", 32),
    ("num_key_value_heads", "kv_heads", 32),
    ("head_dim", "head_width", 128),
    ("intermediate_size", "hidden", 22_016),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("tie_word_embeddings", "tied", False),
    ("max_position_embeddings", "max_length", 32_768),
)
_STORAGE = ("float32", "bfloat16", "float16")


def load_decoder(directory: str | os.PathLike) -> tuple[Qwen3Config, dict[str, Any]]:
    """Read a directory or hub repository: config.json, and one safetensors file or shards with their index.

    Returns:
        The configuration and the parameters of `Qwen3`: NumPy arrays, float32 whatever the files hold.

    Raises:
        WeightsError: one error that names the file and all in it that is missing, unexpected, of another shape, or
            not computed here (scaled rotations, sliding windows, biases in attention).
    """
    directory = files.find_directory(directory)
    config = _read_config(directory / files.CONFIG_NAME)
    tensors = files.read_tensors(directory)
    single = directory / files.WEIGHTS_NAME
    source = str(single if single.exists() else directory / files.INDEX_NAME)
    rules = _rules(config)
    check_names(source, tensors, rules, config.depth, [_OUTPUT] if config.tied else [])
    if config.tied and _OUTPUT in tensors and not np.array_equal(tensors[_OUTPUT], tensors[_EMBEDDING]):
        raise WeightsError(f"{source}: {_OUTPUT} differs from {_EMBEDDING}, but tie_word_embeddings says they are one")
    return config, to_params(tensors, rules, config.depth)


def save_decoder(
    directory: str | os.PathLike, config: Qwen3Config, params: Mapping[str, Any], *, dtype: str = "float32"
) -> None:
    """Write config.json and model.safetensors, which `transformers` loads as Qwen3ForCausalLM.

    WeightsError where the parameters do not fit the configuration; then nothing is written.

    Args:
        directory: made if it is not there; each file is written aside and renamed.
        config, params: of a `Qwen3`.
        dtype: of the tensors in the file: float32, bfloat16 or float16.
    """
    if dtype not in _STORAGE:
        raise ValueError(f"dtype: expected one of {', '.join(_STORAGE)}, got {dtype!r}")
    _check_params(config, params)
    storage = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = to_tensors(params, _rules(config), config.depth)
    tensors = {name: tensor.astype(storage, copy=False) for name, tensor in tensors.items()}
    files.write_directory(directory, {**_write_config(config), "dtype": dtype, "torch_dtype": dtype}, tensors)


def _read_config(path: Path) -> Qwen3Config:
    content = files.read_json(path)
    source = {key: value for key, value in content.items() if value is not None}
    if "num_key_value_heads" in content and "num_key_value_heads" not in source and "num_attention_heads" in source:
        source["num_key_value_heads"] = source["num_attention_heads"]  # what null stands for there
    problems = _refusals(source)
    values: dict[str, Any] = {}
    for key, field, default in _FIELDS:
        try:
            values[field] = read_field(source, key, type(default), default)
        except WeightsError as error:
            problems.append(str(error).removeprefix("config.json: "))
    try:
        values["rope_theta"] = _rope_theta(source)
    except WeightsError as error:
        problems.append(str(error).removeprefix("config.json: "))
    if not problems:
        try:
            return Qwen3Config(**values)
        except ValueError as error:
            problems.append(str(error))
    raise WeightsError(f"{path}: " + "; ".join(problems))


def _refusals(source: Mapping[str, Any]) -> list[str]:
    """What the configuration asks for and models/qwen3.py does not compute."""
    problems = []
    if source.get("model_type", "qwen3") != "qwen3":
        problems.append(f"model_type: expected 'qwen3', got {source['model_type']!r}")
    if source.get("architectures", ["Qwen3ForCausalLM"]) != ["Qwen3ForCausalLM"]:
        problems.append(f"architectures: expected ['Qwen3ForCausalLM'], got {source['architectures']!r}")
    if source.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act: expected 'silu', got {source['hidden_act']!r}")
    for key in ("attention_bias", "use_sliding_window"):
        if source.get(key, False) is not False:
            problems.append(f"{key}: expected false, since it is not computed here; got {source[key]!r}")
    layers = source.get("layer_types", [])
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        problems.append(f"layer_types: expected 'full_attention' in every layer, got {layers!r}")
    for key in ("rope_scaling", "rope_parameters"):
        rope = source.get(key, {})
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            problems.append(f"{key}: expected rope_type 'default', since no other is computed here; got {rope!r}")
    if "quantization_config" in source:
        problems.append("quantization_config: expected weights that are not quantised")
    return problems


def _rope_theta(source: Mapping[str, Any]) -> float:
    """Named at the top (transformers 4) or under rope_parameters (5); 10,000 where it is in neither place."""
    nested = source.get("rope_parameters", {})
    places = [place for place in (source, nested) if isinstance(place, dict) and "rope_theta" in place]
    values = {read_field(place, "rope_theta", float, None) for place in places} or {10_000.0}
    if len(values) > 1:
        raise WeightsError(f"config.json: rope_theta: {source['rope_theta']} here, other than in rope_parameters")
    return values.pop()


def _write_config(config: Qwen3Config) -> dict[str, Any]:
    content = {key: type(default)(getattr(config, field)) for key, field, default in _FIELDS}
    theta = float(config.rope_theta)
    return {
        **content,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        # What transformers 4 and 5 read.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _check_params(config: Qwen3Config, params: Mapping[str, Any]) -> None:
    model = Qwen3(config)
    expected = named_leaves(jax.eval_shape(lambda: init_decoder(model, jax.random.key(0))))
    got = named_leaves(dict(params))
    problems = [f"missing {name}" for name in sorted(expected.keys() - got.keys())]
    problems += [f"unexpected {name}" for name in sorted(got.keys() - expected.keys())]
    problems += [
        f"wrong shape {name}: expected {list(leaf.shape)}, got {list(got[name].shape)}"
        for name, leaf in expected.items()
        if name in got and got[name].shape != leaf.shape
    ]
    if problems:
        raise WeightsError("parameters that do not fit the configuration: " + "; ".join(problems))


def _rules(config: Qwen3Config) -> list[Rule]:
    """How their tensors correspond to our parameters."""
    width, queries, keys = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    query_shape, key_shape = (config.heads, config.head_width), (config.kv_heads, config.head_width)
    layer = "model.layers.{}."

    def kernel(ours: str, theirs: str, inputs: int, outputs: int, shape: tuple[int, ...] | None = None) -> list[Rule]:
        return dense(f"blocks/{ours}", layer + theirs, inputs, outputs, bias=False, ours=shape)

    def norm(ours: str, theirs: str, size: int) -> Rule:
        return same(f"blocks/{ours}/scale", f"{layer}{theirs}.weight", size)

    return [
        same("embedding", _EMBEDDING, config.vocabulary_size, width),
        *([] if config.tied else [same("output", _OUTPUT, config.vocabulary_size, width)]),
        same("norm/scale", "model.norm.weight", width),
        norm("attention_norm", "input_layernorm", width),
        norm("mlp_norm", "post_attention_layernorm", width),
        norm("query_norm", "self_attn.q_norm", config.head_width),
        norm("key_norm", "self_attn.k_norm", config.head_width),
        *kernel("query", "self_attn.q_proj", width, queries, (width, *query_shape)),
        *kernel("key", "self_attn.k_proj", width, keys, (width, *key_shape)),
        *kernel("value", "self_attn.v_proj", width, keys, (width, *key_shape)),
        *kernel("projection", "self_attn.o_proj", queries, width, (*query_shape, width)),
        *kernel("gate", "mlp.gate_proj", width, config.hidden),
        *kernel("up", "mlp.up_proj", width, config.hidden),
        *kernel("down", "mlp.down_proj", config.hidden, width),
    ]
