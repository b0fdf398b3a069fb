"""ScanNet++: written by its published conventions (lenses, COLMAP), read back as the room that it shows."""

import numpy as np
import pytest
from lens_cases import assert_sees_the_room, fisheye_rays, radial_rays, seen_along
from PIL import Image
from scipy.spatial.transform import Rotation
from world_cases import assert_reprojects, camera_path

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.scannetpp import ScanNetPP

SCENE = "0a5c013435"
WIDTH, HEIGHT = 160, 120
PHONE, PHONE_LENS = np.array([[120.0, 0, 82], [0, 121, 58], [0, 0, 1]]), (0.06, -0.09, 0.002, -0.001)
DSLR, DSLR_LENS = np.array([[62.0, 0, 79], [0, 62.5, 61], [0, 0, 1]]), (-0.02, 0.01, -0.004, 0.001)
POSES = camera_path(4)


def write_colmap(folder, model, intrinsics, lens, names, poses):
    folder.mkdir(parents=True)
    (fx, _, cx), (_, fy, cy) = intrinsics[:2]
    numbers = " ".join(str(number) for number in (fx, fy, cx, cy, *lens))
    (folder / "cameras.txt").write_text(f"# Camera list\n1 {model} {WIDTH} {HEIGHT} {numbers}\n")
    lines = ["# Image list with two lines of data per image:"]
    for index, (name, pose) in enumerate(zip(names, poses, strict=True), start=1):
        world_to_cam = np.linalg.inv(pose)
        x, y, z, w = Rotation.from_matrix(world_to_cam[:3, :3]).as_quat()
        tx, ty, tz = world_to_cam[:3, 3]
        lines += [f"{index} {w} {x} {y} {z} {tx} {ty} {tz} 1 {name}", "3.5 4.5 17 8 9 -1" if index % 2 else ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


def write_phone(folder, depths=(), registered=range(4)):
    seen = seen_along(radial_rays(PHONE, PHONE_LENS, WIDTH, HEIGHT), PHONE, POSES)
    names = [f"frame_{10 * t:06d}" for t in range(4)]
    paths = [f"video/{names[t]}.jpg" for t in registered]
    write_colmap(folder / "colmap", "OPENCV", PHONE, PHONE_LENS, paths, POSES[list(registered)])
    (folder / "rgb").mkdir()
    for kind, factor in depths:
        (folder / kind).mkdir()
        width, height = WIDTH // factor, HEIGHT // factor
        smaller = np.diag([1 / factor, 1 / factor, 1]) @ PHONE
        measured = seen_along(radial_rays(smaller, PHONE_LENS, width, height), smaller, POSES)
        for name, depth in zip(names, measured.depth, strict=True):
            Image.fromarray(np.rint(1000 * depth).astype(np.uint16)).save(folder / kind / f"{name}.png")
    for name, picture in zip(names, seen.frames, strict=True):
        Image.fromarray(picture).save(folder / f"rgb/{name}.jpg", quality=97)


@pytest.fixture
def root(tmp_path):
    """A scene with both devices; the phone has no depth."""
    scene = tmp_path / "data" / SCENE
    write_phone(scene / "iphone")
    seen = seen_along(fisheye_rays(DSLR, DSLR_LENS, WIDTH, HEIGHT), DSLR, POSES)
    names = [f"DSC{2800 + t:05d}.JPG" for t in range(4)]
    write_colmap(scene / "dslr/colmap", "OPENCV_FISHEYE", DSLR, DSLR_LENS, names, POSES)
    (scene / "dslr/resized_images").mkdir()
    for name, picture in zip(names, seen.frames, strict=True):
        Image.fromarray(picture).save(scene / "dslr/resized_images" / name, format="JPEG", quality=97)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/nvs_sem_train.txt").write_text(f"{SCENE}\nffffffffff\n")
    return tmp_path


def only_phone(tmp_path, **options):
    write_phone(tmp_path / "data" / SCENE / "iphone", **options)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/nvs_sem_train.txt").write_text(f"{SCENE}\n")
    return ScanNetPP.open(tmp_path)


def test_both_devices_see_the_room_through_pinholes(root):
    reader = ScanNetPP.open(root)
    assert [reader.describe(i).partition("/data/")[2] for i in range(2)] == [f"{SCENE}/dslr", f"{SCENE}/iphone"]
    assert reader.frame_count(0) == reader.frame_count(1) == 4
    assert reader.info(0).metric
    for index in range(2):
        frames = reader.read(index, range(4))
        assert_sees_the_room(frames, POSES, colour_error=3)
        np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-5)


def test_the_pinhole_sees_what_the_fisheye_sees_from_top_to_bottom(root):
    """Down the middle are 120 pixels at 62.5 a radian, 110 degrees and one more by k1 to k4: all of them are seen."""
    (frame,) = ScanNetPP.open(root).read(0, [0])
    top, bottom = (np.degrees(np.arctan((v - frame.intrinsics[1, 2]) / frame.intrinsics[1, 1])) for v in (0, HEIGHT))
    assert 109 < bottom - top < 112


def test_depth_goes_through_the_lens_as_the_image_does(tmp_path):
    frames = only_phone(tmp_path, depths=[("render_depth", 1)]).read(0, range(4))
    assert_sees_the_room(frames, POSES, colour_error=3, depth_error=3e-3)
    assert_reprojects(frames)


def test_the_phones_own_depth_is_of_fewer_pixels(tmp_path):
    frames = only_phone(tmp_path, depths=[("depth", 4)]).read(0, range(4))
    assert_sees_the_room(frames, POSES, colour_error=3, depth_error=1.2e-2)


def test_rendered_depth_is_preferred(tmp_path):
    reader = only_phone(tmp_path, depths=[("render_depth", 1), ("depth", 4)])
    assert_sees_the_room(reader.read(0, [0]), POSES[:1], colour_error=3, depth_error=3e-3)


def test_frames_that_colmap_did_not_register_are_left_out(tmp_path):
    reader = only_phone(tmp_path, registered=(3, 1))
    assert reader.frame_count(0) == 2
    assert_sees_the_room(reader.read(0, [0, 1]), POSES[[1, 3]], colour_error=3)


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="data: there is no such file or folder; expected the folder of scenes"):
        ScanNetPP.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match=r"nvs_sem_val.txt: there is no .* expected the list of the split's scenes"):
        ScanNetPP.open(root, "val")
    (root / "splits/nvs_sem_val.txt").write_text("ffffffffff\n")
    with pytest.raises(DataError, match=r"holds no SCENE/\{dslr,iphone\}/colmap/images.txt of the split's scenes"):
        ScanNetPP.open(root, "val")


def test_a_damaged_file_is_named(root):
    reader = ScanNetPP.open(root)
    (root / "data" / SCENE / "dslr/resized_images/DSC02801.JPG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"DSC02801\.JPG"):
        reader.read(0, [1])
    (root / "data" / SCENE / "iphone/depth").mkdir()
    with pytest.raises(DataError, match=r"iphone/depth/frame_000010\.png: there is no such file"):
        reader.read(1, [1])
    Image.new("RGB", (8, 6)).save(root / "data" / SCENE / "iphone/rgb/frame_000020.jpg")
    with pytest.raises(
        DataError, match=r"frame_000020\.jpg: its size \(6, 8\) is not that of its camera, \(120, 160\)"
    ):
        reader.read(1, [2])
