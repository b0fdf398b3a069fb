"""WildRGB-D: written by its published conventions, read back as the room that it shows."""

import json

import numpy as np
import pytest
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.wildrgbd import WildRGBD


@pytest.fixture(scope="module")
def world():
    return room()


def write_poses(scene, world, **changed):
    rows = [[t, *pose.ravel()] for t, pose in enumerate(world.cam_to_world)]
    for t, row in changed.items():
        rows[int(t[1:])][1:] = row
    (scene / "cam_poses.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path, world):
    scene = tmp_path / "boat/scenes/scene_000"
    for folder in ("rgb", "depth", "masks"):
        (scene / folder).mkdir(parents=True)
    for t, (picture, depth) in enumerate(zip(world.frames, world.depth, strict=True)):
        Image.fromarray(picture).save(scene / f"rgb/{t:05d}.png")
        Image.fromarray(np.rint(depth * 1000).astype(np.uint16)).save(scene / f"depth/{t:05d}.png")
    write_poses(scene, world)
    # the matrix, whose principal point counts from the middle of the first pixel, column by column
    columns = [50.0, 0.0, 0.0, 0.0, 52.5, 0.0, 33.0, 21.5, 1.0]
    (scene / "metadata").write_text(json.dumps({"K": columns, "w": 64, "h": 48}))
    (tmp_path / "boat/scenes/scene_001/rgb").mkdir(parents=True)
    lists = {
        "camera_eval_list.json": {"train": ["scenes/scene_000", "scenes/scene_001"], "val": []},
        "nvs_list.json": {"train": ["scenes/scene_000", "scenes/scene_002"], "val": ["scenes/scene_001"]},
    }
    for name, value in lists.items():
        (tmp_path / "boat" / name).write_text(json.dumps(value))
    return tmp_path


def test_a_scene_is_read_back(root, world):
    reader = WildRGBD.open(root)
    assert reader.sequences == ("boat/scenes/scene_000",)
    assert reader.info(0).metric
    assert reader.frame_count(0) == 4
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, colour_error=0)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_the_rest_of_the_lists_is_val(root):
    assert WildRGBD.open(root, "val").sequences == ("boat/scenes/scene_001",)


def test_frames_with_a_broken_pose_are_left_out(root, world):
    write_poses(root / "boat/scenes/scene_000", world, t1=["nan"] * 16)
    reader = WildRGBD.open(root)
    assert reader.frame_count(0) == 3
    assert_is_world(reader.read(0, [1, 2]), world, numbers=[2, 3])


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="holds no CATEGORY/scenes"):
        WildRGBD.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="no split 'test', expected train or val"):
        WildRGBD.open(root, "test")
    (root / "boat/nvs_list.json").write_text('{"train": ["scenes/../../../secret"], "val": []}')
    with pytest.raises(DataError, match=r"boat: its lists name 'scenes/\.\./.*', expected paths of the form"):
        WildRGBD.open(root, "val")
    (root / "boat/nvs_list.json").unlink()
    with pytest.raises(DataError, match=r"nvs_list\.json: there is no such file or folder; expected a list"):
        WildRGBD.open(root)


def test_a_damaged_file_is_named(root):
    scene = root / "boat/scenes/scene_000"
    (scene / "depth/00002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"depth/00002\.png: expected a 16-bit PNG"):
        WildRGBD.open(root).read(0, [2])
    (scene / "metadata").write_text('{"K": [1, 2], "w": 64, "h": 48}')
    with pytest.raises(DataError, match=r"metadata: expected a JSON object with \"K\" \(nine numbers"):
        WildRGBD.open(root).read(0, [0])
