"""MegaDepth: written by its published conventions, read back as the room that it shows."""

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from world_cases import HALF_ROOM, World, assert_is_world, assert_reprojects, camera_path

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.megadepth import MegaDepth

h5py = pytest.importorskip("h5py")
# Photographs of 127 x 85 pixels, focal length 105, without distortion, become 61 x 41: (61 - 1) / (127 - 1) and
# (41 - 1) / (85 - 1) from the middle of the first pixel to that of the last are both 1 / 2.1, and 105 / 2.1 is 50.
CAMERA = "7 SIMPLE_RADIAL 127 85 105 63.5 42.5 0"
SEEN = [[1, 2, 3, 4], [3, 4, 5], [2, 3, 4, 9], [8]]  # points of the model


@pytest.fixture(scope="module")
def world():
    """The room as `world_cases.room` draws it, by a camera with square pixels and its principal point in the middle."""
    intrinsics, poses = np.array([[50, 0, 30.5], [0, 50, 20.5], [0, 0, 1.0]]), camera_path(4)
    u, v = np.meshgrid(np.arange(61) + 0.5, np.arange(41) + 0.5)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
    directions = np.einsum("tij,vuj->tvui", poses[:, :3, :3], rays)
    origins = poses[:, None, None, :3, 3]
    depth = ((np.sign(directions) * HALF_ROOM - origins) / directions).min(-1)
    points = origins + depth[..., None] * directions
    return World(np.rint(127.5 + 100 * np.sin(2.0 * points)).astype(np.uint8), depth, intrinsics, poses)


def name_of(t):
    return f"{4000 - t}_o.{'JPG' if t == 1 else 'jpg'}"


def write_model(folder, world, camera=CAMERA):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(f"# Camera list\n#   ...\n# Number of cameras: 1\n{camera}\n")
    lines = ["# Image list", "#   IMAGE_ID, QW, ...", "#   POINTS2D[] as (X, Y, POINT3D_ID)", "# Number of images: 4"]
    for t, points in enumerate(SEEN):
        rotation = world.cam_to_world[t, :3, :3].T
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        translation = -rotation @ world.cam_to_world[t, :3, 3]
        lines.append(" ".join(map(str, (t + 1, w, x, y, z, *translation, 7, name_of(t)))))
        lines.append(" ".join(f"10.5 20.5 {point}" for point in [-1, *points, points[0]]))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path, world):
    dense = tmp_path / "MegaDepth_v1/0042/dense1"
    for folder in ("imgs", "depths"):
        (dense / folder).mkdir(parents=True)
    for t, (picture, depth) in enumerate(zip(world.frames, world.depth, strict=True)):
        Image.fromarray(picture).save(dense / "imgs" / name_of(t), format="JPEG", quality=95)
        with h5py.File(dense / f"depths/{4000 - t}_o.h5", "w") as file:
            file["depth"] = depth.astype(np.float32)
    write_model(tmp_path / "MegaDepth_v1_SfM/0042/sparse/manhattan/1", world)
    (tmp_path / "MegaDepth_v1/0042/dense0/imgs").mkdir(parents=True)  # without a model
    (tmp_path / "MegaDepth_v1/0015/dense0/imgs").mkdir(parents=True)
    write_model(tmp_path / "MegaDepth_v1_SfM/0015/sparse/manhattan/0", world)
    return tmp_path


def test_a_model_is_read_back(root, world):
    reader = MegaDepth.open(root)
    assert reader.sequences == ("MegaDepth_v1/0042/dense1",)
    assert (reader.info(0).metric, reader.info(0).ordered) == (False, False)
    assert reader.frame_count(0) == 4
    frames = reader.read(0, [3, 2, 1, 0])  # names fall, so that the order of names is the reverse
    assert_is_world(frames, world, depth_error=1e-6)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_neighbours_share_most_points_first(root):
    reader = MegaDepth.open(root)
    # by name: t = 3, 2, 1, 0; t = 0 shares three points with t = 2 and two with t = 1
    assert [list(reader.neighbours(0, frame)) for frame in range(4)] == [[], [3, 2], [1, 3], [1, 2]]


