"""Dynamic Replica: written by PyTorch3D's conventions, read back as the room that it shows."""

import numpy as np
import pytest
from PIL import Image
from pytorch3d_cases import viewpoint, write_float16_png, write_jgz
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.dynamic_replica import DynamicReplica

BASELINE = 0.1  # metres from the left to the right camera


@pytest.fixture(scope="module")
def world():
    return room()


def annotation(world, t, camera):
    folder = f"e0ff8f-3_obj_source_{camera}"
    name = f"{folder}-{t:04d}"
    pose = world.cam_to_world[t].copy()
    if camera == "right":
        pose[:3, 3] += BASELINE * pose[:3, 0]
    height, width = world.depth[t].shape
    return {
        "sequence_name": "e0ff8f-3_obj",
        "frame_number": t,
        "frame_timestamp": t / 30,
        "image": {"path": f"{folder}/images/{name}.png", "size": [height, width]},
        "depth": {"path": f"{folder}/depths/{name}.geometric.png", "scale_adjustment": 1.0, "mask_path": None},
        "mask": {"path": f"{folder}/masks/{name}.png", "mass": None},
        "viewpoint": viewpoint(world.intrinsics, pose, height, width, "ndc_norm_image_bounds"),
        "camera_name": camera,
        "flow_forward": {"path": f"{folder}/flow_forward/{name}.png"},
    }


@pytest.fixture
def root(tmp_path, world):
    split = tmp_path / "valid"
    entries = [annotation(world, t, camera) for camera in ("left", "right") for t in (1, 0, 3, 2)]
    for entry in entries:
        t = entry["frame_number"]
        write_float16_png(split / entry["depth"]["path"], world.depth[t])
        (split / entry["image"]["path"]).parent.mkdir(exist_ok=True)
        Image.fromarray(world.frames[t]).save(split / entry["image"]["path"])
    write_jgz(split / "frame_annotations_valid.jgz", entries)
    return tmp_path


def test_both_cameras_of_a_video_are_read_back(root, world):
    reader = DynamicReplica.open(root, "valid")
    assert reader.sequences == ("valid/e0ff8f-3_obj_source_left", "valid/e0ff8f-3_obj_source_right")
    assert reader.info(0).metric
    assert reader.info(0).dynamic
    assert [reader.frame_count(index) for index in range(2)] == [4, 4]
    left, right = reader.read(0, range(4)), reader.read(1, range(4))
    assert_is_world(left, world, colour_error=0)
    assert_reprojects(left)
    np.testing.assert_allclose(left[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)
    from_left = np.linalg.inv(left[2].cam_to_world.astype(float)) @ right[2].cam_to_world
    np.testing.assert_allclose(from_left[:3, 3], [0.1, 0, 0], atol=1e-6)


def test_frames_without_a_camera_are_left_out(root, world):
    entries = [annotation(world, t, "left") for t in range(4)]
    entries[1]["viewpoint"]["R"][0][0] = float("inf")
    write_jgz(root / "valid/frame_annotations_valid.jgz", entries)
    reader = DynamicReplica.open(root, "valid")
    assert [reader.frame_count(index) for index in range(2)] == [3, 0]
    assert_is_world(reader.read(0, range(3)), world, numbers=[0, 2, 3])


def test_another_layout_is_refused_by_what_was_expected(root):
    with pytest.raises(DataError, match=r"train: there is no such .* expected the folder of a split: train, valid or"):
        DynamicReplica.open(root)
    (root / "test").mkdir()
    with pytest.raises(DataError, match=r"frame_annotations_test\.jgz: .* expected the cameras of the split's frames"):
        DynamicReplica.open(root, "test")
    write_jgz(root / "test/frame_annotations_test.jgz", [])
    with pytest.raises(DataError, match="holds no VIDEO_CAMERA/images"):
        DynamicReplica.open(root, "test")


def test_a_damaged_file_is_named(root):
    path = root / "valid/frame_annotations_valid.jgz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"frame_annotations_valid\.jgz: expected a JSON file"):
        DynamicReplica.open(root, "valid").frame_count(0)
    path.write_bytes(whole)
    (root / "valid/e0ff8f-3_obj_source_left/images/e0ff8f-3_obj_source_left-0002.png").unlink()
    with pytest.raises(DataError, match=r"left-0002\.png: there is no such image file"):
        DynamicReplica.open(root, "valid").read(0, [2])
