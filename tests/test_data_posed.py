"""Posed clips: geometry after a crop agrees with a room whose walls and colours are known in closed form."""

import dataclasses
import itertools

import numpy as np
import pytest
from source_cases import FakePosed, posed_frames
from world_cases import HALF_ROOM, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.posed import Crop, PosedData, cut_frame, default_stride, draw_crop, draw_frames


@pytest.fixture(scope="module")
def world():
    return room()


def _data(*sources, batch=4, **changes) -> PosedData:
    sources = sources or (FakePosed("rooms", 10),)
    options = {"frames": 4, "size": (16, 20), "strides": ((1, 2),) * len(sources)}
    return PosedData(sources, batch, **options | changes)


def _step(data) -> dict:
    with build_pipeline({"posed": data}, seed=1, prefetch=0) as pipeline:
        return next(pipeline)["posed"]


def _rays(intrinsics, cam_to_world, height, width):
    """Camera centre [3] and, of each pixel centre, the direction [H, W, 3] of depth 1, in the world's axes."""
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    directions = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], -1)
    return cam_to_world[:3, 3].astype(float), directions @ cam_to_world[:3, :3].T.astype(float)


def _wall_depth(origin, directions):
    with np.errstate(divide="ignore"):
        return ((np.sign(directions) * HALF_ROOM - origin) / directions).min(-1)


def test_a_step_has_the_shapes_of_the_schema():
    batch = _step(_data(batch=3))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "frames": ((3, 4, 16, 20, 3), "uint8"),
        "depth": ((3, 4, 16, 20), "float32"),
        "valid": ((3, 4, 16, 20), "bool"),
        "sky": ((3, 4, 16, 20), "bool"),
        "intrinsics": ((3, 4, 3, 3), "float32"),
        "cam_to_world": ((3, 4, 4, 4), "float32"),
        "has_pose": ((3,), "bool"),
        "has_depth": ((3,), "bool"),
        "metric": ((3,), "bool"),
        "dynamic": ((3,), "bool"),
        "record": ((3,), "int64"),
    }


def test_a_crop_moves_and_scales_the_camera_by_hand_typed_numbers(world):
    # 64 x 48 pixels, fx 50, fy 52.5, principal point (33.5, 22). The crop is the 24 x 24 pixels of the top right.
    corner = Crop(side=0.5, across=1.0, down=0.0)
    assert corner.box(48, 64, (24, 24)) == (40, 0, 64, 24)
    frame = posed_frames(world)[0]
    same = cut_frame(frame, corner, (24, 24))
    np.testing.assert_array_equal(same["intrinsics"], [[50, 0, -6.5], [0, 52.5, 22], [0, 0, 1]])
    np.testing.assert_array_equal(same["frames"], frame.image[:24, 40:])
    np.testing.assert_array_equal(same["depth"], frame.depth[:24, 40:])
    np.testing.assert_array_equal(same["cam_to_world"], frame.cam_to_world)
    twice = cut_frame(frame, corner, (48, 48))
    np.testing.assert_array_equal(twice["intrinsics"], [[100, 0, -13], [0, 105, 44], [0, 0, 1]])


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (64, 64), (13, 17)])
def test_points_of_a_crop_lie_on_the_walls_and_have_their_colour(size):
    world = room(frames=2, height=96, width=128, focal=100.0)
    rng = np.random.default_rng(5)
    for frame in posed_frames(world):
        for _ in range(4):
            cut = cut_frame(frame, draw_crop(rng, (0.6, 1.0)), size)
            origin, directions = _rays(cut["intrinsics"], cut["cam_to_world"], *size)
            depth = _wall_depth(origin, directions)
            # The nearest depth is that of a point half a pixel away or less, to either side.
            relative = cut["depth"] / depth - 1
            assert np.abs(relative).max() < 0.05
            assert abs(relative.mean()) < 0.002
            colour = 127.5 + 100 * np.sin(2.0 * (origin + depth[..., None] * directions))
            assert np.abs(cut["frames"] - colour).mean() < (2.0 if min(size) > 20 else 4.0)


