"""OmniWorld-Game: written by its published conventions, read back as the room that it shows."""

import json

import numpy as np
import pytest
from PIL import Image
from ray_cases import seen
from scipy.spatial.transform import Rotation
from world_cases import assert_is_world, assert_reprojects, camera_path

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.omniworld import OmniWorldGame

UID = "b04f88d1f85a"
SPLITS = [[0, 1, 2], [4, 3], [5]]  # a frame's number in its video


@pytest.fixture(scope="module")
def world():
    """Six frames with square pixels: the format has one focal length."""
    return seen(np.array([[50.0, 0, 33.5], [0, 50, 22], [0, 0, 1]]), camera_path(6), 48, 64)


@pytest.fixture
def root(tmp_path, world):
    scene = tmp_path / UID
    for folder in ("color", "depth", "camera"):
        (scene / folder).mkdir(parents=True)
    for t in range(6):
        Image.fromarray(world.frames[t]).save(scene / f"color/{t:06d}.png")
        # z = d / (1000 - 999 d) / 0.004, solved for d
        near = 0.004 * world.depth[t]
        buffer = 1000 * near / (1 + 999 * near)
        Image.fromarray(np.rint(buffer * 65535).astype(np.uint16)).save(scene / f"depth/{t:06d}.png")
    (scene / "split_info.json").write_text(json.dumps({"scene_name": UID, "split": SPLITS}))
    for k, numbers in enumerate(SPLITS):
        to_camera = world.cam_to_world[numbers, :3, :3].transpose(0, 2, 1)
        x, y, z, w = Rotation.from_matrix(to_camera).as_quat().T
        camera = {
            "focals": [50.0 for _ in numbers],
            "cx": world.intrinsics[0, 2],
            "cy": world.intrinsics[1, 2],
            "quats": np.stack([w, x, y, z], -1).tolist(),
            "trans": [(-r @ world.cam_to_world[t, :3, 3]).tolist() for t, r in zip(numbers, to_camera, strict=True)],
        }
        (scene / f"camera/split_{k}.json").write_text(json.dumps(camera))
    (tmp_path / "metadata").mkdir()
    write_table(tmp_path, f'{UID},6,3,"1,7"')
    return tmp_path


def write_table(root, *rows, header="UID,Img Num,Split Num,Test Split Index"):
    (root / "metadata/omniworld_game_metadata.csv").write_text("\n".join([header, *rows]))


def change_camera(root, number, **fields):
    path = root / UID / f"camera/split_{number}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_each_split_is_a_sequence_that_is_read_back(root, world):
    reader = OmniWorldGame.open(root)
    assert reader.sequences == (f"{UID}/camera/split_0.json", f"{UID}/camera/split_2.json")
    assert [reader.frame_count(index) for index in range(2)] == [3, 1]
    assert (reader.info(0).metric, reader.info(0).dynamic) == (False, True)
    frames = reader.read(0, range(3))
    assert_is_world(frames, world, numbers=[0, 1, 2], colour_error=0)
    assert_reprojects(frames)
    last = reader.read(1, [0])
    assert_is_world(last, world, numbers=[5], colour_error=0)
    np.testing.assert_allclose(last[0].cam_to_world[:3, 3], [-0.5, 0.05, -1.1], atol=1e-6)


def test_the_benchmarks_splits_are_left_out_of_training_and_can_be_read_alone(root, world):
    reader = OmniWorldGame.open(root, "test")
    assert reader.sequences == (f"{UID}/camera/split_1.json",)
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[4, 3], colour_error=0)  # in the split's own order
    write_table(root, f"{UID},6,3,")
    assert len(OmniWorldGame.open(root)) == 3


def test_what_is_too_near_is_not_valid_and_the_sky_is_told(root):
    path = root / UID / "depth/000000.png"
    buffer = np.array(Image.open(path)).astype(np.uint16)
    buffer[0, :6] = [0, 98, 99, 65500, 65501, 65535]  # 0.0015 * 65535 = 98.3
    Image.fromarray(buffer).save(path)
    frame = OmniWorldGame.open(root).read(0, [0])[0]
    assert frame.valid[0, :6].tolist() == [False, False, True, True, False, False]
    assert frame.sky[0, :6].tolist() == [False, False, False, False, True, True]
    assert frame.sky.sum() == 2
    assert frame.depth[0, 3] == pytest.approx(65500 / 65535 / (1000 - 999 * 65500 / 65535) / 0.004, rel=1e-6)


def test_frames_with_a_broken_camera_are_left_out(root, world):
    camera = json.loads((root / UID / "camera/split_0.json").read_text())
    camera["trans"][1][2] = float("nan")
    change_camera(root, 0, trans=camera["trans"])
    reader = OmniWorldGame.open(root)
    assert reader.frame_count(0) == 2
    assert_is_world(reader.read(0, [0, 1]), world, numbers=[0, 2])


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match="splits train and test, not 'val'"):
        OmniWorldGame.open(root, "val")
    with pytest.raises(DataError, match=r"omniworld_game_metadata\.csv: there is no .* expected the table of test spl"):
        OmniWorldGame.open(tmp_path_factory.mktemp("empty"))
    write_table(root, "0b3caf48b79d,6,3,")
    with pytest.raises(DataError, match=rf"metadata\.csv: no row for {UID}; expected one for every scene"):
        OmniWorldGame.open(root)
    write_table(root, f"{UID},6,3", header="UID,Img Num,Split Num")
    with pytest.raises(DataError, match=r"metadata\.csv: expected a CSV file with the columns UID, Test Split Index"):
        OmniWorldGame.open(root)


def test_a_damaged_file_is_named(root):
    (root / UID / "depth/000002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"depth/000002\.png: expected a 16-bit PNG"):
        OmniWorldGame.open(root).read(0, [2])
    change_camera(root, 2, focals=[50.0, 50.0])
    with pytest.raises(DataError, match=r"split_2\.json: expected focals, cx, cy, quats and trans of 1 frames"):
        OmniWorldGame.open(root).frame_count(1)
    (root / UID / "split_info.json").write_text('{"split": [[0, 1, 2]]}')
    write_table(root, f"{UID},6,3,")
    with pytest.raises(DataError, match=r'split_info\.json: expected "split", a list of lists of frame numbers'):
        OmniWorldGame.open(root).frame_count(1)
