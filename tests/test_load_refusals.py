"""Directories that hold no whole model of ours: every one gets one clear error."""

import json
import os
import pickle
import struct
from pathlib import Path

import backbone_cases as cases
import numpy as np
import pytest
from goldens import load_golden
from load_cases import assert_equal_models, copy_official, error_of, reconfigure, rewrite, tensor_bytes, write_index
from safetensors.numpy import save_file

import omnistream_jax

BLOCK = "patch_embed.blocks.0."


@pytest.fixture
def directory(tmp_path):
    """A writable copy of a small released model."""
    return copy_official(tmp_path / "weights")


# Directories that are none.


def test_a_missing_directory_is_named(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such directory"
    assert error_of("./nowhere") == "nowhere: no such directory"


def test_a_hub_id_without_a_network_is_one_error(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error_of("nobody-of-this-name/nothing")
    assert message.startswith("nobody-of-this-name/nothing: neither a local directory nor a hub repository")
    assert "\n" not in message


def test_a_hub_snapshot_is_loaded_without_pickles(monkeypatch, directory):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_equal_models(omnistream_jax.load("somebody/something"), omnistream_jax.load(directory))
    assert asked == {"somebody/something": ["*.json", "*.safetensors"]}


def test_a_file_is_not_a_directory(directory):
    assert "expected a directory with config.json" in error_of(directory / "model.safetensors")


def test_a_missing_config_is_named(directory):
    (directory / "config.json").unlink()
    assert error_of(directory) == f"{directory / 'config.json'}: no such file"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"text"', "\x00", "[" * 100_000, b"\xff\xfe{}"], ids=range(8))
def test_a_config_that_is_no_json_object_is_named(text, directory):
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert error_of(directory).startswith(f"{directory / 'config.json'}: ")


def test_missing_weights_are_named(directory):
    (directory / "model.safetensors").unlink()
    assert (
        error_of(directory) == f"{directory}: expected model.safetensors or model.safetensors.index.json, found neither"
    )


# Files that are broken.


@pytest.mark.parametrize("cut", [0, 4, 8, 9, 200, "header", "header + 1", "half", "end - 1"])
def test_a_truncated_file_is_named(cut, directory):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    named = {"header": header, "header + 1": header + 1, "half": len(content) // 2, "end - 1": len(content) - 1}
    path.write_bytes(content[: named.get(cut, cut)])
    assert error_of(directory).startswith(f"{path}: not a whole safetensors file")


def corrupt(header: bytes, data: bytes) -> dict[str, bytes]:
    size = struct.pack("<Q", len(header))
    middle = len(header) // 2
    return {
        "trailing bytes": size + header + data + b"more",
        "no JSON": size + b"\x00" * len(header) + data,
        "no UTF-8": size + header[:middle] + b"\xff\xfe" + header[middle + 2 :] + data,
        "a bracket lost": size + header.replace(b"[", b" ", 1) + data,
        "an unknown type": size + header.replace(b'"F32"', b'"F3x"', 1) + data,
        "another type": size + header.replace(b'"F32"', b'"F64"', 1) + data,
        "a size too large": struct.pack("<Q", 2**63) + header + data,
        "a size beyond the end": struct.pack("<Q", len(header) + len(data) + 1) + header + data,
        "a size too small": struct.pack("<Q", len(header) - 5) + header + data,
        "a list": struct.pack("<Q", 2) + b"[]" + data,
        "a pickle": pickle.dumps({"state_dict": [1.0]}),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


@pytest.mark.parametrize("kind", list(corrupt(b"{      }", b"")))
def test_a_corrupt_file_is_named(kind, directory):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(corrupt(content[8:start], content[start:])[kind])
    message = error_of(directory)
    assert message.startswith(f"{path}: not a whole safetensors file")
    assert len(message.splitlines()) == 1


def test_a_type_that_numpy_lacks_is_named(directory):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00")
    assert error_of(directory).startswith(f"{directory / 'model.safetensors'}: holds a type that NumPy lacks")


# Weights that do not fit.


def test_all_mismatches_are_listed_at_once_with_names_and_shapes(directory):
    def change(tensors):
        tensors["patch_embed.cls_token"] = tensors["patch_embed.cls_token"][..., :-1].copy()
        del tensors[BLOCK + "norm1.weight"]
        del tensors["patch_embed.blocks.1.mlp.fc1.weight"]
        tensors["head.weight"] = np.zeros((2, 3), np.float32)
        tensors[BLOCK + "ls1.gamma"] = np.zeros(64, np.int32)

    rewrite(directory, change)
    first, *lines = error_of(directory).splitlines()
    assert first == f"{directory}: 5 tensors do not fit the configuration"
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "wrong shape patch_embed.cls_token: expected [1, 1, 64], got [1, 1, 63]",
            f"missing {BLOCK}norm1.weight [64]",
            "missing patch_embed.blocks.1.mlp.fc1.weight [256, 64]",
            "unexpected head.weight [2, 3]",
            f"wrong type {BLOCK}ls1.gamma: expected floats, got int32",
        ]
    )


def test_another_depth_lists_the_blocks_that_lack(directory):
    reconfigure(directory, video_aggregator_layer=3)
    lines = error_of(directory).splitlines()[1:]
    assert lines
    assert all(line.strip().startswith("missing patch_embed.blocks.2.") for line in lines)


def test_another_size_lists_every_shape(directory):
    reconfigure(directory, hidden_size=32)
    lines = error_of(directory).splitlines()[1:]
    tensors = tensor_bytes(directory / "model.safetensors")
    assert {line.split()[2].rstrip(":") for line in lines} == set(tensors)
    assert all(line.strip().startswith("wrong shape ") for line in lines)


def test_another_model_is_refused(directory):
    save_file({"bert.embeddings.weight": np.zeros((2, 2), np.float32)}, directory / "model.safetensors")
    message = error_of(directory)  # the configuration still says whose weights they should be
    assert "unexpected bert.embeddings.weight [2, 2]" in message
    assert f"missing {BLOCK}attn.qkv.weight [192, 64]" in message
    (directory / "config.json").write_text('{"model_type": "bert"}')
    assert "neither OmniStream's nor DINOv3's weights" in error_of(directory)
    save_file({}, directory / "model.safetensors")
    assert "found 0 others (none, ...)" in error_of(directory)


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"use_gated_mlp": True}, {"layer_norm_eps": "small"}])
def test_a_wrong_value_in_a_dinov3_config_is_named(changes, tmp_path):
    golden = load_golden("02a_square_dinov3_hf")
    path = cases.write_model(tmp_path / "weights", golden.weights, {**golden.config, **changes})
    message = error_of(path)
    assert str(path) in message
    assert next(iter(changes)) in message


# Pickles.


class Marker:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pt", "last.ckpt", "weights.pkl"])
def test_pickles_are_refused_and_never_opened(name, directory, tmp_path):
    (directory / "model.safetensors").unlink()
    pickled = directory / name
    pickled.write_bytes(pickle.dumps(Marker(tmp_path / "unpickled")))
    for path in (directory, pickled):
        message = error_of(path)
        assert message.startswith(f"{pickled}: pickled weights are refused, because ")
        assert "safetensors.torch.save_file" in message
    write_index(directory, {"a": name})
    assert error_of(directory).startswith(f"{pickled}: pickled weights are refused")
    pickled.rename(directory / "model.safetensors")
    assert "not a whole safetensors file" in error_of(directory)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((directory / "model.safetensors").read_bytes())  # the trap works
    assert (tmp_path / "unpickled").exists()


def test_a_pickle_beside_safetensors_does_no_harm(directory):
    (directory / "pytorch_model.bin").write_bytes(b"\x80")
    assert omnistream_jax.load(directory).family == "omnistream"
