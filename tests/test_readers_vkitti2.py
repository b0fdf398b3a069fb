"""Virtual KITTI 2: written by its published conventions, read back as the room that it shows."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.vkitti2 import VKitti2

DRIVE = "Scene02/morning"
BASELINE = 0.532725  # metres between the cameras


@pytest.fixture(scope="module")
def world():
    """Ten times as large: depth is stored in centimetres."""
    small = room()
    poses = small.cam_to_world.copy()
    poses[:, :3, 3] *= 10
    return dataclasses.replace(small, depth=10 * small.depth, cam_to_world=poses)


def write(root, world, parts=("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth", "vkitti_2.0.3_textgt"), missing=()):
    rgb, depth, text = (root / part / DRIVE for part in parts)
    for folder in (rgb / "frames/rgb/Camera_0", depth / "frames/depth/Camera_0", text):
        folder.mkdir(parents=True, exist_ok=True)
    (rgb / "frames/rgb/Camera_1").mkdir()
    intrinsics = ["frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]"]
    extrinsics = ["frame cameraID r1,1 r1,2 r1,3 t1 r2,1 r2,2 r2,3 t2 r3,1 r3,2 r3,3 t3 0 0 0 1"]
    for t, pose in enumerate(world.cam_to_world):
        Image.fromarray(world.frames[t]).save(rgb / f"frames/rgb/Camera_0/rgb_{t:05d}.jpg", quality=95)
        stored = np.rint(100 * world.depth[t]).astype(np.uint16)
        stored[:4, :5] = 65535
        Image.fromarray(stored).save(depth / f"frames/depth/Camera_0/depth_{t:05d}.png")
        for camera in (0, 1):
            (fx, _, cx), (_, fy, cy) = world.intrinsics[:2]
            intrinsics.append(f"{t} {camera} {fx} {fy} {cx - 0.5} {cy - 0.5}")  # pixel centres at whole numbers
            world_to_cam = np.linalg.inv(pose)
            world_to_cam[0, 3] -= camera * BASELINE
            if t not in missing:
                extrinsics.append(f"{t} {camera} " + " ".join(f"{number:.9g}" for number in world_to_cam.ravel()))
    (text / "intrinsic.txt").write_text("\n".join(intrinsics) + "\n")
    (text / "extrinsic.txt").write_text("\n".join(extrinsics) + "\n")


def test_a_drive_is_read_back(tmp_path, world):
    write(tmp_path, world)
    reader = VKitti2.open(tmp_path)
    assert [len(reader), reader.frame_count(0), reader.frame_count(1)] == [2, 4, 4]
    assert reader.describe(0).endswith(f"vkitti_2.0.3_rgb/{DRIVE}/frames/rgb/Camera_0")
    assert reader.describe(1).endswith("Camera_1")
    frames = reader.read(0, range(4))
    assert_is_world(frames, world)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-7.0, 1.1, -12.6], atol=1e-5)
    assert frames[0].sky.sum() == 20
    assert not frames[0].valid[frames[0].sky].any()


def test_the_principal_point_of_the_published_files_is_the_middle(tmp_path, world):
    """620.5 and 187 of 1242 x 375 pixels."""
    centred = dataclasses.replace(world, intrinsics=np.array([[725.0087, 0, 621], [0, 725.0087, 187.5], [0, 0, 1]]))
    write(tmp_path, centred)
    text = (tmp_path / "vkitti_2.0.3_textgt" / DRIVE / "intrinsic.txt").read_text()
    assert "0 0 725.0087 725.0087 620.5 187.0\n" in text
    (frame,) = VKitti2.open(tmp_path).read(0, [0])
    assert frame.intrinsics[:2, 2].tolist() == [1242 / 2, 375 / 2]


def test_archives_unpacked_in_one_folder_are_read(tmp_path, world):
    write(tmp_path, world, parts=("", "", ""))
    reader = VKitti2.open(tmp_path)
    assert reader.sequences[0] == f"{DRIVE}/frames/rgb/Camera_0"
    assert_is_world(reader.read(0, [1, 2]), world, numbers=[1, 2])


def test_frames_without_a_pose_are_left_out(tmp_path, world):
    write(tmp_path, world, missing=(1,))
    reader = VKitti2.open(tmp_path)
    assert reader.frame_count(0) == 3
    assert_is_world(reader.read(0, [1, 2]), world, numbers=[2, 3])


def test_another_layout_is_refused_by_what_was_expected(tmp_path, world):
    write(tmp_path, world)
    with pytest.raises(DataError, match="holds no SCENE/VARIATION/frames/rgb/Camera_0 of Scene20"):
        VKitti2.open(tmp_path, "test")
    with pytest.raises(DataError, match="has no split 'val', expected one of train, test"):
        VKitti2.open(tmp_path, "val")


def test_a_damaged_file_is_named(tmp_path, world):
    write(tmp_path, world)
    (tmp_path / "vkitti_2.0.3_depth" / DRIVE / "frames/depth/Camera_0/depth_00002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"depth_00002\.png: expected a 16-bit PNG"):
        VKitti2.open(tmp_path).read(0, [2])
    (tmp_path / "vkitti_2.0.3_textgt" / DRIVE / "extrinsic.txt").unlink()
    with pytest.raises(DataError, match=r"extrinsic\.txt: there is no such file; expected a line of names, then rows"):
        VKitti2.open(tmp_path / ".").frame_count(1)
