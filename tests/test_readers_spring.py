"""Spring: written by its published conventions, read back as the room that it shows."""

import h5py
import numpy as np
import pytest
from PIL import Image
from ray_cases import hit, pinhole_rays
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.spring import Spring


@pytest.fixture(scope="module")
def world():
    return room(height=96, width=128, focal=100.0)


@pytest.fixture
def root(tmp_path, world):
    scene = tmp_path / "train" / "0001"
    for folder in ("frame_left", "disp1_left", "cam_data"):
        (scene / folder).mkdir(parents=True)
    rays = pinhole_rays(world.intrinsics, 192, 256, step=0.5)  # samples are twice as dense as pixels
    for t, pose in enumerate(world.cam_to_world):
        Image.fromarray(world.frames[t]).save(scene / f"frame_left/frame_left_{t + 1:04d}.png")
        with h5py.File(scene / f"disp1_left/disp1_left_{t + 1:04d}.dsp5", "w") as file:
            file["disparity"] = 100.0 * 0.065 / hit(rays @ pose[:3, :3].T, pose[:3, 3])[0]
    (fx, _, cx), (_, fy, cy), _ = world.intrinsics
    np.savetxt(scene / "cam_data/intrinsics.txt", [[fx, fy, cx, cy]] * 4)
    np.savetxt(scene / "cam_data/extrinsics.txt", np.linalg.inv(world.cam_to_world).reshape(4, 16))
    return tmp_path


def change_disparity(root, number, place, value):
    with h5py.File(root / f"train/0001/disp1_left/disp1_left_{number:04d}.dsp5", "a") as file:
        file["disparity"][place] = value


def test_a_sequence_is_read_back(root, world):
    reader = Spring.open(root)
    assert (len(reader), reader.frame_count(0), reader.sequences) == (1, 4, ("train/0001",))
    assert reader.info(0).metric
    assert reader.info(0).dynamic
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, colour_error=0, depth_error=5e-3)  # where walls meet; on them:
    errors = [np.abs(frame.depth / depth - 1) for frame, depth in zip(frames, world.depth, strict=True)]
    assert np.quantile(errors, 0.9) < 1e-6
    assert_reprojects(frames)
    assert frames[0].sky is None
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)
    np.testing.assert_allclose(frames[0].depth[20, 30], world.depth[0, 20, 30], rtol=1e-4)  # a sample alone: 4e-3 off


def test_at_an_edge_the_first_sample_counts_and_no_mean_of_two_surfaces(root):
    change_disparity(root, 1, np.s_[20:22, 30:32], [[6.5, 6.5], [1.0, 1.0]])
    frame = Spring.open(root).read(0, [0])[0]
    assert frame.depth[10, 15] == pytest.approx(1.0)  # 100 * 0.065 / 6.5


def test_places_without_disparity_are_not_valid(root):
    for column, value in enumerate((0, np.inf, np.nan)):
        change_disparity(root, 1, np.s_[0:2, 2 * column : 2 * column + 2], value)
    frame = Spring.open(root).read(0, [0])[0]
    assert frame.valid[0, :4].tolist() == [False, False, False, True]
    assert frame.valid.sum() == 96 * 128 - 3


@pytest.mark.parametrize("scale", [1, 2])
def test_the_sky_is_told_where_its_maps_are_there(root, world, scale):
    folder = root / "train/0001/maps/skymap_left"
    folder.mkdir(parents=True)
    sky = np.zeros((96, 128), np.uint8)
    sky[:10, 5:] = 255
    Image.fromarray(np.kron(sky, np.ones((scale, scale), np.uint8))).save(folder / "skymap_left_0001.png")
    reader = Spring.open(root)
    frame = reader.read(0, [0])[0]
    np.testing.assert_array_equal(frame.sky, sky > 0)
    np.testing.assert_array_equal(frame.valid, sky == 0)
    with pytest.raises(DataError, match=r"skymap_left_0002\.png: there is no such file; expected a sky map"):
        reader.read(0, [1])


def test_frames_with_a_broken_camera_are_left_out(root, world):
    poses = np.loadtxt(root / "train/0001/cam_data/extrinsics.txt")
    poses[1] = np.nan
    np.savetxt(root / "train/0001/cam_data/extrinsics.txt", poses)
    reader = Spring.open(root)
    assert reader.frame_count(0) == 3
    assert_is_world(reader.read(0, [0, 1, 2]), world, numbers=[0, 2, 3], depth_error=5e-3)


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="in the split train only, not in 'test'"):
        Spring.open(root, "test")
    with pytest.raises(DataError, match="train: there is no such file or folder; expected the folder of sequences"):
        Spring.open(tmp_path_factory.mktemp("empty"))
    np.savetxt(root / "train/0001/cam_data/intrinsics.txt", np.ones((3, 4)))
    with pytest.raises(DataError, match=r"intrinsics\.txt: 3 rows, extrinsics\.txt beside it 4; expected one a frame"):
        Spring.open(root).frame_count(0)


def test_a_damaged_file_is_named(root):
    (root / "train/0001/disp1_left/disp1_left_0003.dsp5").write_bytes(b"no HDF5")
    reader = Spring.open(root)
    with pytest.raises(DataError, match=r"disp1_left_0003\.dsp5: expected an HDF5 file with a data set named 'dispa"):
        reader.read(0, [2])
    with h5py.File(root / "train/0001/disp1_left/disp1_left_0002.dsp5", "w") as file:
        file["disparity"] = np.ones((96, 128))
    with pytest.raises(DataError, match=r"disp1_left_0002\.dsp5: shape \(96, 128\), expected twice the image's 96 x"):
        reader.read(0, [1])
