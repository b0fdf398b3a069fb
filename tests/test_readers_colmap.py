"""COLMAP's text files: the examples of its documentation, and broken ones."""

import numpy as np
import pytest

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.colmap import intrinsics_of, read_cameras, read_images

CAMERAS = """# Camera list with one line of data per camera:
#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]
# Number of cameras: 3
1 SIMPLE_PINHOLE 3072 2304 2559.81 1536 1152
2 PINHOLE 3072 2304 2560.56 2560.57 1536 1152.5
7 SIMPLE_RADIAL 3072 2304 2559.69 1536 1152 -0.0218531
"""
IMAGES = """# Image list with two lines of data per image:
1 0.7071067811865476 0 0.7071067811865476 0 1 2 3 1 P 1180141.JPG
2362.39 248.498 58396 1784.7 268.254 59027 1784.7 268.254 -1
2 1 0 0 0 0.5 -0.25 4 2 b/P1180142.JPG

3 2 0 0 0 0 0 0 2 c.JPG
1190.83 663.957 23056"""


def test_cameras(tmp_path):
    (tmp_path / "cameras.txt").write_text(CAMERAS)
    cameras = read_cameras(tmp_path / "cameras.txt")
    assert list(cameras) == [1, 2, 7]
    model, width, height, params = cameras[7]
    assert (model, width, height, list(params)) == ("SIMPLE_RADIAL", 3072, 2304, [2559.69, 1536, 1152, -0.0218531])
    intrinsics, lens = intrinsics_of(cameras[7], tmp_path)
    assert intrinsics.tolist() == [[2559.69, 0, 1536], [0, 2559.69, 1152], [0, 0, 1]]
    assert lens.tolist() == [-0.0218531, 0, 0, 0]
    assert intrinsics_of(cameras[2], tmp_path)[0].tolist() == [[2560.56, 0, 1536], [0, 2560.57, 1152.5], [0, 0, 1]]


def test_images_with_and_without_points(tmp_path):
    (tmp_path / "images.txt").write_text(IMAGES)
    images = read_images(tmp_path / "images.txt")
    assert list(images) == ["P 1180141.JPG", "b/P1180142.JPG", "c.JPG"]
    camera_id, world_to_cam, point_ids = images["P 1180141.JPG"]
    assert (camera_id, list(point_ids)) == (1, [58396, 59027])
    quarter_about_y = [[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(world_to_cam, quarter_about_y, atol=1e-12)
    assert images["b/P1180142.JPG"].point_ids.size == 0
    assert images["b/P1180142.JPG"].world_to_cam[:3, 3].tolist() == [0.5, -0.25, 4]
    assert list(images["c.JPG"].point_ids) == [23056]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "images.txt"
    path.write_text(IMAGES.replace("2 1 0 0 0 0.5", "2 1 0 0 0"))
    with pytest.raises(DataError, match=r"images.txt, line 4: expected COLMAP's images.txt"):
        read_images(path)
    path.write_text(IMAGES.replace(" 59027", ""))
    with pytest.raises(DataError, match=r"images.txt, line 2: expected"):
        read_images(path)
    path.write_text(CAMERAS.replace("3072 2304 2560", "wide"))
    with pytest.raises(DataError, match=r"images.txt, line 5: expected COLMAP's cameras.txt"):
        read_cameras(path)
    with pytest.raises(DataError, match=r"none.txt: there is no such file; expected COLMAP's cameras.txt"):
        read_cameras(tmp_path / "none.txt")


def test_a_camera_model_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "cameras.txt").write_text("1 FOV 640 480 500 500 320 240 0.9\n2 PINHOLE 640 480 500 320 240\n")
    cameras = read_cameras(tmp_path / "cameras.txt")
    with pytest.raises(DataError, match=r"a camera of model FOV, expected one of SIMPLE_PINHOLE, PINHOLE"):
        intrinsics_of(cameras[1], tmp_path / "cameras.txt")
    with pytest.raises(DataError, match=r"PINHOLE with 3 parameters, expected 4"):
        intrinsics_of(cameras[2], tmp_path / "cameras.txt")
