"""MapFree: written by its published conventions, read back as the cameras of the room."""

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from world_cases import assert_is_world, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.mapfree import MapFree


@pytest.fixture(scope="module")
def world():
    return room(height=64, width=48)


def write_video(scene, video, world):
    (scene / video).mkdir(parents=True)
    (fx, _, cx), (_, fy, cy), _ = world.intrinsics
    poses, cameras = [], []
    for t, (picture, pose) in enumerate(zip(world.frames, world.cam_to_world, strict=True)):
        name = f"{video}/frame_{3 * t:05d}.jpg"  # numbers are skipped
        Image.fromarray(picture).save(scene / name, quality=95)
        to_camera = pose[:3, :3].T
        x, y, z, w = Rotation.from_matrix(to_camera).as_quat()
        poses.append([name, w, x, y, z, *(-to_camera @ pose[:3, 3])])
        cameras.append([name, fx, fy, cx, cy, 48, 64])
    for file, rows in (("poses.txt", poses), ("intrinsics.txt", cameras)):
        with (scene / file).open("a") as out:
            out.writelines(" ".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def root(tmp_path, world):
    for scene in (tmp_path / "train/s00000", tmp_path / "val/s00460"):
        for video in ("seq0", "seq1"):
            write_video(scene, video, world)
    return tmp_path


def test_both_videos_of_a_scene_are_read_back(root, world):
    reader = MapFree.open(root)
    assert reader.sequences == ("train/s00000/seq0", "train/s00000/seq1")
    assert reader.info(0).metric
    for video in range(2):
        assert reader.frame_count(video) == 4
        frames = reader.read(video, range(4))
        assert_is_world(frames, world, colour_error=4)
        assert {frame.depth for frame in frames} | {frame.valid for frame in frames} == {None}
    assert frames[3].path.endswith("s00000/seq1/frame_00009.jpg")
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_of_validation_scenes_the_video_is_read_and_not_the_single_photograph(root):
    assert MapFree.open(root, "val").sequences == ("val/s00460/seq1",)


def test_frames_without_a_pose_or_a_camera_are_left_out(root, world):
    scene = root / "train/s00000"
    poses = (scene / "poses.txt").read_text().splitlines()
    poses[1] = "seq0/frame_00003.jpg 0 0 0 0 0 0 0"
    (scene / "poses.txt").write_text("\n".join(["# frame_path qw qx qy qz tx ty tz", *poses]))
    cameras = (scene / "intrinsics.txt").read_text().splitlines()
    (scene / "intrinsics.txt").write_text("\n".join(cameras[:2] + cameras[3:]))
    reader = MapFree.open(root)
    assert (reader.frame_count(0), reader.frame_count(1)) == (2, 4)
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[0, 3])


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="in the splits train and val, not in 'test'"):
        MapFree.open(root, "test")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="train: there is no such file or folder; expected the folder of the split's"):
        MapFree.open(empty)
    (empty / "train").mkdir()
    with pytest.raises(DataError, match=r"train: holds no SCENE/poses\.txt"):
        MapFree.open(empty)


def test_a_damaged_file_is_named(root):
    scene = root / "train/s00000"
    (scene / "seq0/frame_00000.jpg").write_bytes(b"no picture")
    Image.new("RGB", (24, 32)).save(scene / "seq0/frame_00003.jpg")
    reader = MapFree.open(root)
    with pytest.raises(DataError, match=r"seq0/frame_00000\.jpg: expected a whole image"):
        reader.read(0, [0])
    with pytest.raises(DataError, match=r"frame_00003\.jpg: 24 x 32 pixels, but intrinsics\.txt is for 48 x 64"):
        reader.read(0, [1])
    (root / "val/s00460/poses.txt").write_text("seq1/frame_00000.jpg 1 0 0\n")
    with pytest.raises(DataError, match=r"poses\.txt: expected lines of a frame's path and 7 numbers.*3 numbers after"):
        MapFree.open(root, "val").frame_count(0)
