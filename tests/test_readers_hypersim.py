"""Hypersim: written by its published conventions, read back as the room that it shows."""

import csv
import dataclasses

import h5py
import numpy as np
import pytest
from PIL import Image
from world_cases import assert_is_world, assert_reprojects, room, rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.hypersim import Hypersim, tone_map

METRES_PER_UNIT = 0.0254
STRAIGHT = np.eye(3)
FLIP = np.diag([1.0, -1.0, -1.0])  # OpenGL's axes and OpenCV's: y and z point the other way
SPLITS = [
    "scene_name",
    "camera_name",
    "frame_id",
    "included_in_public_release",
    "exclude_reason",
    "split_partition_name",
]


def brightness(linear):
    return 0.3 * linear[..., 0] + 0.59 * linear[..., 1] + 0.11 * linear[..., 2]


@pytest.fixture(scope="module")
def world():
    """The room, exposed so that the brightness that 90 of 100 pixels stay below is 0.8 on the screen."""
    world = room()
    linear = (world.frames / 255.0) ** 2.2
    bright = np.array([np.percentile(brightness(picture[8:]), 90) for picture in linear])
    exposed = linear * (0.8**2.2 / bright)[:, None, None, None]
    return dataclasses.replace(world, frames=np.rint(255 * exposed.clip(0, 1) ** (1 / 2.2)).astype(np.uint8))


def projection(intrinsics, turn=STRAIGHT):
    """OpenGL's matrix [4, 4] of a pinhole of 64 x 48 pixels that is turned against the camera whose axes are stored."""
    to_screen = np.array([[2 / 64, 0, -1], [0, -2 / 48, 1], [0, 0, 1]])
    x, y, w = to_screen @ intrinsics @ turn @ FLIP
    return np.array([[*x, 0], [*y, 0], [0, 0, -1.002, -2.002], [*w, 0]])


def write_hdf5(path, array):
    with h5py.File(path, "w") as file:
        file["dataset"] = array


def write_scene(root, scene, world, turn=STRAIGHT, preview=False):
    detail, images = root / scene / "_detail", root / scene / "images"
    (detail / "cam_00").mkdir(parents=True)
    (detail / "metadata_scene.csv").write_text(
        f"parameter_name,parameter_value\nmeters_per_asset_unit,{METRES_PER_UNIT}\n"
    )
    positions = world.cam_to_world[:, :3, 3] / METRES_PER_UNIT
    write_hdf5(detail / "cam_00/camera_keyframe_positions.hdf5", positions)
    orientations = np.stack([pose[:3, :3] @ turn @ FLIP for pose in world.cam_to_world])
    write_hdf5(detail / "cam_00/camera_keyframe_orientations.hdf5", orientations)
    colours = images / f"scene_cam_00_final_{'preview' if preview else 'hdf5'}"
    geometry = images / "scene_cam_00_geometry_hdf5"
    colours.mkdir(parents=True)
    geometry.mkdir()
    u, v = np.meshgrid(np.arange(64) + 0.5, np.arange(48) + 0.5)
    (fx, _, cx), (_, fy, cy) = world.intrinsics[:2]
    for t, (picture, depth) in enumerate(zip(world.frames, world.depth, strict=True)):
        if preview:
            Image.fromarray(picture).save(colours / f"frame.{t:04d}.tonemap.jpg", quality=95)
        else:
            write_hdf5(colours / f"frame.{t:04d}.color.hdf5", (7.0 * (picture / 255.0) ** 2.2).astype(np.float32))
        along_ray = depth * np.sqrt(((u - cx) / fx) ** 2 + ((v - cy) / fy) ** 2 + 1)
        along_ray[2:5, 3:9] = np.nan
        write_hdf5(geometry / f"frame.{t:04d}.depth_meters.hdf5", along_ray.astype(np.float32))
        entity = np.full((48, 64), 12, np.int32)
        entity[:8] = -1  # the exposure is that of the rest
        write_hdf5(geometry / f"frame.{t:04d}.render_entity_id.hdf5", entity)


def write_tables(root, projections, excluded=()):
    cells = [f"M_proj_{i}{j}" for i in range(4) for j in range(4)]
    with open(root / "metadata_camera_parameters.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scene_name", "settings_output_img_height", "settings_output_img_width", *cells])
        for scene, matrix in projections.items():
            writer.writerow([scene, 48.0, 64.0, *np.ravel(matrix)])
    with open(root / "metadata_images_split_scene_v1.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(SPLITS)
        for scene in projections:
            for frame in range(4):
                public = (scene, frame) not in excluded
                writer.writerow(
                    [scene, "cam_00", frame, public, "" if public else "FLAGGED", "train" if public else ""]
                )
        writer.writerow(["ai_009_001", "cam_00", 0, True, "", "val"])


@pytest.fixture
def root(tmp_path, world):
    write_scene(tmp_path, "ai_001_001", world)
    write_tables(tmp_path, {"ai_001_001": projection(world.intrinsics)})
    return tmp_path


def test_a_scene_is_read_back(root, world):
    reader = Hypersim.open(root)
    assert (len(reader), reader.frame_count(0)) == (1, 4)
    assert reader.describe(0).endswith("ai_001_001/_detail/cam_00")
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, colour_error=0.6)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)
    assert not frames[0].valid[2:5, 3:9].any()
    assert (~frames[0].valid).sum() == 18
    assert_reprojects(frames)


