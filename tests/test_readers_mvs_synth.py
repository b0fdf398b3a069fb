"""MVS-Synth: written by its published conventions, read back as the room that it shows."""

import json

import numpy as np
import pytest
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.mvs_synth import MvsSynth

OpenEXR = pytest.importorskip("OpenEXR")
SKY = np.s_[:4, 10:30]


@pytest.fixture(scope="module")
def world():
    return room()


def write_exr(path, depth):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"Y": depth.astype(np.float32)}).write(str(path))


def left_handed(cam_to_world):
    """World-to-camera of a camera with OpenCV's axes, where the world's first coordinate is our second and so on."""
    right, down, forward, origin = cam_to_world[:3].T
    matrix = np.eye(4)
    for row, axis in enumerate((right, down, forward)):
        matrix[row, :3] = axis[1], axis[0], axis[2]
        matrix[row, 3] = -(axis @ origin)
    return matrix


@pytest.fixture
def root(tmp_path, world):
    for folder in ("images", "depths", "poses"):
        (tmp_path / "0007" / folder).mkdir(parents=True)
    for t, (picture, depth, pose) in enumerate(zip(world.frames, world.depth, world.cam_to_world, strict=True)):
        Image.fromarray(picture).save(tmp_path / f"0007/images/{t:04d}.png")
        depth = depth.copy()
        depth[SKY] = np.inf
        write_exr(tmp_path / f"0007/depths/{t:04d}.exr", depth)
        camera = {"f_x": 50.0, "f_y": 52.5, "c_x": 33.5, "c_y": 22.0, "extrinsic": left_handed(pose).tolist()}
        (tmp_path / f"0007/poses/{t:04d}.json").write_text(json.dumps(camera))
    (tmp_path / "num_images.json").write_text("[4]")
    return tmp_path


def test_a_sequence_is_read_back(root, world):
    reader = MvsSynth.open(root)
    assert reader.sequences == ("0007",)
    assert reader.frame_count(0) == 4
    assert not reader.info(0).metric
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, colour_error=0, depth_error=1e-6)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_sky_is_told_and_the_farthest_depth_is_not_valid(root, world):
    frame = MvsSynth.open(root).read(0, [0])[0]
    assert frame.sky[SKY].all()
    assert frame.sky.sum() == 80
    assert not frame.valid[SKY].any()
    far = ~frame.valid & ~frame.sky
    assert 0.019 < far.sum() / (~frame.sky).sum() < 0.021
    assert world.depth[0][far].min() > world.depth[0][frame.valid].max()
    depth = world.depth[1].copy()
    depth[20:, :] = 1000.5
    write_exr(root / "0007/depths/0001.exr", depth)
    assert not MvsSynth.open(root).read(0, [1])[0].valid[20:].any()


def test_frames_with_a_broken_pose_are_left_out(root, world):
    path = root / "0007/poses/0002.json"
    camera = json.loads(path.read_text())
    camera["extrinsic"][0][3] = float("nan")
    path.write_text(json.dumps(camera))
    reader = MvsSynth.open(root)
    assert reader.frame_count(0) == 3
    assert_is_world(reader.read(0, [1, 2]), world, numbers=[1, 3])


def test_another_layout_is_refused_by_what_was_expected(root):
    with pytest.raises(DataError, match="holds no SEQUENCE/poses; expected the folder of one resolution"):
        MvsSynth.open(root.parent)
    with pytest.raises(DataError, match="no split 'val': all of it is train"):
        MvsSynth.open(root, "val")


def test_a_damaged_file_is_named(root):
    (root / "0007/depths/0002.exr").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"depths/0002\.exr: expected an OpenEXR file of one channel"):
        MvsSynth.open(root).read(0, [2])
    (root / "0007/poses/0001.json").write_text('{"f_x": 50.0}')
    with pytest.raises(DataError, match=r"poses/0001\.json: expected a JSON object with .*extrinsic"):
        MvsSynth.open(root).read(0, [1])
