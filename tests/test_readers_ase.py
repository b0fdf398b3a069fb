"""Aria Synthetic Environments: a fisheye camera on its side, read back as the room that it shows."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from ray_cases import hit, seen
from scipy.spatial.transform import Rotation
from world_cases import assert_is_world, assert_reprojects, camera_path, rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.ase import AriaSynthetic, project_fisheye624

SIZE = 176  # a quarter of the published size
PUBLISHED = (
    *(297.6375381033778, 357.6599197217746, 349.1922497127481),
    *(0.3650890375644368, -0.1738082418112771, -0.7534945484033189),
    *(2.434788882752295, -2.57786220300886, 0.8788483538598834),
    *(0.0008005198595407136, -0.000294237814554143, 0.0, 0.0, 0.0, 0.0),
)  # of projectaria_tools 2.3.0, ase.get_ase_rgb_calibration()
PRISM = (0.002, -0.001, -0.003, 0.0015)
SMALL = (PUBLISHED[0] / 4, 89.0, 87.0, *PUBLISHED[3:11], *PRISM)
CAMERA_TO_DEVICE = np.eye(4)
CAMERA_TO_DEVICE[:3, :3], CAMERA_TO_DEVICE[:3, 3] = rotation(0.2, 0.6, -0.1), [-0.01, 0.02, -0.004]


def fisheye_rays(parameters, size):
    """[H, W, 3], of length 1, through each pixel: the model run backwards, step by step, with a table of angles."""
    focal, cx, cy, *k = parameters[:9]
    (p0, p1), (s0, s1, s2, s3) = parameters[9:11], parameters[11:]
    u, v = np.meshgrid((np.arange(size) - cx) / focal, (np.arange(size) - cy) / focal)
    x, y = u, v
    for _ in range(20):
        square = x**2 + y**2
        x, y = (
            u - (2 * x**2 + square) * p0 - 2 * x * y * p1 - s0 * square - s1 * square**2,
            v - (2 * y**2 + square) * p1 - 2 * x * y * p0 - s2 * square - s3 * square**2,
        )
    angles = np.linspace(0, 1.2, 20_000)
    bent = angles + sum(c * angles ** (2 * i + 3) for i, c in enumerate(k))
    assert (np.diff(bent) > 0).all()
    length = np.maximum(np.hypot(x, y), 1e-12)
    angle = np.interp(length, bent, angles)
    return np.stack([np.sin(angle) * x / length, np.sin(angle) * y / length, np.cos(angle)], -1)


@pytest.fixture(scope="module")
def world():
    """What a pinhole camera of the same focal length sees, upright, 8/11 as wide."""
    intrinsics = np.array([[SMALL[0], 0, 64], [0, SMALL[0], 64], [0, 0, 1]])
    return seen(intrinsics, camera_path(4), 128, 128)


@pytest.fixture(scope="module")
def views(world):
    """Image and distance of each frame as the camera takes them, lying on its side, and where the device is."""
    rays, taken = fisheye_rays(SMALL, SIZE), []
    for pose in world.cam_to_world:
        right, down, forward = pose[:3, :3].T
        lying = pose.copy()
        lying[:3, :3] = np.stack([down, -right, forward], -1)  # turned clockwise, its left column is the top row
        distance, picture = hit(rays @ lying[:3, :3].T, lying[:3, 3])
        taken.append((picture, np.rint(1000 * distance).astype(np.uint16), lying @ np.linalg.inv(CAMERA_TO_DEVICE)))
    return taken


@pytest.fixture
def root(tmp_path, views):
    scene = tmp_path / "7"
    for folder in ("rgb", "depth"):
        (scene / folder).mkdir(parents=True)
    head = ["graph_uid", "tracking_timestamp_us", "utc_timestamp_ns"]
    head += [f"{axis}_world_device" for axis in ("tx", "ty", "tz", "qx", "qy", "qz", "qw")]
    lines = [",".join(head)]
    for t, (picture, distance, device) in enumerate(views):
        Image.fromarray(picture).save(scene / f"rgb/vignette{t:07d}.jpg", quality=95)
        Image.fromarray(distance).save(scene / f"depth/depth{t:07d}.png")
        numbers = [*device[:3, 3], *Rotation.from_matrix(device[:3, :3]).as_quat()]
        lines.append(",".join(["31ebacab-fcac-b027", str(100_000 * t), "-1", *map(str, numbers)]))
    (scene / "trajectory.csv").write_text("\n".join(lines) + "\n")
    write_calibration(tmp_path)
    return tmp_path


def write_calibration(root, **changes):
    camera = {
        "model": "fisheye624",
        "image_size": [SIZE, SIZE],
        "parameters": SMALL,
        "camera_to_device": CAMERA_TO_DEVICE.tolist(),
    }
    (root / "calibration.json").write_text(json.dumps(camera | changes))


@pytest.mark.parametrize(
    ("point", "pixel", "pixel_behind_prism"),
    [
        ((0.0, 0.0, 1.0), (357.6599197217746, 349.1922497127481), (357.6599197217746, 349.1922497127481)),
        ((0.3, -0.2, 1.0), (446.9022018311351, 289.7066320775966), (446.9743569080079, 289.59839946228743)),
        ((-0.7, 0.5, 0.9), (146.34589182944802, 500.1940187450263), (146.6270564427691, 499.7722718250447)),
        ((0.9, 0.9, 1.1), (569.6378150907708, 560.8408167186889), (569.935418535038, 560.3944115522881)),
    ],
)
def test_the_projection_is_that_of_projectaria_tools(point, pixel, pixel_behind_prism):
    """Numbers of its version 2.3.0."""
    np.testing.assert_allclose(project_fisheye624(np.array(point), PUBLISHED), pixel, atol=1e-9)
    behind = project_fisheye624(np.array([[point]]), PUBLISHED[:11] + PRISM)
    np.testing.assert_allclose(behind, [[pixel_behind_prism]], atol=1e-9)


def test_a_scene_is_read_back_upright_through_a_pinhole(root, world):
    reader = AriaSynthetic.open(root)
    assert (len(reader), reader.frame_count(0), reader.sequences) == (1, 4, ("7",))
    assert (reader.info(0).metric, reader.info(0).frames_per_second) == (True, 10.0)
    frames = reader.read(0, range(4))
    assert_is_world(frames, world, colour_error=3, depth_error=2e-2)  # at the room's edges; elsewhere:
    errors = [np.abs(frame.depth / depth - 1) for frame, depth in zip(frames, world.depth, strict=True)]
    assert (np.quantile(errors, [0.9, 0.99]) < [3e-4, 6e-3]).all()
    assert all(frame.valid.all() for frame in frames)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_depth_is_not_mixed_across_edges_and_holes(root, views, world):
    """A box before the wall, and a hole beside it: no distance between that of the box and that of the wall."""
    distance = views[0][1].copy()
    distance[60:90, 60:100] //= 3
    distance[60:90, 100:110] = 65535
    Image.fromarray(distance).save(root / "7/depth/depth0000000.png")
    frame = AriaSynthetic.open(root).read(0, [0])[0]
    share = (frame.depth / world.depth[0])[frame.valid]
    near, far = np.abs(share - 1 / 3) < 0.02, np.abs(share - 1) < 0.02
    assert (near | far).all()
    assert 600 < near.sum() < 1800
    assert 100 < (~frame.valid).sum() < 600


def test_frames_without_an_image_or_with_a_broken_pose_are_left_out(root, world):
    (root / "7/rgb/vignette0000002.jpg").unlink()
    path = root / "7/trajectory.csv"
    lines = path.read_text().splitlines()
    lines[1] = ",".join([*lines[1].split(",")[:3], *["nan"] * 7])
    path.write_text("\n".join(lines))
    reader = AriaSynthetic.open(root)
    assert reader.frame_count(0) == 2
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[1, 3], depth_error=2e-2)


def test_without_a_file_the_calibration_is_asked_of_projectaria_tools(root, world, monkeypatch):
    (root / "calibration.json").unlink()
    monkeypatch.setitem(sys.modules, "projectaria_tools", None)
    with pytest.raises(DataError, match=r"calibration\.json: there is no such file, and projectaria_tools is not inst"):
        AriaSynthetic.open(root)
    camera = types.SimpleNamespace(
        get_image_size=lambda: np.array([SIZE, SIZE]),
        get_projection_params=lambda: np.array(SMALL),
        get_transform_device_camera=lambda: types.SimpleNamespace(to_matrix=lambda: CAMERA_TO_DEVICE),
    )
    module = types.ModuleType("projectaria_tools.projects.ase")
    module.get_ase_rgb_calibration = lambda: camera
    for name in ("projectaria_tools", "projectaria_tools.projects", "projectaria_tools.projects.ase"):
        monkeypatch.setitem(sys.modules, name, module)
    assert_is_world(AriaSynthetic.open(root).read(0, [3]), world, numbers=[3], depth_error=2e-2)


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="only the split train, not 'test'"):
        AriaSynthetic.open(root, "test")
    with pytest.raises(DataError, match=r"holds no SCENE/trajectory\.csv"):
        AriaSynthetic.open(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "kb4"}, "model is 'kb4', expected 'fisheye624'"),
        ({"parameters": SMALL[:11]}, r"expected model, image_size \(2\), parameters \(15\)"),
        ({"camera_to_device": [[1.0]]}, r"expected model, image_size \(2\), parameters \(15\)"),
    ],
)
def test_a_wrong_calibration_is_refused(root, change, message):
    write_calibration(root, **change)
    with pytest.raises(DataError, match=rf"calibration\.json: {message}"):
        AriaSynthetic.open(root)


def test_a_damaged_file_is_named(root):
    (root / "7/depth/depth0000000.png").write_bytes(b"no picture")
    Image.new("RGB", (704, 704)).save(root / "7/rgb/vignette0000001.jpg")
    reader = AriaSynthetic.open(root)
    with pytest.raises(DataError, match=r"depth0000000\.png: expected a 16-bit PNG"):
        reader.read(0, [0])
    with pytest.raises(DataError, match=r"vignette0000001\.jpg: 704 x 704 pixels, but the calibration is for \(176, 1"):
        reader.read(0, [1])
    (root / "8").mkdir()
    (root / "8/trajectory.csv").write_text("graph_uid\nuid,1,2,0.5\n")
    with pytest.raises(DataError, match=r"8/trajectory\.csv: expected a header and rows of graph_uid, two times"):
        AriaSynthetic.open(root).frame_count(1)
