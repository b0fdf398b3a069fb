"""DL3DV-10K: written by its published conventions, read back as the room that it shows."""

import dataclasses
import json

import numpy as np
import pytest
from lens_cases import assert_sees_the_room, radial_rays, seen_along
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, camera_path, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.dl3dv import DL3DV

HASH, HELD_OUT, DENSE = ("0123456789abcdef" * 4, "f" * 64, "a" * 64)
LENS = {"k1": -0.08, "k2": 0.02, "p1": 0.004, "p2": -0.003}
# nerfstudio's world among COLMAP's axes: x and y change places, z is turned around
APPLIED = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])


def write_photographs(folder, scale=4, bad=()):
    """128 x 96 pixels; the fields speak of images `scale` times as large."""
    intrinsics = np.array([[100.0, 0, 66], [0, 104, 46], [0, 0, 1]])
    poses = camera_path(4)
    seen = seen_along(radial_rays(intrinsics, LENS.values(), 128, 96), intrinsics, poses)
    (folder / f"images_{scale}").mkdir(parents=True)
    frames = []
    for t, pose in enumerate(poses):
        Image.fromarray(seen.frames[t]).save(folder / f"images_{scale}/frame_{t + 1:05d}.png")
        opengl = pose @ np.diag([1.0, -1.0, -1.0, 1.0])
        matrix = APPLIED @ opengl if t not in bad else np.full((4, 4), np.nan)
        frames.append({"file_path": f"images/frame_{t + 1:05d}.png", "transform_matrix": matrix.tolist()})
    sizes = {"w": 128 * scale, "h": 96 * scale, "camera_model": "OPENCV"}
    pinhole = dict(zip(("fl_x", "fl_y", "cx", "cy"), (scale * n for n in (100.0, 104, 66, 46)), strict=True))
    (folder / "transforms.json").write_text(json.dumps({**sizes, **pinhole, **LENS, "frames": frames[::-1]}))


@pytest.fixture
def root(tmp_path):
    for name in (HASH, HELD_OUT):
        write_photographs(tmp_path / "1K" / name)
    (tmp_path / "benchmark-meta.csv").write_text(f"hash,batch\n{HELD_OUT},1K\n")
    return tmp_path


def assert_in_nerfstudios_world(frames, poses, **errors):
    """The room stands turned in this world: back to where it can be looked at."""
    turned = [frame.cam_to_world for frame in frames]
    np.testing.assert_allclose(turned, APPLIED @ poses, atol=1e-5)
    back = [dataclasses.replace(frame, cam_to_world=np.linalg.inv(APPLIED) @ frame.cam_to_world) for frame in frames]
    assert_sees_the_room(back, poses, **errors)


def test_photographs_of_a_lens_become_those_of_a_pinhole(root):
    reader = DL3DV.open(root)
    assert (len(reader), reader.frame_count(0)) == (1, 4)
    assert reader.describe(0).endswith(f"1K/{HASH}")
    assert not reader.info(0).metric
    frames = reader.read(0, range(4))
    assert_in_nerfstudios_world(frames, camera_path(4), colour_error=0.6)
    # frame 3 stands at (-0.7, 0.11, -1.26) of the room
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [0.11, -0.7, 1.26], atol=1e-6)


def test_smaller_images_are_read_with_their_own_intrinsics(tmp_path):
    write_photographs(tmp_path / "11K" / HASH, scale=8)
    (tmp_path / "benchmark-meta.csv").write_text(f"hash\n{HELD_OUT}\n")
    frames = DL3DV.open(tmp_path).read(0, [0, 3])
    assert_in_nerfstudios_world(frames, camera_path(4)[[0, 3]], colour_error=0.6)


def test_the_benchmarks_scenes_are_kept_out_of_training(root):
    assert DL3DV.open(root).sequences == (f"1K/{HASH}",)
    assert DL3DV.open(root, "benchmark").sequences == (f"1K/{HELD_OUT}",)
    (root / "benchmark-meta.csv").unlink()
    with pytest.raises(
        DataError, match=r"benchmark-meta.csv: there is no .* expected the list of the benchmark's scenes"
    ):
        DL3DV.open(root)


def test_frames_without_a_pose_are_left_out(tmp_path):
    write_photographs(tmp_path / "2K" / HASH, bad=(0, 2))
    (tmp_path / "benchmark-meta.csv").write_text(f"hash\n{HELD_OUT}\n")
    reader = DL3DV.open(tmp_path)
    assert reader.frame_count(0) == 2
    assert_in_nerfstudios_world(reader.read(0, [0, 1]), camera_path(4)[[1, 3]], colour_error=0.6)


def write_dense(folder, world):
    for kind in ("rgb", "cam", "depth", "sky_mask", "outlier_mask"):
        (folder / kind).mkdir(parents=True)
    for t, (picture, depth, pose) in enumerate(zip(world.frames, world.depth, world.cam_to_world, strict=True)):
        name = f"frame_{t:05d}"
        Image.fromarray(picture).save(folder / f"rgb/{name}.png")
        np.savez(folder / f"cam/{name}.npz", intrinsic=world.intrinsics, pose=pose)
        np.save(folder / f"depth/{name}.npy", depth.astype(np.float32))
        for kind, rows in (("sky_mask", slice(0, 2)), ("outlier_mask", slice(46, 48))):
            mask = np.zeros(depth.shape, np.uint8)
            mask[rows] = 255
            Image.fromarray(mask).save(folder / f"{kind}/{name}.png")


def test_the_form_with_computed_depth_is_preferred(root):
    world = room()
    write_dense(root / "1K" / HASH / "dense", world)
    write_dense(root / "3K" / DENSE / "dense0", world)
    reader = DL3DV.open(root)
    assert reader.sequences == (f"1K/{HASH}/dense", f"3K/{DENSE}/dense0")
    frames = reader.read(1, range(4))
    assert_is_world(frames, world, colour_error=0)
    assert_reprojects(frames)
    assert frames[0].sky[:2].all()
    assert frames[0].sky.sum() == 128
    assert not frames[0].valid[:2].any()
    assert not frames[0].valid[46:].any()
    assert 0.97 < frames[0].valid[2:46].mean() < 0.99  # the farthest of every fifty


def test_another_layout_is_refused_by_what_was_expected(tmp_path):
    (tmp_path / "benchmark-meta.csv").write_text(f"hash\n{HELD_OUT}\n")
    with pytest.raises(DataError, match=r"holds no \{1K,...,11K\}/HASH/transforms.json and none of HASH/dense"):
        DL3DV.open(tmp_path)
    with pytest.raises(DataError, match="has no split 'val', expected one of train, benchmark"):
        DL3DV.open(tmp_path, "val")
    (tmp_path / "benchmark-meta.csv").write_text("nothing\n")
    with pytest.raises(DataError, match=r"benchmark-meta.csv: expected a table that names scenes by 64"):
        DL3DV.open(tmp_path)


def test_a_damaged_file_is_named(root):
    reader = DL3DV.open(root)
    (root / "1K" / HASH / "images_4/frame_00002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"images_4/frame_00002\.png"):
        reader.read(0, [1])
    path = root / "1K" / HELD_OUT / "transforms.json"
    path.write_text(path.read_text().replace('"k1"', '"k9"'))
    with pytest.raises(DataError, match=r"transforms\.json: expected nerfstudio's fields w, h, .* failed \('k1'\)"):
        DL3DV.open(root, "benchmark").read(0, [0])
