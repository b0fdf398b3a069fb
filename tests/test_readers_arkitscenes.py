"""ARKitScenes: written by its published conventions, with the phone held in any way, read back as the upright room."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.arkitscenes import ARKitScenes

VIDEO = "41048190"
FOLDER = f"raw/Training/{VIDEO}"
TIMES = (3413.353, 3413.386, 3413.419, 3413.453)
# the room's y points down, this world's z points up: x stays, y is the room's z, z is minus the room's y
Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def world():
    """The room, upright, in ARKit's world."""
    upright = room()
    return dataclasses.replace(upright, cam_to_world=Z_UP @ upright.cam_to_world)


def tipped(world):
    """The same, seen by a phone that is tipped to its right: the room's left is at the top of the image.

    Its x axis points up in the room, where it was -y; its y axis, down the image, is where x was.
    """
    height = world.depth.shape[1]
    columns = world.cam_to_world
    poses = np.stack([-columns[..., 1], columns[..., 0], columns[..., 2], columns[..., 3]], axis=-1)
    (fx, _, cx), (_, fy, cy) = world.intrinsics[:2]
    # what was at (u, v) is now at (height - v, u)
    intrinsics = np.array([[fy, 0, height - cy], [0, fx, cx], [0, 0, 1]])
    pictures, depths = (
        np.stack([np.flipud(a).swapaxes(0, 1) for a in arrays]) for arrays in (world.frames, world.depth)
    )
    return dataclasses.replace(world, frames=pictures, depth=depths, intrinsics=intrinsics, cam_to_world=poses)


def write(root, world, *, rows=None, shift=0.0, depth_factor=1):
    """`rows` of the trajectory, all by default; depth and intrinsics are named `shift` seconds later."""
    folder = root / FOLDER
    for kind in ("vga_wide", "vga_wide_intrinsics", "lowres_depth"):
        (folder / kind).mkdir(parents=True)
    lines = []
    for t, (time, pose) in enumerate(zip(TIMES, world.cam_to_world, strict=True)):
        Image.fromarray(world.frames[t]).save(folder / f"vga_wide/{VIDEO}_{time:.3f}.png")
        height, width = world.depth[t].shape
        (fx, _, cx), (_, fy, cy) = world.intrinsics[:2]
        pincam = f"{width} {height} {fx} {fy} {cx - 0.5} {cy - 0.5}"  # pixel centres at whole numbers
        (folder / f"vga_wide_intrinsics/{VIDEO}_{time + shift:.3f}.pincam").write_text(pincam)
        cells = world.depth[t].reshape(height // depth_factor, depth_factor, width // depth_factor, depth_factor)
        stored = np.rint(1000 * cells.mean((1, 3))).astype(np.uint16)
        Image.fromarray(stored).save(folder / f"lowres_depth/{VIDEO}_{time + shift:.3f}.png")
        world_to_cam = np.linalg.inv(pose)
        angle_axis = Rotation.from_matrix(world_to_cam[:3, :3]).as_rotvec()
        if rows is None or t in rows:
            numbers = [time + 0.0003, *angle_axis, *world_to_cam[:3, 3]]
            lines.append(" ".join(f"{number:.9g}" if i else f"{number:.6f}" for i, number in enumerate(numbers)))
    (folder / "lowres_wide.traj").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("quarters", range(4))
def test_a_video_is_read_upright_however_the_phone_was_held(tmp_path, world, quarters):
    held = world
    for _ in range(quarters):
        held = tipped(held)
    assert held.frames.shape[1:3] == ((64, 48) if quarters % 2 else (48, 64))
    write(tmp_path, held)
    reader = ARKitScenes.open(tmp_path)
    assert (len(reader), reader.frame_count(0)) == (1, 4)
    assert reader.describe(0).endswith(FOLDER)
    assert reader.info(0).frames_per_second == 30
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, colour_error=0)
    assert_reprojects(frames)
    # (-0.7, 0.11, -1.26) of the room
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, -1.26, -0.11], atol=1e-5)


