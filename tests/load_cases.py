"""Copies of a small released model, and ways to change and break them."""

import json
import shutil
import struct
from pathlib import Path

import backbone_cases as cases
import jax
import pytest
from goldens import golden_path
from safetensors.numpy import load_file, save_file

import omnistream_jax
from omnistream_jax.convert.files import WeightsError

OFFICIAL = golden_path("official_tiny_hf/io").parent


def copy_official(directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(OFFICIAL / name, directory / name)
    return directory


def rewrite(directory: Path, change) -> None:
    """Save the tensors again after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def reconfigure(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensor_bytes(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor, read without a library."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], content[start + entry["data_offsets"][0] :][: _size(entry)])
        for name, entry in header.items()
    }


def _size(entry) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


def assert_equal_models(actual, expected) -> None:
    assert actual.config == expected.config
    assert actual.family == expected.family
    assert jax.tree.structure(actual.params) == jax.tree.structure(expected.params)
    cases.assert_same_bits(actual.params, expected.params)


def error_of(path, **options) -> str:
    with pytest.raises(WeightsError) as caught:
        omnistream_jax.load(path, **options)
    return str(caught.value)


def write_shards(directory: Path) -> dict[str, str]:
    """Split model.safetensors into two shards with an index; the weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name, file in weight_map.items() if file == shard}, directory / shard)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
