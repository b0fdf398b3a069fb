"""Weights in several files with an index."""

import shutil

import pytest
from load_cases import assert_equal_models, copy_official, error_of, write_index, write_shards

import omnistream_jax
from omnistream_jax.convert import files


@pytest.fixture
def directory(tmp_path):
    """A writable copy of a small released model."""
    return copy_official(tmp_path / "weights")


def test_shards_equal_one_file(directory):
    whole = omnistream_jax.load(directory)
    write_shards(directory)
    assert_equal_models(omnistream_jax.load(directory), whole)


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
