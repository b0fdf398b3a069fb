"""Parts that the layouts of several vision transformers share; `block` is the prefix of a block's tensor names."""

import numpy as np

from omnistream_jax.convert.rules import Rule, dense, same
from omnistream_jax.models.presets import BackboneConfig


def norms_and_scales(config: BackboneConfig, block: str, scale: str) -> list[Rule]:
    """`norm1`, `norm2` and the LayerScales, whose name is `scale` with the branch's number in it."""
    table = []
    for i in (1, 2):
        table += [
            same(f"blocks/norm{i}/scale", f"{block}norm{i}.weight", config.width),
            same(f"blocks/norm{i}/bias", f"{block}norm{i}.bias", config.width),
            same(f"blocks/layer_scale{i}", f"{block}{scale.replace('#', str(i))}", config.width),
        ]
    return table


def projection(config: BackboneConfig, name: str) -> list[Rule]:
    """The attention's output map."""
    ours = (config.heads, config.head_width, config.width)
    return dense("blocks/attention/projection", name, config.width, config.width, config.projection_bias, ours)


def fused_qkv_kernel(config: BackboneConfig, block: str) -> Rule:
    """`attn.qkv.weight` [3 d, d]."""
    width = config.width
    return Rule(
        (("blocks", "attention", "qkv_kernel"),),
        (block + "attn.qkv.weight",),
        ((3 * width, width),),
        lambda x: (x.T.reshape(width, 3, config.heads, config.head_width),),
        lambda x: (x.reshape(width, 3 * width).T,),
    )


def fused_qkv_bias(config: BackboneConfig, block: str) -> Rule:
    """`attn.qkv.bias` [3 d]; without a key bias on our side the key's part is dropped, and cannot be written."""
    parts = {"query": config.query_bias, "key": config.key_bias, "value": config.value_bias}

    def pack(x: np.ndarray) -> tuple[np.ndarray, ...]:
        split = x.reshape(3, config.heads, config.head_width)
        return tuple(part for part, exists in zip(split, parts.values(), strict=True) if exists)

    return Rule(
        tuple(("blocks", "attention", f"{name}_bias") for name, exists in parts.items() if exists),
        (block + "attn.qkv.bias",),
        ((3 * config.width,),),
        pack,
        (lambda *arrays: (np.stack(arrays).reshape(-1),)) if all(parts.values()) else None,
    )


def fused_mlp(config: BackboneConfig, block: str) -> list[Rule]:
    """`mlp.fc1` and `mlp.fc2`, or SwiGLU's w3(silu(w1 x) * w2 x)."""
    gelu = {"hidden": "fc1", "output": "fc2"}
    return mlp(config, block, gelu if config.mlp == "gelu" else {"gate": "w1", "hidden": "w2", "output": "w3"})


def mlp(config: BackboneConfig, block: str, names: dict[str, str]) -> list[Rule]:
    """The MLP's maps under the given names."""
    table = []
    for ours, theirs in names.items():
        inputs, outputs = config.width, config.mlp_width
        if ours == "output":
            inputs, outputs = outputs, inputs
        table += dense(f"blocks/mlp/{ours}", f"{block}mlp.{theirs}", inputs, outputs, config.mlp_bias)
    return table
