"""The layouts that can be read and written, told apart by their tensors' names."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from omnistream_jax.convert import dinov3, files, omnistream
from omnistream_jax.convert.fields import read_field
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.rules import Rule, check_names, to_params, to_tensors
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.ops.rope import ROPE_LAYOUTS

# What config.json cannot say in its family's own words stands under this key.
_OUR_KEY = "omnistream_jax"
_OUR_FIELDS = {
    "rope": str,
    "rope_base": float,
    "time_unit": float,
    "norm_epsilon": float,
    "mlp_width": int,
    "registers": int,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming a backbone's tensors.

    Attributes:
        family: "omnistream" or "dinov3".
        marker: a tensor that tells the layout from the others.
        read_config: config.json -> BackboneConfig.
        rules: BackboneConfig -> rules.
        write_config: BackboneConfig -> the keys of config.json.
        ignored: foreign tensors that hold no parameter.
    """

    family: str
    marker: str
    read_config: Callable[[Mapping[str, Any]], BackboneConfig]
    rules: Callable[[BackboneConfig], Sequence[Rule]]
    write_config: Callable[[BackboneConfig], dict[str, Any]]
    ignored: tuple[str, ...] = ()


_OMNISTREAM = Layout("omnistream", omnistream.MARKER, omnistream.read_config, omnistream.rules, omnistream.write_config)
_DINOV3 = Layout("dinov3", dinov3.MARKER, dinov3.read_config, dinov3.rules, dinov3.write_config)
_DINOV3_ORIGINAL = Layout(
    "dinov3",
    dinov3.ORIGINAL_MARKER,
    dinov3.read_config,
    dinov3.original_rules,
    dinov3.write_config,
    dinov3.ORIGINAL_IGNORED,
)
_LAYOUTS = (_OMNISTREAM, _DINOV3, _DINOV3_ORIGINAL)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a directory holds: configuration, parameters (NumPy, float32), and how to write it back."""

    config: BackboneConfig
    params: dict[str, Any]
    family: str
    source: dict[str, Any]
    storage_dtype: str


def read(path: str | os.PathLike, rope: str | None = None) -> Weights:
    """Read a directory or hub repository; `rope` overrides the layout of the rotary channels.

    Raises:
        WeightsError: one error that names the file, and every tensor that is missing, unexpected or of another shape.
    """
    directory = files.find_directory(path)
    source = files.read_json(directory / files.CONFIG_NAME)
    tensors = files.read_tensors(directory)
    return from_tensors(tensors, source, rope=rope, name=str(directory))


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    source: Mapping[str, Any],
    *,
    rope: str | None = None,
    name: str = "weights",
) -> Weights:
    """As `read`, from tensors and the content of config.json; `name` is what errors call them."""
    layout = _find_layout(tensors, source, name)
    try:
        config = _with_our_fields(layout.read_config(source), source)
        config = dataclasses.replace(config, rope=rope) if rope is not None else config
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from error
    rules = layout.rules(config)
    check_names(name, tensors, rules, config.depth, layout.ignored)
    kinds = {tensor.dtype.name for tensor in tensors.values()}
    return Weights(
        config=config,
        params=to_params(tensors, rules, config.depth),
        family=layout.family,
        source=dict(source),
        storage_dtype=kinds.pop() if len(kinds) == 1 else "float32",
    )


def save(
    directory: str | os.PathLike,
    params: Mapping[str, Any],
    config: BackboneConfig,
    *,
    family: str,
    source: Mapping[str, Any],
    storage_dtype: str = "float32",
) -> None:
    """Write parameters in the family's released layout, with what only we know under our own key of config.json."""
    layout = {"omnistream": _OMNISTREAM, "dinov3": _DINOV3}[family]
    tensors = to_tensors(params, layout.rules(config), config.depth)
    dtype = np.dtype(getattr(ml_dtypes, storage_dtype, storage_dtype))
    ours = {field: kind(getattr(config, field)) for field, kind in _OUR_FIELDS.items()}
    content = {**source, **layout.write_config(config), "dtype": storage_dtype, _OUR_KEY: ours}
    files.write_directory(directory, content, {name: tensor.astype(dtype) for name, tensor in tensors.items()})


def _find_layout(tensors: Mapping[str, np.ndarray], source: Mapping[str, Any], name: str) -> Layout:
    for layout in _LAYOUTS:
        if layout.marker in tensors:
            return layout
    # No marker: the configuration may still say whose weights these should be, and then all mismatches are listed.
    if "video_aggregator_layer" in source or source.get("model_type") == "vfm":
        return _OMNISTREAM
    if source.get("model_type") == "dinov3_vit":
        return _DINOV3
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise WeightsError(
        f"{name}: neither OmniStream's nor DINOv3's weights: expected a tensor {omnistream.MARKER}, {dinov3.MARKER} or "
        f"{dinov3.ORIGINAL_MARKER}; found {len(tensors)} others ({some}, ...)"
    )


def _with_our_fields(config: BackboneConfig, source: Mapping[str, Any]) -> BackboneConfig:
    ours = source.get(_OUR_KEY, {})
    if not isinstance(ours, Mapping):
        raise WeightsError(f"config.json: {_OUR_KEY}: expected an object, got {ours!r}")
    unknown = sorted(set(ours) - set(_OUR_FIELDS))
    if unknown:
        raise WeightsError(f"config.json: {_OUR_KEY}: unknown keys {unknown}; known are {', '.join(_OUR_FIELDS)}")
    choices = {"rope": ROPE_LAYOUTS}
    changes = {field: read_field(ours, field, _OUR_FIELDS[field], None, choices.get(field)) for field in ours}
    return dataclasses.replace(config, **changes)
