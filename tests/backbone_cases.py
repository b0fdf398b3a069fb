"""Turns backbone goldens into directories that `omnistream_jax.load` reads, and compares outputs field by field."""

import json
from pathlib import Path

import numpy as np
from goldens import Golden, relative_error
from safetensors.numpy import save_file


def write_model(directory: Path, weights: dict[str, np.ndarray], config: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def channels_last(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels, -3, -1)


def omnistream_fields(out) -> dict[str, np.ndarray]:
    """Our output under the released model's names."""
    patches = np.asarray(out.patches)
    fields = {
        "last_hidden_state": patches.reshape(*patches.shape[:2], -1, patches.shape[-1]),
        "pooler_output": out.cls,
        "register_tokens": out.registers,
    }
    if out.camera is not None:
        fields["camera_token"] = out.camera
    return fields | {f"hidden_states.{i}": hidden for i, hidden in enumerate(out.hidden)}


def assert_fields(fields: dict, expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Every field that the golden has of the same pass (other passes stand under "prefix/name")."""
    names = [name for name in expected if "/" not in name and "_total_length_" not in name]
    assert names
    errors = {name: relative_error(fields[name], expected[name]) for name in names}
    assert max(errors.values()) <= tolerance, errors
