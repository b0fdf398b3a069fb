"""BlendedMVS: written by its published conventions, read back as the room that it shows."""

import cv2
import numpy as np
import pytest
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.blendedmvs import BlendedMVS

PROJECT = "5b7a3890fc8fcf6781e2593a"
UNIT = 0.5  # metres


@pytest.fixture(scope="module")
def world():
    return room()


def camera_text(world, t):
    rotation = world.cam_to_world[t, :3, :3].T
    translation = -rotation @ world.cam_to_world[t, :3, 3] / UNIT
    rows = [[*rotation[row], translation[row]] for row in range(3)] + [[0.0, 0.0, 0.0, 1.0]]
    extrinsic = "".join(" ".join(f"{number:.9f}" for number in row) + " \n" for row in rows)
    intrinsic = "".join(" ".join(f"{number:.9f}" for number in row) + " \n" for row in world.intrinsics)
    return f"extrinsic\n{extrinsic}\nintrinsic\n{intrinsic}\n0.5 0.05 128 7.0 \n"


@pytest.fixture
def root(tmp_path, world):
    folder = tmp_path / PROJECT
    for name in ("blended_images", "rendered_depth_maps", "cams"):
        (folder / name).mkdir(parents=True)
    for t, (picture, depth) in enumerate(zip(world.frames, world.depth, strict=True)):
        Image.fromarray(picture).save(folder / f"blended_images/{t:08d}.jpg", quality=95)
        Image.fromarray(picture // 2).save(folder / f"blended_images/{t:08d}_masked.jpg")
        depth = (depth / UNIT).astype(np.float32)
        depth[40:, 60:] = 0
        cv2.imwrite(str(folder / f"rendered_depth_maps/{t:08d}.pfm"), depth)
        (folder / f"cams/{t:08d}_cam.txt").write_text(camera_text(world, t))
    pairs = ["4", "0", "3 1 90.5 3 10.25 2 40 ", "1", "2 0 90.5 2 100.5 ", "2", "0 ", "3", "1 0 10.25 "]
    (folder / "cams/pair.txt").write_text("\n".join(pairs) + "\n")
    (tmp_path / "BlendedMVS_training.txt").write_text(f"{PROJECT}\n57f8d9bbe73f6760f10e916a\n")
    return tmp_path


def test_a_project_is_read_back(root, world):
    reader = BlendedMVS.open(root)
    assert (len(reader), reader.frame_count(0)) == (1, 4)
    assert (reader.info(0).metric, reader.info(0).ordered) == (False, False)
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, scale=UNIT, depth_error=1e-6)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-1.4, 0.22, -2.52], atol=1e-6)
    assert not frames[0].valid[40:, 60:].any()


def test_neighbours_come_best_score_first(root):
    reader = BlendedMVS.open(root)
    assert [list(reader.neighbours(0, frame)) for frame in range(4)] == [[1, 2, 3], [2, 0], [], [0]]


def test_frames_with_a_broken_pose_are_left_out(root, world):
    path = root / PROJECT / "cams/00000001_cam.txt"
    path.write_text(path.read_text().replace("0.000000000", "nan", 1))
    reader = BlendedMVS.open(root)
    assert reader.frame_count(0) == 3
    assert_is_world(reader.read(0, [1, 2]), world, numbers=[2, 3], scale=UNIT)
    assert [list(reader.neighbours(0, frame)) for frame in range(3)] == [[1, 2], [], [0]]


def test_the_list_of_all_parts_comes_first(root):
    (root / "BlendedMVG_training.txt").write_text("57f8d9bbe73f6760f10e916a\n")
    with pytest.raises(DataError, match=r"holds no PROJECT/cams of BlendedMVG_training\.txt"):
        BlendedMVS.open(root)


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match=r"no BlendedMVG_training\.txt or BlendedMVS_training\.txt in it; expected the"):
        BlendedMVS.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match=r"no validation_list\.txt in it"):
        BlendedMVS.open(root, "val")
    with pytest.raises(DataError, match="no split 'test', expected train or val"):
        BlendedMVS.open(root, "test")


def test_a_damaged_file_is_named(root):
    folder = root / PROJECT
    depth = folder / "rendered_depth_maps/00000002.pfm"
    depth.write_bytes(depth.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"00000002\.pfm: expected a portable float map"):
        BlendedMVS.open(root).read(0, [2])
    (folder / "cams/pair.txt").write_text("4\n0\n")
    with pytest.raises(DataError, match=r"pair\.txt: expected the number of views.*it has 1 lines for 4 views"):
        BlendedMVS.open(root).neighbours(0, 0)
    (folder / "cams/00000003_cam.txt").write_text("intrinsic\n1 0 0\n")
    with pytest.raises(DataError, match=r"00000003_cam\.txt: expected extrinsic, a 4 x 4 matrix"):
        BlendedMVS.open(root).read(0, [3])


def test_depth_of_either_byte_order_is_read(root):
    path = root / PROJECT / "rendered_depth_maps/00000000.pfm"
    numbers = np.arange(48 * 64, dtype=">f4").reshape(48, 64)
    path.write_bytes(b"Pf\n64 48\n1.0\n" + numbers.tobytes())  # the last row is the highest
    depth = BlendedMVS.open(root).read(0, [0])[0].depth
    assert (depth[0, 0], depth[47, 63]) == (47 * 64, 63)