def test_the_camera_of_an_undistorted_photograph_is_its_largest_without_blank_pixels(root, world):
    """Barrel distortion: the middles of the borders, drawn in least, bound the rectangle."""
    k = -0.1
    model = root / "MegaDepth_v1_SfM/0042/sparse/manhattan/1"
    write_model(model, world, f"7 SIMPLE_RADIAL 127 85 105 63.5 42.5 {k}")
    intrinsics = MegaDepth.open(root).read(0, [0])[0].intrinsics
    focal = 0
    for photograph, undistorted in ((127, 61), (85, 41)):
        distorted = (photograph - 1) / 2 / 105
        radii = np.roots([k, 0, 1, -distorted])  # r (1 + k r^2) = distorted
        edge = min(r.real for r in radii if abs(r.imag) < 1e-9 and r.real > 0)
        focal = max(focal, (undistorted - 1) / 2 / edge)
    assert focal < 49.5
    np.testing.assert_allclose(intrinsics, [[focal, 0, 30.5], [0, focal, 20.5], [0, 0, 1]], rtol=1e-4)


def test_files_of_order_hold_no_valid_depth(root):
    path = root / "MegaDepth_v1/0042/dense1/depths/4000_o.h5"
    with h5py.File(path, "r+") as file:
        file["depth"][:5] = -1
    assert not MegaDepth.open(root).read(0, [3])[0].valid.any()


def test_frames_without_a_pose_or_a_file_are_left_out(root, world):
    dense = root / "MegaDepth_v1/0042/dense1"
    (dense / "depths/3997_o.h5").unlink()
    (dense / "imgs/3998_o.jpg").rename(dense / "imgs/4444_o.jpg")
    reader = MegaDepth.open(root)
    assert reader.frame_count(0) == 2
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[1, 0])
    assert list(reader.neighbours(0, 0)) == [1]


@pytest.mark.parametrize("folder", ["MegaDepth_SfM_v1", "MegaDepth_v1"])
def test_the_models_may_lie_elsewhere(root, world, folder):
    (root / "MegaDepth_v1_SfM").rename(root / "old")
    write_model(root / folder / "0042/sparse/manhattan/1", world)
    assert MegaDepth.open(root).sequences == ("MegaDepth_v1/0042/dense1",)


def test_the_held_out_scenes_are_val(root):
    assert MegaDepth.open(root, "val").sequences == ("MegaDepth_v1/0015/dense0",)


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(
        DataError, match=r"MegaDepth_v1: there is no such .* expected the folder of scenes with pictures"
    ):
        MegaDepth.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="no split 'test', expected train or val"):
        MegaDepth.open(root, "test")
    (root / "MegaDepth_v1_SfM").rename(root / "old")
    with pytest.raises(DataError, match="holds no SCENE/denseK/imgs of the split with a model SCENE/sparse/manhattan"):
        MegaDepth.open(root)


def test_a_damaged_file_is_named(root, world):
    (root / "MegaDepth_v1/0042/dense1/depths/4000_o.h5").write_bytes(b"no depth")
    with pytest.raises(DataError, match=r"4000_o\.h5: expected an HDF5 file with a data set named 'depth'"):
        MegaDepth.open(root).read(0, [3])
    cameras = root / "MegaDepth_v1_SfM/0015/sparse/manhattan/0/cameras.txt"
    for folder in ("imgs", "depths"):
        (root / "MegaDepth_v1/0015/dense0" / folder).mkdir(exist_ok=True)
        (root / "MegaDepth_v1/0015/dense0" / folder / f"4000_o.{'jpg' if folder == 'imgs' else 'h5'}").touch()
    cameras.write_text(CAMERA.replace("7", "8", 1))
    with pytest.raises(DataError, match=r"cameras\.txt: no camera 7, which 4000_o\.jpg has"):
        MegaDepth.open(root, "val").frame_count(0)
