"""The picture of samples: what it draws, and where."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scannet_cases import write_scannet
from world_cases import HALF_ROOM, room

from omnistream_jax.data import command, picture, show
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.base import posed_frame
from omnistream_jax.data.schema import CaptionedImage, Sample, SequenceInfo


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    worlds = {f"scene000{n}_00": room(12) for n in range(5)}
    return write_scannet(tmp_path_factory.mktemp("scannet"), worlds)


def run(*arguments) -> int:
    show.FLAGS.unparse_flags()
    for name in show.FLAGS:
        show.FLAGS[name].unparse()
    return command.run(show.main, show.FLAGS, "", ["show", *map(str, arguments)])


def test_the_command_writes_a_picture_of_samples_spread_over_the_set(root, tmp_path, capsys):
    output = tmp_path / "samples.png"
    arguments = (f"--source={root}", f"--output={output}", "--count=3", "--frames=4", "--stride=2", "--height=60")
    assert run("--dataset=scannet", *arguments) == 0
    assert capsys.readouterr().out == f"3 samples: {output}\n"
    image = np.asarray(Image.open(output))
    assert image.shape[0] > 3 * 2 * 60
    assert image.shape[1] > 4 * 80 + 120
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1000
    assert sorted(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(("name", "width"), [("world", 6), ("world_videos", 3), ("world_captions", 5)])
def test_the_world_is_shown_without_a_folder(tmp_path, capsys, name, width):
    output = tmp_path / "samples.png"
    arguments = ("--source=train", f"--output={output}", "--count=2", "--frames=3", "--height=40", "--option=size=48")
    assert run(f"--dataset={name}", *arguments) == 0
    assert capsys.readouterr().out == f"2 samples: {output}\n"
    image = np.asarray(Image.open(output))
    assert image.shape[0] > 2 * 40
    assert image.shape[1] >= width * 40
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1000
    assert run(f"--dataset={name}", "--source=nowhere", f"--output={output}") == 1
    assert "error: world: 'nowhere' is no split" in capsys.readouterr().err


def test_a_damaged_sample_is_told_and_the_others_are_shown(tmp_path, capsys):
    root = write_scannet(tmp_path / "in", {"scene0000_00": room(3), "scene0001_00": room(3)})
    for path in (root / "scans/scene0000_00/depth").iterdir():
        path.write_bytes(b"no picture")
    output = tmp_path / "samples.png"
    assert run("--dataset=scannet", f"--source={root}", f"--output={output}") == 0
    told = capsys.readouterr()
    assert "1 samples" in told.out
    assert "scene0000_00/depth/0.png: expected a 16-bit PNG" in told.err
    for path in (root / "scans/scene0001_00/depth").iterdir():
        path.write_bytes(b"no picture")
    assert run("--dataset=scannet", f"--source={root}", f"--output={output}") == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "--dataset=... is required"),
        (("--dataset=scannet",), 2, "--source=... is required"),
        (("--dataset=scannett", "--source=x"), 2, "did you mean scannet?"),
        (("--dataset=scannet", "--source=x"), 1, "x/scans: there is no such file or folder"),
        (("--dataset=scannet", "--source=x", "--output=x.gif"), 2, "expected a name that ends with .png or .jpg"),
        (("--dataset=scannet", "--source=x", "--frames=0"), 2, "flag --frames=0"),
    ],
)
def test_wrong_flags_are_one_message(capsys, arguments, status, message):
    assert run(*arguments) == status
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_help_names_the_flags(capsys):
    assert run("--help") == 0
    assert "--stride" in capsys.readouterr().out


def test_frames_come_from_the_middle_at_a_stride_that_fits():
    assert show.middle(100, 3, 10) == [39, 49, 59]
    assert show.middle(7, 4, 10) == [0, 2, 4, 6]
    assert show.middle(2, 6, 10) == [0, 1]
    assert show.middle(5, 1, 10) == [2]
    assert show.spread(10, 4) == [0, 3, 6, 9]
    assert show.spread(2, 4) == [0, 1]


def frames_of(world):
    cameras = zip(world.frames, world.depth, world.cam_to_world, strict=True)
    return [posed_frame(image, world.intrinsics, depth, pose, "x") for image, depth, pose in cameras]


def test_depth_is_red_where_near_blue_where_far_and_grey_where_unknown():
    depth = np.array([[1.0, 2.0, 0.0, 0.0]])
    sky = np.array([[False, False, False, True]])
    frame = posed_frame(np.zeros((1, 4, 3), np.uint8), np.eye(3), depth, None, "x", sky=sky)
    near, far, unknown, above = np.asarray(picture.depth_picture(frame, (1.0, 2.0)))[0].astype(int)
    assert near[0] > near[2] + 100
    assert far[2] > far[0]
    assert tuple(unknown) == (60, 60, 60)
    assert tuple(above) == (190, 220, 245)


def test_points_of_all_frames_lie_on_the_walls_and_are_drawn():
    world = room(4)
    frames = frames_of(world)
    points = np.concatenate([picture._points(frame)[0] for frame in frames])
    np.testing.assert_allclose((np.abs(points) / HALF_ROOM).max(-1), 1, atol=1e-3)  # 1 on a wall
    drawn = np.asarray(picture.view_from_above(frames, world.cam_to_world[:, :3, 3], 200, "m"))
    assert (drawn != 245).any(-1).sum() > 500


def test_a_camera_and_its_path_are_drawn_where_they_are():
    """A camera that goes one unit to the right and one forward: the path runs up and to the right at 45 degrees."""
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, 3] = 1, 0, 1
    image = np.zeros((4, 4, 3), np.uint8)
    frames = [posed_frame(image, np.array([[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]), None, pose, "x") for pose in poses]
    drawn = np.asarray(picture.view_from_above(frames, poses[:, :3, 3], 230, "m")).astype(int)
    # 1.15 units fit 230 pixels; the cameras stand 15 pixels from the edges.
    for step in (0.3, 0.5, 0.7):
        column, row = round(15 + 200 * step), round(230 - 15 - 200 * step)
        assert drawn[row - 1 : row + 2, column - 1 : column + 2].min() < 60
        assert drawn[row - 1 : row + 2, 230 - column - 1 : 230 - column + 2].min() > 200 or step == 0.5


def test_frames_without_poses_and_depth_can_be_drawn():
    frame = posed_frame(np.zeros((20, 30, 3), np.uint8), np.eye(3), None, None, "x")
    assert picture.depth_range([frame]) is None
    assert picture.view_from_above([frame], np.zeros((0, 3)), 100, "m").size == (100, 100)


@dataclasses.dataclass(frozen=True)
class Unordered:
    name: str = "photographs"

    def __len__(self):
        return 1

    def describe(self, index):
        return "place"

    def info(self, index):
        return SequenceInfo(metric=False, dynamic=False, ordered=False)

    def frame_count(self, index):
        return 4

    def neighbours(self, index, frame):
        return {2: [0, 3]}[frame]

    def read(self, index, frames):
        found = frames_of(room(4))
        return [found[number] for number in frames]


def test_photographs_without_order_are_shown_with_those_that_see_the_same():
    source = Unordered()
    drawn = show.draw_sequence(source, 0, 6, 10, 40)
    assert drawn.size[1] > 80
    with pytest.raises(DataError, match="has no frame"):
        show.draw_sequence(Empty(), 0, 6, 10, 40)


class Empty(Unordered):
    def frame_count(self, index):
        return 0


@dataclasses.dataclass(frozen=True)
class Captions:
    name: str = "captions"

    def read(self, index):
        image = np.full((50, 100, 3), 200, np.uint8)
        boxes = np.array([[0.25, 0.2, 0.75, 0.8]], np.float32)
        return CaptionedImage(image, "Where is the dog?", "There.", boxes, ("dog",), "a/b.jpg")


def test_boxes_are_drawn_where_they_are():
    drawn = np.asarray(picture.boxes_picture(Captions().read(0), 100)).astype(int)
    assert drawn.shape == (100, 200, 3)
    for row, column in ((50, 50), (50, 150), (80, 100)):  # left, right and lower edge
        assert np.abs(drawn[row, column] - picture.COLOURS[0]).max() <= 2
    assert tuple(drawn[60, 100]) == (200, 200, 200)
    assert show.draw_caption(Captions(), 0, 6, 10, 50).size[0] > 200 + 150


class Clips:
    name = "clips"
    max_frames = None

    def sample(self, index, rng, frames, stride):
        assert (frames, stride) == (3, (1, 7))
        return Sample(np.zeros((3, 40, 60, 3), np.uint8), "clip.mp4")


def test_frames_of_a_clip_stand_in_a_row():
    assert show.draw_clip(Clips(), 0, 3, 7, 20).size[0] >= 3 * 30


def test_text_is_cut_to_its_place():
    long = picture.text_picture(["word " * 500], 200, 50)
    assert long.size == (200, 50)
    assert Path(show._tail("a" * 300)).name.startswith("...")
