"""The released OmniStream layout: names, shapes and config.json of `OmnistreamMultiFrameTransformer`."""

from collections.abc import Mapping
from typing import Any

from omnistream_jax.convert import vit
from omnistream_jax.convert.fields import read_field
from omnistream_jax.convert.rules import Rule, patch_embedding, reshape, same
from omnistream_jax.models.presets import BackboneConfig

_PREFIX = "patch_embed."
MARKER = _PREFIX + "blocks.0.attn.qkv.weight"  # a tensor that only this layout has


def read_config(source: Mapping[str, Any]) -> BackboneConfig:
    """The configuration that config.json describes; absent keys take the released class's defaults."""
    width = read_field(source, "hidden_size", int, 1024)
    ratio = read_field(source, "mlp_ratio", float, 4.0)
    ffn = read_field(source, "ffn_layer", str, "mlp", choices=("mlp", "swiglu"))
    if ffn == "swiglu":
        mlp_width = -(-int(ratio * width * 2 / 3) // 8) * 8
    else:
        mlp_width = int(width * ratio)
    return BackboneConfig(
        width=width,
        depth=read_field(source, "video_aggregator_layer", int, 6),
        heads=read_field(source, "num_attention_heads", int, 12),
        patch_size=read_field(source, "patch_size", int, 16),
        mlp_width=mlp_width,
        mlp="gelu" if ffn == "mlp" else "swiglu",
        rope="released",
    )


def write_config(config: BackboneConfig) -> dict[str, Any]:
    """The keys of config.json that the released class reads."""
    ratio = config.mlp_width / config.width
    return {
        "architectures": ["OmnistreamMultiFrameTransformer"],
        "model_type": "vfm",
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "video_aggregator_layer": config.depth,
        "ffn_layer": "mlp" if config.mlp == "gelu" else "swiglu",
        "mlp_ratio": ratio if config.mlp == "gelu" else ratio * 3 / 2,
    }


def rules(config: BackboneConfig) -> list[Rule]:
    """How the released tensors correspond to our parameters."""
    width, registers = config.width, config.registers
    block = _PREFIX + "blocks.{}."
    return [
        *patch_embedding(_PREFIX + "patch_embed.proj", config.patch_size, width),
        reshape("cls_token", _PREFIX + "cls_token", (1, 1, width), (width,)),
        reshape("mask_token", _PREFIX + "mask_token", (1, width), (width,)),
        reshape("register_tokens", _PREFIX + "register_token", (1, 2, registers, width), (2, registers, width)),
        reshape("camera_tokens", _PREFIX + "camera_token", (1, 2, 1, width), (2, width)),
        reshape("aspect_kernel", _PREFIX + "ar_embedder.weight", (width, 1), (width,)),
        same("aspect_bias", _PREFIX + "ar_embedder.bias", width),
        same("norm/scale", _PREFIX + "post_layernorm.weight", width),
        same("norm/bias", _PREFIX + "post_layernorm.bias", width),
        vit.fused_qkv_kernel(config, block),
        vit.fused_qkv_bias(config, block),
        *vit.projection(config, block + "attn.proj"),
        *vit.norms_and_scales(config, block, "ls#.gamma"),
        *vit.fused_mlp(config, block),
    ]
