"""Weights in and out: what is written is what was read, and every broken directory gets one clear error."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import backbone_cases as cases
import jax
import ml_dtypes
import numpy as np
import pytest
from goldens import golden_path, load_golden
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import omnistream_jax
from omnistream_jax.convert import files
from omnistream_jax.convert.files import WeightsError

OFFICIAL = golden_path("official_tiny_hf/io").parent
BLOCK = "patch_embed.blocks.0."


def copy_official(directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(OFFICIAL / name, directory / name)
    return directory


@pytest.fixture
def directory(tmp_path):
    """A writable copy of a small released model."""
    return copy_official(tmp_path / "weights")


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


# There and back.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["01b_omnistream_camera", "01h_omnistream_swiglu", "02a_square_dinov3_hf"])
def test_load_save_load_gives_equal_arrays_and_bytes(name, dtype, tmp_path):
    golden = load_golden(name)
    weights = {key: tensor.astype(getattr(ml_dtypes, dtype, dtype)) for key, tensor in golden.weights.items()}
    first = omnistream_jax.load(cases.write_model(tmp_path / "first", weights, golden.config))
    first.save(tmp_path / "second")
    assert_equal_models(omnistream_jax.load(tmp_path / "second"), first)
    written = tensor_bytes(tmp_path / "second" / "model.safetensors")
    assert written == tensor_bytes(tmp_path / "first" / "model.safetensors")
    assert {kind for kind, _, _ in written.values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("first", "second"))
    assert set(before) <= set(after)
    assert after["dtype"] == dtype


def test_every_parameter_comes_from_a_tensor_of_its_own(directory):
    """Any change of any tensor reaches the parameters, and comes back."""
    seed = iter(range(1000))

    def shuffle(tensors):
        for name, tensor in tensors.items():
            tensors[name] = np.random.default_rng(next(seed)).normal(size=tensor.shape).astype(np.float32)

    rewrite(directory, shuffle)
    model = omnistream_jax.load(directory)
    drawn = np.concatenate([tensor.ravel() for tensor in load_file(directory / "model.safetensors").values()])
    ours = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(model.params)])
    assert np.sort(ours).tobytes() == np.sort(drawn).tobytes()


def test_saving_over_the_directory_that_was_loaded(directory):
    before = tensor_bytes(directory / "model.safetensors")
    omnistream_jax.load(directory).save(directory)
    assert tensor_bytes(directory / "model.safetensors") == before
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_the_original_dinov3_layout_is_saved_as_hugging_face(tmp_path):
    golden = load_golden("02c_dinov3_meta_layout")
    original = omnistream_jax.load(cases.write_model(tmp_path / "original", golden.weights, golden.config))
    original.save(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "np") as file:
        assert "layer.0.attention.q_proj.weight" in file.keys()  # noqa: SIM118 -- not a dict
    assert_equal_models(omnistream_jax.load(tmp_path / "saved"), original)


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


def test_shards_equal_one_file(directory):
    whole = omnistream_jax.load(directory)
    write_shards(directory)
    assert_equal_models(omnistream_jax.load(directory), whole)


# What config.json decides.


@pytest.mark.parametrize(
    ("name", "family_default"), [("01b_omnistream_camera", "released"), ("02a_square_dinov3_hf", "dinov3_2d")]
)
def test_rope_is_the_option_then_our_key_then_the_family(name, family_default, tmp_path):
    golden = load_golden(name)
    path = cases.write_model(tmp_path / "first", golden.weights, golden.config)
    assert omnistream_jax.load(path).config.rope == family_default
    chosen = omnistream_jax.load(path, rope="dinov3")
    assert chosen.config.rope == "dinov3"
    chosen.save(tmp_path / "second")
    assert omnistream_jax.load(tmp_path / "second").config.rope == "dinov3"
    assert omnistream_jax.load(tmp_path / "second", rope=family_default).config.rope == family_default


def test_a_trained_model_loads_without_options_to_equal_outputs(tmp_path):
    model = cases.random_model(
        rope="dinov3", time_unit=8.0, norm_epsilon=1e-3, rope_base=50.0, mlp_width=90, registers=2
    )
    model.save(tmp_path)
    loaded = omnistream_jax.load(tmp_path)
    assert_equal_models(loaded, model)
    clip = cases.random_frames(1, 2, 16, 32)
    cases.assert_same_bits(loaded.encode(clip), model.encode(clip))
    cases.assert_same_bits(model.encode(clip, time_unit=8), model.encode(clip))


def test_a_trained_swiglu_model_loads_to_equal_parameters(tmp_path):
    model = cases.random_model(mlp="swiglu", mlp_width=90)  # a width that mlp_ratio cannot say
    model.save(tmp_path)
    assert_equal_models(omnistream_jax.load(tmp_path), model)


def test_released_classes_defaults_and_the_keys_that_are_ignored(directory):
    """layer_norm_eps and intermediate_size of an OmniStream config.json are not what its code uses."""
    reconfigure(directory, layer_norm_eps=0.5, intermediate_size=7)
    config = omnistream_jax.load(directory).config
    assert (config.norm_epsilon, config.mlp_width, config.time_unit) == (1e-5, 4 * config.width, 16.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.5),
        ("hidden_size", -64),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("video_aggregator_layer", None),
        ("patch_size", [16]),
        ("mlp_ratio", "4"),
        ("mlp_ratio", float("inf")),
        ("mlp_ratio", float("nan")),
        ("mlp_ratio", 10**400),
        ("ffn_layer", "moe"),
        ("omnistream_jax", ["rope"]),
        ("omnistream_jax", {"rope": "4d"}),
        ("omnistream_jax", {"rope": 3}),
        ("omnistream_jax", {"ropes": "dinov3"}),
        ("omnistream_jax", {"time_unit": 0}),
        ("omnistream_jax", {"rope_base": 0}),
        ("omnistream_jax", {"norm_epsilon": -1.0}),
        ("omnistream_jax", {"norm_epsilon": None}),
    ],
    ids=str,
)
def test_a_wrong_value_in_the_config_is_named(key, value, directory):
    reconfigure(directory, **{key: value})
    message = error_of(directory)
    named = {key, "heads"} | (set(value) if isinstance(value, (dict, list)) else set())
    assert "config.json" in message or str(directory) in message
    assert any(str(name) in message for name in named), message
    assert "\n" not in message


@pytest.mark.parametrize("rope", ["4d", "", 3])
def test_an_unknown_rope_is_named(rope, directory):
    assert "rope: expected one of dinov3, released, dinov3_2d" in error_of(directory, rope=rope)


def test_an_unknown_type_is_named(directory):
    with pytest.raises(ValueError, match=r"^dtype: expected"):
        omnistream_jax.load(directory, dtype="int8")


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


# Shards.


def test_a_missing_shard_is_named(directory):
    write_shards(directory)
    shard = directory / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert error_of(directory) == f"{shard}: no such file"


@pytest.mark.parametrize("sharded", [False, True])
def test_the_fingerprint_sees_the_files_that_are_read_and_no_others(directory, sharded):
    weights = {"model.safetensors"}
    if sharded:
        weights = {"model.safetensors.index.json", *write_shards(directory).values()}
    for name in ("heads.json", "other.json", "other.safetensors"):
        (directory / name).write_bytes(b"{}")

    def is_seen(name):
        before = files.fingerprint(directory, "heads.json")
        with (directory / name).open("ab") as file:
            file.write(b" ")
        return files.fingerprint(directory, "heads.json") != before

    seen = {path.name for path in directory.iterdir() if is_seen(path.name)}
    assert seen == {"config.json", "heads.json", *weights}


@pytest.mark.parametrize("outside", ["../stolen.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", ""])
def test_an_index_may_not_name_another_place(outside, directory):
    shutil.copy(directory / "model.safetensors", directory.parent / "stolen.safetensors")
    names = list(write_shards(directory))
    write_index(directory, dict.fromkeys(names, outside))
    assert error_of(directory).endswith(f"the shard {outside!r} is not a plain file name")


def test_tensors_that_the_index_does_not_know_are_named(directory):
    weight_map = write_shards(directory)
    dropped, shard = next(iter(weight_map.items()))
    del weight_map[dropped]
    weight_map["invented"] = shard
    write_index(directory, weight_map)
    assert error_of(directory) == f"{directory / shard}: missing ['invented'], not in the index ['{dropped}']"


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{", ""])
def test_an_index_that_is_none_is_named(index, directory):
    write_shards(directory)
    (directory / "model.safetensors.index.json").write_text(index)
    assert error_of(directory).startswith(f"{directory / 'model.safetensors.index.json'}: ")


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


# Saving that fails.


@pytest.mark.parametrize("failing", ["save_file", "weights rename", "config text"])
def test_a_failing_save_leaves_the_old_files_whole(failing, directory, monkeypatch):
    model = omnistream_jax.load(directory)
    model = dataclasses.replace(model, params=jax.tree.map(lambda leaf: 2 * leaf, model.params))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*args, **kwargs):
        if failing == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if failing == "save_file":
        monkeypatch.setattr("omnistream_jax.utils.tensor_file.save_file", fail)
    elif failing == "weights rename":
        monkeypatch.setattr(files.os, "replace", fail)
    else:
        monkeypatch.setattr(files.Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(directory)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
