"""ScanNet: written by its published conventions, read back as the room that it shows."""

import numpy as np
import pytest
from scannet_cases import write_scannet
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.scannet import ScanNet


@pytest.fixture(scope="module")
def world():
    return room()


@pytest.fixture
def root(tmp_path, world):
    return write_scannet(tmp_path, {"scene0000_00": world}, listed=("scene0001_00",))


def test_a_scene_is_read_back(root, world):
    reader = ScanNet.open(root)
    assert (len(reader), reader.frame_count(0)) == (1, 4)
    assert reader.describe(0).endswith("scans/scene0000_00")
    assert reader.info(0).metric
    frames = reader.read(0, range(4))
    assert_is_world(frames, world)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_frames_without_tracking_are_left_out(root, world):
    np.savetxt(root / "scans/scene0000_00/pose/1.txt", np.full((4, 4), -np.inf))
    reader = ScanNet.open(root)
    assert reader.frame_count(0) == 3
    assert_is_world(reader.read(0, [1, 2]), world, numbers=[2, 3])


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="scans: there is no such file or folder; expected the folder of scenes"):
        ScanNet.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match=r"scannetv2_val.txt: there is no .* expected the list of the split's scenes"):
        ScanNet.open(root, "val")
    (root / "scannetv2_train.txt").write_text("scene0009_00\n")
    with pytest.raises(DataError, match="holds no SCENE/pose of the split's scenes"):
        ScanNet.open(root)


def test_a_damaged_file_is_named(root):
    (root / "scans/scene0000_00/depth/2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"depth/2\.png: expected a 16-bit PNG"):
        ScanNet.open(root).read(0, [2])
