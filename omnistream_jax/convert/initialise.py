"""Pre-trained weights as the start of a training run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from omnistream_jax.convert import layouts
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.models.qwen3 import Qwen3Config

# What of a training config sets a field, if anything does.
_SET_BY = {name: f" (model.{name})" for name in ("rope", "time_unit", "patch_size")}
_SET_BY |= dict.fromkeys(("width", "depth", "heads", "mlp_width", "mlp", "registers"), " (model.preset)")


def initial_backbone(weights: layouts.Weights, config: BackboneConfig, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a backbone of `config` that start from other weights.

    OmniStream's are taken as they are, and must be used with the rotary layout and time unit that they were trained
    with. DINOv3's have one version of the register tokens, no key bias and no camera
    token: the registers are copied to both versions, the key bias is zero, CAM and its embedding stay as in `fresh`.

    Args:
        weights: what `layouts.read` returned.
        config: of the backbone to train.
        fresh: randomly initialised parameters of that backbone.

    Raises:
        WeightsError: the configurations differ; all fields that do are named.
    """
    sizes = ("width", "depth", "heads", "mlp_width", "patch_size", "mlp", "registers", "rope_base", "norm_epsilon")
    if weights.family == "omnistream":
        sizes += ("rope", "time_unit")
    wrong = [
        f"{field}: {getattr(weights.config, field)}, the model has {getattr(config, field)}{_SET_BY.get(field, '')}"
        for field in sizes
        if getattr(weights.config, field) != getattr(config, field)
    ]
    if wrong:
        raise WeightsError("init.backbone does not fit the model\n  " + "\n  ".join(wrong))
    params = _filled(weights.params, fresh)
    if weights.config.token_versions < config.token_versions:
        params["register_tokens"] = np.repeat(weights.params["register_tokens"], config.token_versions, axis=0)
    if not weights.config.key_bias and config.key_bias:
        params["blocks"]["attention"]["key_bias"] = np.zeros_like(weights.params["blocks"]["attention"]["query_bias"])
    return params


def _filled(params: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """`params`, and what only `fresh` has."""
    return {
        name: (_filled(params.get(name, {}), value) if isinstance(value, Mapping) else params.get(name, value))
        for name, value in fresh.items()
    }


def check_decoder(found: Qwen3Config, config: Qwen3Config) -> None:
    """Raises WeightsError, naming all fields that differ, where weights of `found` do not fit a decoder of `config`."""
    wrong = [
        f"{field.name}: {getattr(found, field.name)}, the model has {getattr(config, field.name)}"
        for field in dataclasses.fields(Qwen3Config)
        if getattr(found, field.name) != getattr(config, field.name)
    ]
    if wrong:
        raise WeightsError("init.decoder does not fit language.decoder\n  " + "\n  ".join(wrong))


def gram_config(weights: layouts.Weights) -> BackboneConfig:
    """The configuration under which pre-trained weights serve as Gram teacher: DINOv3's without time channels."""
    rope = "dinov3_2d" if weights.family == "dinov3" else weights.config.rope
    return dataclasses.replace(weights.config, rope=rope)