def test_points_of_one_frame_are_found_in_the_next():
    data = _data(size=(48, 48), colour=False)
    batch = _step(data)
    for clip in range(4):
        frames = {name: batch[name][clip] for name in ("depth", "intrinsics", "cam_to_world")}
        for a, b in itertools.pairwise(range(4)):
            origin, directions = _rays(frames["intrinsics"][a], frames["cam_to_world"][a], 48, 48)
            points = origin + frames["depth"][a][..., None] * directions
            turned = (points - frames["cam_to_world"][b][:3, 3]) @ frames["cam_to_world"][b][:3, :3]
            pixels = turned @ frames["intrinsics"][b].T
            u, v = pixels[..., 0] / pixels[..., 2], pixels[..., 1] / pixels[..., 2]
            inside = (u > 1) & (u < 47) & (v > 1) & (v < 47)
            assert inside.mean() > 0.4
            found = frames["depth"][b][v[inside].astype(int), u[inside].astype(int)]
            assert np.median(np.abs(found / turned[..., 2][inside] - 1)) < 0.02


def test_depth_is_never_averaged(world):
    frame = posed_frames(world)[0]
    checks = np.where(np.indices((48, 64)).sum(0) % 2, 1.0, 9.0).astype(np.float32)
    cut = cut_frame(dataclasses.replace(frame, depth=checks, valid=checks > 5), Crop(0.9, 0.3, 0.8), (31, 37))
    assert set(np.unique(cut["depth"])) == {1.0, 9.0}
    np.testing.assert_array_equal(cut["valid"], cut["depth"] > 5)


def test_frames_of_unlike_size_come_to_the_same_camera():
    small, large = (room(1, 48 * k, 64 * k, 50.0 * k) for k in (1, 2))
    # `room` puts the principal point 1.5 and -2 pixels off the centre, whatever the size.
    large = dataclasses.replace(large, intrinsics=np.diag([2.0, 2.0, 1.0]) @ small.intrinsics)
    crop = Crop(0.7, 0.2, 0.6)
    first, second = (cut_frame(posed_frames(each)[0], crop, (32, 32)) for each in (small, large))
    np.testing.assert_allclose(first["intrinsics"], second["intrinsics"], rtol=1e-6)
    assert first["frames"].shape == second["frames"].shape


def test_the_crop_and_the_colours_are_the_same_over_time():
    class Still(FakePosed):
        def read(self, index, frames):
            return super().read(index, [0] * len(frames))

    coloured, plain = (_step(_data(Still("still", 10), colour=colour)) for colour in (True, False))
    for batch in (coloured, plain):
        for name in ("frames", "depth", "intrinsics"):
            np.testing.assert_array_equal(batch[name], np.repeat(batch[name][:, :1], 4, axis=1), err_msg=name)
        assert len(np.unique(batch["intrinsics"][:, 0, 0, 2])) == 4  # clips differ
    assert not np.array_equal(coloured["frames"], plain["frames"])
    for name in set(coloured) - {"frames"}:
        np.testing.assert_array_equal(coloured[name], plain[name], err_msg=name)


def test_crops_stay_inside_and_keep_proportions():
    rng = np.random.default_rng(0)
    for height, width, size in ((48, 64, (16, 16)), (64, 48, (16, 28)), (37, 512, (30, 20)), (8, 8, (64, 64))):
        boxes = [draw_crop(rng, (0.5, 1.0)).box(height, width, size) for _ in range(200)]
        left, top, right, bottom = np.array(boxes).T
        assert left.min() >= 0
        assert top.min() >= 0
        assert right.max() <= width
        assert bottom.max() <= height
        np.testing.assert_allclose((right - left) / (bottom - top), size[1] / size[0])
        side = (right - left) / min(width, height * size[1] / size[0])
        assert side.min() >= 0.5 - 1e-9
        assert side.max() <= 1 + 1e-9
        assert side.min() < 0.55
        assert side.max() > 0.95


