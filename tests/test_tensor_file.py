"""Whole safetensors files: what others read, and who may read them. Growing ones are tested with extraction."""

import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from omnistream_jax.utils.tensor_file import write_tensors


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_safetensors_reads_the_tensors_and_the_metadata(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"matrix": matrix, "turned": matrix.T, "number": np.array(7, np.int64), "none": np.zeros((0, 3))}
    write_tensors(tmp_path / "a.safetensors", tensors, {"kind": "test"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"kind": "test"}


def test_the_file_may_be_read_by_whoever_may_read_other_new_files(tmp_path, umask):
    (tmp_path / "plain").write_text("")
    write_tensors(tmp_path / "new", {"a": np.zeros(3)})
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["new", "plain"]
