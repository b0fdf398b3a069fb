"""PointOdyssey: written by its published conventions, read back as the room that it shows."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.point_odyssey import PointOdyssey


@pytest.fixture(scope="module")
def world():
    """Ten times as large: depth is stored in steps of 15 mm."""
    small = room()
    poses = small.cam_to_world.copy()
    poses[:, :3, 3] *= 10
    return dataclasses.replace(small, depth=10 * small.depth, cam_to_world=poses)


def write_cameras(folder, world, *, kind=np.float32, broken=()):
    extrinsics = np.stack([np.linalg.inv(pose) for pose in world.cam_to_world])
    for frame, value in broken:
        extrinsics[frame] = value
    intrinsics = np.repeat(world.intrinsics[None], len(extrinsics), 0)
    np.savez(folder / "anno.npz", intrinsics=intrinsics.astype(kind), extrinsics=extrinsics.astype(kind), trajs_2d=0)


@pytest.fixture
def root(tmp_path, world):
    sequence = tmp_path / "train" / "ani1"
    for folder in ("rgbs", "depths"):
        (sequence / folder).mkdir(parents=True)
    for t, (picture, depth) in enumerate(zip(world.frames, world.depth, strict=True)):
        Image.fromarray(picture).save(sequence / f"rgbs/rgb_{t:05d}.jpg", quality=95)
        stored = (depth.clip(0, 1000) * 65535 / 1000).astype(np.uint16)
        stored[:5, :7] = 65535  # the sky is 1e10 m away before it is clipped
        Image.fromarray(stored).save(sequence / f"depths/depth_{t:05d}.png")
    write_cameras(sequence, world)
    return tmp_path


def test_a_sequence_is_read_back(root, world):
    reader = PointOdyssey.open(root)
    assert (len(reader), reader.frame_count(0)) == (1, 4)
    assert reader.describe(0).endswith("train/ani1")
    assert reader.info(0).metric
    assert reader.info(0).dynamic
    frames = reader.read(0, range(4))
    assert_is_world(frames, world)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-7.0, 1.1, -12.6], atol=1e-5)
    assert frames[0].sky.sum() == 35
    assert not frames[0].valid[frames[0].sky].any()


def test_matrices_rounded_to_half_precision_become_rotations_again(root, world):
    write_cameras(root / "train/ani1", world, kind=np.float16)
    frames = PointOdyssey.open(root).read(0, range(4))
    assert_is_world(frames, world, pose_error=0.02)
    for frame in frames:
        turn = frame.cam_to_world[:3, :3].astype(float)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)


def test_frames_with_broken_cameras_are_left_out(root, world):
    write_cameras(root / "train/ani1", world, broken=[(0, np.nan), (2, np.diag([2.0, 2.0, 2.0, 1.0]))])
    reader = PointOdyssey.open(root)
    assert reader.frame_count(0) == 2
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[1, 3])


def test_another_layout_is_refused_by_what_was_expected(root):
    with pytest.raises(
        DataError, match=r"val: there is no such .* expected the folder of the split, one of train, val"
    ):
        PointOdyssey.open(root, "val")
    (root / "test").mkdir()
    with pytest.raises(DataError, match=r"test: holds no SEQUENCE/anno\.npz"):
        PointOdyssey.open(root, "test")


def test_a_damaged_file_is_named(root):
    reader = PointOdyssey.open(root)
    (root / "train/ani1/depths/depth_00002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"depth_00002\.png: expected a 16-bit PNG"):
        reader.read(0, [2])
    np.savez(root / "train/ani1/anno.npz", extrinsics=np.zeros((4, 4, 4)))
    with pytest.raises(DataError, match=r"anno\.npz: expected a \.npz file with intrinsics, extrinsics"):
        PointOdyssey(reader.name, root / "train/..", reader.sequences).frame_count(0)