def test_what_is_not_known_is_said():
    class NoDepth(FakePosed):
        def read(self, index, frames):
            return [dataclasses.replace(each, depth=None, valid=None) for each in super().read(index, frames)]

    unposed = FakePosed("unposed", 5, ordered=False, changes={"cam_to_world": None, "sky": np.ones((24, 32), bool)})
    batch = _step(_data(NoDepth("plain", 5), unposed, weights=(1, 1)))
    second = batch["record"] >= 5
    assert second.sum() == 2
    np.testing.assert_array_equal(batch["has_pose"], ~second)
    np.testing.assert_array_equal(batch["has_depth"], second)
    np.testing.assert_array_equal(batch["metric"], ~second)
    np.testing.assert_array_equal(batch["dynamic"], second)
    assert not batch["valid"][~second].any()
    assert not batch["depth"][~second].any()
    assert batch["valid"][second].all()
    assert batch["sky"][second].all()
    assert not batch["sky"][~second].any()
    np.testing.assert_array_equal(batch["cam_to_world"][second], np.broadcast_to(np.eye(4), (2, 4, 4, 4)))


def test_clips_are_in_order_at_strides_of_the_range():
    rng, source = np.random.default_rng(0), FakePosed("rooms", 1)
    strides = set()
    for _ in range(200):
        numbers = draw_frames(source, 0, rng, 3, (1, 9))
        (stride,) = set(np.diff(numbers).tolist())
        assert numbers[0] >= 0
        assert numbers[-1] < 8
        strides.add(stride)
    assert strides == {1, 2, 3}  # 8 frames: lowered from 9
    with pytest.raises(DataError, match=r"rooms/0: has 8 frames, a clip of 9 frames at stride 1 needs 9") as caught:
        draw_frames(source, 0, rng, 9, (1, 9))
    assert caught.value.reason == "too few frames"


def test_a_walk_goes_over_frames_that_overlap():
    rng, source = np.random.default_rng(0), FakePosed("photos", 1, ordered=False)
    walks = [draw_frames(source, 0, rng, 6, (1, 1)) for _ in range(100)]
    for walk in walks:
        assert len(set(walk)) == 6
        for place, frame in enumerate(walk[1:], start=1):
            assert any(frame in source.neighbours(0, earlier) for earlier in walk[:place])
    assert len({tuple(walk) for walk in walks}) > 50

    class Apart(FakePosed):
        def neighbours(self, index, frame):
            return [frame ^ 1]  # pairs

    with pytest.raises(DataError, match="apart/0: a walk over overlapping frames found 2, 3 were asked for") as caught:
        draw_frames(Apart("apart", 1, ordered=False), 0, rng, 3, (1, 1))
    assert caught.value.reason == "too few frames that overlap"


@pytest.mark.parametrize(
    ("name", "largest"),
    [("scannet (train)", 30), ("scannet++ (nvs_sem_train)", 3), ("scannetpp", 3), ("mvs_synth", 4), ("co3d (x)", 8)],
)
def test_strides_are_those_of_cut3r_by_default(name, largest):
    assert default_stride(name) == (1, largest)
    assert _data(FakePosed(name, 2), strides=None).stride(0) == (1, largest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames: 0, expected 1 or more"),
        ({"size": (0, 8)}, r"size: \(0, 8\), expected"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale: "),
        ({"strides": ((2, 1),)}, r"strides: \(2, 1\), expected"),
        ({"strides": ((1, 2), (1, 2))}, "strides: 2 are given for 1 sources"),
        ({"weights": (1.0, 2.0)}, "weights: 2 are given for 1 sources"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        _data(**changes)
    with pytest.raises(DataError, match="sources: nothing has no records"):
        _data(FakePosed("nothing", 0))
