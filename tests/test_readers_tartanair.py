"""TartanAir: written by its published conventions (NED axes), read back as the room that it shows."""

import dataclasses

import numpy as np
import pytest
from lens_cases import pinhole_rays, seen_along
from PIL import Image
from scipy.spatial.transform import Rotation
from world_cases import assert_is_world, assert_reprojects, camera_path

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.tartanair import TartanAir

SEQUENCE = "office/Hard/P003"


@pytest.fixture(scope="module")
def world():
    intrinsics = np.array([[320.0, 0, 320], [0, 320, 240], [0, 0, 1]])
    return seen_along(pinhole_rays(intrinsics, 640, 480), intrinsics, camera_path(4)[[0, 1, 3]])


def ned_line(pose: np.ndarray) -> str:
    """tx ty tz qx qy qz qw of a pose in OpenCV's axes: forward is z, right is x, down is y, of camera and world."""

    def ned(v):
        return np.array([v[2], v[0], v[1]])

    right, down, forward = pose[:3, 0], pose[:3, 1], pose[:3, 2]
    turn = np.stack([ned(forward), ned(right), ned(down)], axis=1)
    numbers = [*ned(pose[:3, 3]), *Rotation.from_matrix(turn).as_quat()]
    return " ".join(f"{number:.9g}" for number in numbers)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, world):
    root = tmp_path_factory.mktemp("tartanair")
    folder = root / SEQUENCE
    for kind in ("image_left", "depth_left"):
        (folder / kind).mkdir(parents=True)
    for t, picture, depth in zip((0, 1, 3), world.frames, world.depth.astype(np.float32), strict=True):
        Image.fromarray(picture).save(folder / f"image_left/{t:06d}_left.png", compress_level=1)
        depth[:20] = 10000.0  # the sky sphere
        np.save(folder / f"depth_left/{t:06d}_left_depth.npy", depth)
    lines = [ned_line(pose) for pose in world.cam_to_world]
    assert lines[2].startswith("-1.26 -0.7 0.11 ")
    lines.insert(2, "nan " * 7)
    (folder / "pose_left.txt").write_text("\n".join(lines))
    return root


def test_a_trajectory_is_read_back_without_its_broken_frame(stored, world):
    reader = TartanAir.open(stored)
    assert (len(reader), reader.frame_count(0)) == (1, 3)
    assert reader.describe(0).endswith(SEQUENCE)
    frames = reader.read(0, range(3))
    assert_is_world(frames, world, colour_error=0)
    middle = np.array([[1, 0, -240], [0, 1, -180], [0, 0, 1]])  # the middle suffices, and is fast
    parts = [dataclasses.replace(f, depth=f.depth[180:300, 240:400], valid=f.valid[180:300, 240:400]) for f in frames]
    assert_reprojects([dataclasses.replace(part, intrinsics=middle @ part.intrinsics) for part in parts])
    np.testing.assert_allclose(frames[2].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_sky_and_the_farthest_depth_are_not_valid(stored):
    (frame,) = TartanAir.open(stored).read(0, [0])
    assert frame.sky[:20].all()
    assert frame.sky.sum() == 20 * 640
    assert not frame.depth[frame.sky].any()
    near = ~frame.sky
    assert 0.97 < frame.valid[near].mean() < 0.99


def test_axes_by_hand(stored, tmp_path):
    """At 1 forward, 2 right and 3 down, turned to the right by a quarter: it looks along the world's x."""
    (tmp_path / "office").mkdir()
    (tmp_path / SEQUENCE).parent.mkdir(parents=True)
    (tmp_path / SEQUENCE).symlink_to(stored / SEQUENCE)
    turned = tmp_path / "street/Easy/P000"
    turned.mkdir(parents=True)
    for kind in ("image_left", "depth_left"):
        (turned / kind).symlink_to(stored / SEQUENCE / kind)
    (turned / "pose_left.txt").write_text("1 2 3 0 0 0.70710678 0.70710678\n")
    reader = TartanAir.open(tmp_path)
    assert reader.sequences == (SEQUENCE, "street/Easy/P000")
    (frame,) = reader.read(1, [0])
    expected = [[0, 0, 1, 2], [0, 1, 0, 3], [-1, 0, 0, 1], [0, 0, 0, 1]]
    np.testing.assert_allclose(frame.cam_to_world, expected, atol=1e-6)


def test_another_layout_is_refused_by_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"holds no ENVIRONMENT/\{Easy,Hard\}/PNNN/pose_left.txt"):
        TartanAir.open(tmp_path)
    with pytest.raises(DataError, match="has no split 'val', expected train"):
        TartanAir.open(tmp_path, "val")


def test_a_damaged_file_is_named(tmp_path):
    folder = tmp_path / SEQUENCE
    (folder / "image_left").mkdir(parents=True)
    (folder / "pose_left.txt").write_text("0 0 0 0 0 0 1\n")
    Image.new("RGB", (64, 48)).save(folder / "image_left/000000_left.png")
    with pytest.raises(DataError, match=r"000000_left.png: 64 x 48 pixels, expected 640 x 480"):
        TartanAir.open(tmp_path).read(0, [0])
    (folder / "pose_left.txt").write_text("0 0 0 0 0 0\n")
    with pytest.raises(DataError, match=r"pose_left.txt: expected rows of 7 numbers"):
        TartanAir("tartanair", tmp_path / ".", (f"office/../{SEQUENCE}",)).frame_count(0)