def test_poses_between_those_of_the_trajectory(tmp_path, world):
    write(tmp_path, world, rows=(0, 3))
    frames = ARKitScenes.open(tmp_path).read(0, range(4))
    assert_is_world(frames, world, colour_error=0, pose_error=2e-3)
    # 33 and 66 thousandths of a second of the way from (-1, -1.5, -0.2), which takes 100
    np.testing.assert_allclose(frames[1].cam_to_world[:3, 3], [-0.901, -1.4208, -0.1703], atol=1e-5)
    np.testing.assert_allclose(frames[2].cam_to_world[:3, 3], [-0.802, -1.3416, -0.1406], atol=1e-5)
    for frame in frames:
        turn = frame.cam_to_world[:3, :3].astype(float)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)


def test_files_a_thousandth_of_a_second_apart_belong_together(tmp_path, world):
    write(tmp_path, world, shift=0.001)
    assert_is_world(ARKitScenes.open(tmp_path).read(0, range(4)), world, colour_error=0)


def test_depth_of_fewer_pixels_is_brought_to_the_size_of_the_image(tmp_path, world):
    write(tmp_path, world, depth_factor=2)
    frames = ARKitScenes.open(tmp_path).read(0, range(4))
    assert frames[0].depth.shape == (48, 64)
    errors = [np.abs(frame.depth / depth - 1).mean() for frame, depth in zip(frames, world.depth, strict=True)]
    assert max(errors) < 1e-2
    assert_reprojects(frames)


def test_frames_without_pose_depth_or_intrinsics_are_left_out(tmp_path, world):
    write(tmp_path, world, rows=(1, 2, 3))
    reader = ARKitScenes.open(tmp_path)
    assert reader.frame_count(0) == 3  # the first lies before the trajectory
    (tmp_path / FOLDER / f"vga_wide_intrinsics/{VIDEO}_{TIMES[2]}.pincam").unlink()
    (tmp_path / FOLDER / f"lowres_depth/{VIDEO}_{TIMES[3]}.png").rename(tmp_path / FOLDER / "lowres_depth/1_9.png")
    another = ARKitScenes("again", tmp_path / "raw/..", reader.sequences)
    assert_is_world(another.read(0, range(another.frame_count(0))), world, numbers=[1], colour_error=0)


def test_frames_in_a_gap_of_the_trajectory_are_left_out(tmp_path, world):
    write(tmp_path, world, rows=(1,))
    path = tmp_path / FOLDER / "lowres_wide.traj"
    row = path.read_text().split()
    path.write_text("\n".join(" ".join([time, *row[1:]]) for time in ("3412.900", "3413.386", "3413.900")))
    reader = ARKitScenes.open(tmp_path)
    assert reader.frame_count(0) == 2  # 0.486 seconds before the pose at 3413.386 is near, 0.514 after it is not
    assert_is_world(reader.read(0, [1]), world, numbers=[1], colour_error=0)


def test_another_layout_is_refused_by_what_was_expected(tmp_path, world):
    with pytest.raises(DataError, match=r"raw/Training: there is no .* expected the folder of the split's videos"):
        ARKitScenes.open(tmp_path)
    write(tmp_path, world)
    (tmp_path / "raw/Validation").mkdir()
    with pytest.raises(DataError, match=r"holds no VIDEO/lowres_wide.traj with VIDEO/vga_wide"):
        ARKitScenes.open(tmp_path, "val")
    with pytest.raises(DataError, match="has no split 'test', expected one of train, val"):
        ARKitScenes.open(tmp_path, "test")


def test_a_damaged_file_is_named(tmp_path, world):
    write(tmp_path, world)
    reader = ARKitScenes.open(tmp_path)
    (tmp_path / FOLDER / f"lowres_depth/{VIDEO}_{TIMES[2]}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"{VIDEO}_3413\.419\.png: expected a 16-bit PNG"):
        reader.read(0, [2])
    (tmp_path / FOLDER / f"vga_wide_intrinsics/{VIDEO}_{TIMES[1]}.pincam").write_text("640 480 500 500 320 240")
    with pytest.raises(DataError, match=r"3413\.386\.pincam: 640 x 480 pixels, but .* has 64 x 48"):
        reader.read(0, [1])
    (tmp_path / FOLDER / "lowres_wide.traj").write_text("1 2 3\n")
    with pytest.raises(DataError, match=r"lowres_wide\.traj: expected rows of 7 numbers"):
        ARKitScenes("again", tmp_path / "raw/..", reader.sequences).frame_count(0)
