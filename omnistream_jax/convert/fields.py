"""Typed reading of config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from omnistream_jax.convert.files import WeightsError


def read_field(
    source: Mapping[str, Any], key: str, kind: type, default: Any, choices: Sequence[Any] | None = None
) -> Any:
    """`source[key]` as `kind`, or the default where the key is absent; WeightsError if it is something else."""
    value = source.get(key, default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if right and kind in (int, float) and not value >= 0:
        right = False
    if not right:
        raise WeightsError(f"config.json: {key}: expected {kind.__name__}, got {value!r}")
    if choices is not None and value not in choices:
        raise WeightsError(f"config.json: {key}: expected one of {', '.join(map(str, choices))}, got {value!r}")
    return value
