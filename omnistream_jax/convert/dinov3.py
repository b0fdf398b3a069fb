"""DINOv3: the Hugging Face layout (read and written) and the original one (read)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from omnistream_jax.convert import vit
from omnistream_jax.convert.fields import read_field
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.rules import Rule, patch_embedding, reshape, same
from omnistream_jax.models.presets import BackboneConfig

MARKER = "layer.0.attention.q_proj.weight"
ORIGINAL_MARKER = "blocks.0.attn.qkv.weight"

# The original layout also stores its rotary periods, and a mask over the biases that only says "no key bias".
ORIGINAL_IGNORED = ("rope_embed.periods", "blocks.{}.attn.qkv.bias_mask")


def read_config(source: Mapping[str, Any]) -> BackboneConfig:
    """The configuration that config.json describes; absent keys take the defaults of `DINOv3ViTConfig`."""
    if read_field(source, "hidden_act", str, "gelu") not in ("gelu", "silu"):
        raise WeightsError(f"config.json: hidden_act: expected gelu or silu, got {source['hidden_act']!r}")
    gated = read_field(source, "use_gated_mlp", bool, False)
    if gated != (source.get("hidden_act", "gelu") == "silu"):
        raise WeightsError("config.json: hidden_act silu goes with use_gated_mlp, and gelu without it")
    rope = source.get("rope_parameters") or source  # transformers 5 moved rope_theta there
    return BackboneConfig(
        width=read_field(source, "hidden_size", int, 384),
        depth=read_field(source, "num_hidden_layers", int, 12),
        heads=read_field(source, "num_attention_heads", int, 6),
        mlp_width=read_field(source, "intermediate_size", int, 1536),
        patch_size=read_field(source, "patch_size", int, 16),
        mlp="swiglu" if gated else "gelu",
        norm_epsilon=read_field(source, "layer_norm_eps", float, 1e-5),
        rope="dinov3_2d",
        rope_base=read_field(rope, "rope_theta", float, 100.0),
        registers=read_field(source, "num_register_tokens", int, 0),
        token_versions=1,
        camera=False,
        query_bias=read_field(source, "query_bias", bool, True),
        key_bias=read_field(source, "key_bias", bool, False),
        value_bias=read_field(source, "value_bias", bool, True),
        projection_bias=read_field(source, "proj_bias", bool, True),
        mlp_bias=read_field(source, "mlp_bias", bool, True),
    )


def write_config(config: BackboneConfig) -> dict[str, Any]:
    """The keys of config.json that `DINOv3ViTConfig` reads."""
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch_size,
        "hidden_act": "silu" if config.mlp == "swiglu" else "gelu",
        "use_gated_mlp": config.mlp == "swiglu",
        "layer_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "num_register_tokens": config.registers,
        "query_bias": config.query_bias,
        "key_bias": config.key_bias,
        "value_bias": config.value_bias,
        "proj_bias": config.projection_bias,
        "mlp_bias": config.mlp_bias,
    }


def rules(config: BackboneConfig) -> list[Rule]:
    """How the Hugging Face tensors correspond to our parameters."""
    width, block, embeddings = config.width, "layer.{}.", "embeddings."
    mlp_names = {"hidden": "up_proj", "output": "down_proj"}
    if config.mlp == "swiglu":
        mlp_names["gate"] = "gate_proj"
    return [
        *patch_embedding(embeddings + "patch_embeddings", config.patch_size, width),
        reshape("cls_token", embeddings + "cls_token", (1, 1, width), (width,)),
        reshape("mask_token", embeddings + "mask_token", (1, 1, width), (width,)),
        same("register_tokens", embeddings + "register_tokens", 1, config.registers, width),
        same("norm/scale", "norm.weight", width),
        same("norm/bias", "norm.bias", width),
        *_separate_qkv(config, block),
        *vit.projection(config, block + "attention.o_proj"),
        *vit.norms_and_scales(config, block, "layer_scale#.lambda1"),
        *vit.mlp(config, block, mlp_names),
    ]


def _separate_qkv(config: BackboneConfig, block: str) -> list[Rule]:
    width, heads, head_width = config.width, config.heads, config.head_width
    kernel = Rule(
        (("blocks", "attention", "qkv_kernel"),),
        tuple(f"{block}attention.{name}_proj.weight" for name in "qkv"),
        ((width, width),) * 3,
        lambda *parts: (np.stack([x.T for x in parts], axis=1).reshape(width, 3, heads, head_width),),
        lambda x: tuple(x.reshape(width, 3, width)[:, i].T for i in range(3)),
    )
    biases = [
        reshape(
            f"blocks/attention/{name}_bias",
            f"{block}attention.{name[0]}_proj.bias",
            (width,),
            (heads, head_width),
        )
        for name in ("query", "key", "value")
        if getattr(config, f"{name}_bias")
    ]
    return [kernel, *biases]


def original_rules(config: BackboneConfig) -> list[Rule]:
    """How the tensors of the original layout (`storage_tokens`, fused `qkv`) become our parameters.

    The key's part of `qkv.bias` is masked to zero there and may hold anything; it is dropped.
    """
    width, block = config.width, "blocks.{}."
    if config.key_bias or not (config.query_bias and config.value_bias):
        raise WeightsError("config.json: the original DINOv3 layout has query and value biases and no key bias")
    return [
        *patch_embedding("patch_embed.proj", config.patch_size, width),
        reshape("cls_token", "cls_token", (1, 1, width), (width,)),
        reshape("mask_token", "mask_token", (1, width), (width,)),
        same("register_tokens", "storage_tokens", 1, config.registers, width),
        same("norm/scale", "norm.weight", width),
        same("norm/bias", "norm.bias", width),
        vit.fused_qkv_kernel(config, block),
        vit.fused_qkv_bias(config, block),
        *vit.projection(config, block + "attn.proj"),
        *vit.norms_and_scales(config, block, "ls#.gamma"),
        *vit.fused_mlp(config, block),
    ]
