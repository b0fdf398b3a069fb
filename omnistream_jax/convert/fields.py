"""Typed reading of config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from omnistream_jax.convert.files import WeightsError

_LIMIT = 2**31  # no size, rate or base is larger; JSON's Infinity and NaN fall outside too


def read_field(
    source: Mapping[str, Any], key: str, kind: type, default: Any, choices: Sequence[Any] | None = None
) -> Any:
    """`source[key]` as `kind`, or the default where the key is absent; WeightsError if it is something else."""
    value = source.get(key, default)
    if kind in (int, float):
        right = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 <= value < _LIMIT
        value = kind(value) if right else value
    else:
        right = isinstance(value, kind)
    if not right:
        raise WeightsError(f"config.json: {key}: expected {kind.__name__}, got {value!r}")
    if choices is not None and value not in choices:
        raise WeightsError(f"config.json: {key}: expected one of {', '.join(map(str, choices))}, got {value!r}")
    return value