def test_a_tilted_image_plane_goes_to_intrinsics_and_pose(tmp_path, world):
    """Seven degrees are more than half of the published scenes have, 41 the most."""
    turn = rotation(0.3, -0.6, 0.02)
    write_scene(tmp_path, "ai_001_001", world, turn)
    write_tables(tmp_path, {"ai_001_001": projection(world.intrinsics, turn)})
    frames = Hypersim.open(tmp_path).read(0, range(4))
    assert_is_world(frames, world, colour_error=0.6)
    assert_reprojects(frames)


def test_the_usual_projection_by_hand(tmp_path, world):
    """Sixty degrees across 64 pixels, as most scenes have: 32 / tan(30 degrees)."""
    write_scene(tmp_path, "ai_001_001", world)
    usual = [[3**0.5, 0, 0, 0], [0, 4 / 3**0.5, 0, 0], [0, 0, -1.002, -2.002], [0, 0, -1, 0]]
    write_tables(tmp_path, {"ai_001_001": usual})
    (frame,) = Hypersim.open(tmp_path).read(0, [0])
    np.testing.assert_allclose(frame.intrinsics, [[55.42563, 0, 32], [0, 55.42563, 24], [0, 0, 1]], atol=1e-4)


def test_a_scene_that_no_pinhole_fits_is_left_out(root, world):
    write_scene(root, "ai_001_002", world)
    askew = projection(world.intrinsics)
    askew[0, 1] = 0.01
    write_tables(root / ".", {"ai_001_001": projection(world.intrinsics), "ai_001_002": askew})
    assert Hypersim.open(root).sequences == ("ai_001_001/_detail/cam_00",)


def test_frames_that_are_not_public_or_have_no_pose_are_left_out(tmp_path, world):
    lost = world.cam_to_world.copy()
    lost[0] = np.nan
    write_scene(tmp_path, "ai_001_001", dataclasses.replace(world, cam_to_world=lost))
    write_tables(tmp_path, {"ai_001_001": projection(world.intrinsics)}, excluded=[("ai_001_001", 2)])
    reader = Hypersim.open(tmp_path)
    assert reader.frame_count(0) == 2
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[1, 3], colour_error=0.6)


def test_previews_are_read_where_the_high_dynamic_range_was_not_downloaded(tmp_path, world):
    write_scene(tmp_path, "ai_001_001", world, preview=True)
    write_tables(tmp_path, {"ai_001_001": projection(world.intrinsics)})
    assert_is_world(Hypersim.open(tmp_path).read(0, range(4)), world, colour_error=4)


def test_tone_mapping_by_hand():
    colour = np.zeros((1, 11, 3))
    colour[0, :, :] = np.arange(11)[:, None]  # brightness 0 to 10: 9 is what 90 of 100 stay below
    mapped = tone_map(colour, np.ones((1, 11), bool))
    assert mapped[0, 9].tolist() == [204, 204, 204]  # 0.8 of 255
    assert mapped[0, 0].tolist() == [0, 0, 0]
    assert tone_map(1e-6 * colour, np.ones((1, 11), bool)).max() == 0
    assert tone_map(colour, np.zeros((1, 11), bool))[0, 1].tolist() == [255, 255, 255]


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(
        DataError, match=r"metadata_images_split_scene_v1.csv: there is no .* from Hypersim's repository"
    ):
        Hypersim.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="has no split 'test', expected one of train, val"):
        Hypersim.open(root, "test")
    with pytest.raises(DataError, match=r"holds no SCENE/_detail/cam_XX of the split's scenes"):
        Hypersim.open(root, "val")


def test_a_damaged_file_is_named(root):
    geometry = root / "ai_001_001/images/scene_cam_00_geometry_hdf5"
    (geometry / "frame.0002.depth_meters.hdf5").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"frame\.0002\.depth_meters\.hdf5: expected an HDF5 file"):
        Hypersim.open(root).read(0, [2])
    (root / "metadata_images_split_scene_v1.csv").write_text("scene_name,frame_id\n")
    with pytest.raises(DataError, match=r"expected a CSV file .*it has no camera_name, included_in_public_release"):
        Hypersim.open(root / "." / "ai_001_001" / "..")
