"""Video-depth benchmarks: trees written by hand in the published layouts, read back; and how frames are sized."""

import json
import struct

import numpy as np
import pytest
from benchmark_trees import (
    DRIVE,
    link_many,
    only_sequence,
    save_picture,
    stored,
    write_bonn,
    write_dpt,
    write_kitti,
    write_kitti_published,
    write_sintel,
)
from PIL import Image
from world_cases import room

from omnistream_jax.data.benchmarks import kitti, sintel
from omnistream_jax.data.benchmarks.preprocess import prepare_frames, prepared_size
from omnistream_jax.data.benchmarks.registry import open_benchmark
from omnistream_jax.data.errors import DataError

BONN = ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")


@pytest.fixture(scope="module")
def world():
    return room(frames=3, height=24, width=32)


def write_crowd(root, world, **options):
    write_bonn(root, "crowd2", world.frames, stored(world.depth, 5000), **options)


def assert_reads(sequence, world, resolution):
    assert len(sequence) == 3
    for number in range(3):
        np.testing.assert_array_equal(sequence.frame(number), world.frames[number])
        np.testing.assert_allclose(sequence.depth(number), world.depth[number], atol=resolution)


def test_sintel_is_read_back(tmp_path, world):
    write_sintel(tmp_path, "alley_1", world.frames, world.depth)
    write_sintel(tmp_path, "not_a_sequence", world.frames, world.depth)
    (tmp_path / "training/final/alley_1/._frame_0001.png").write_bytes(b"what another system left")
    sequence = only_sequence("sintel_depth", tmp_path)
    assert sequence.name == "alley_1"
    assert sequence.depth(0).dtype == np.float32
    assert_reads(sequence, world, 1e-6)
    assert len(only_sequence("sintel_depth", tmp_path)) == 3


def test_a_sintel_depth_map_typed_by_hand(tmp_path):
    (tmp_path / "a.dpt").write_bytes(b"PIEH" + bytes.fromhex("02000000 01000000 0000c03f 00808c42"))
    np.testing.assert_array_equal(sintel.read_dpt(tmp_path / "a.dpt"), [[1.5, 70.25]])


@pytest.mark.parametrize("below", ["", "rgbd_bonn_dataset", "bonn/rgbd_bonn_dataset"])
def test_bonn_is_read_back_as_prepared(tmp_path, world, below):
    write_crowd(tmp_path / below, world)
    write_crowd(tmp_path / below, world, folders=("rgb", "depth"))  # both: the prepared one counts
    sequence = only_sequence("bonn_depth", tmp_path)
    assert sequence.name == "crowd2"
    assert_reads(sequence, world, 1.1e-4)


def test_bonn_as_published_is_sliced_from_the_thirtieth_file(tmp_path, world):
    before = np.zeros((30, 24, 32, 3), np.uint8), np.full((30, 24, 32), 300, np.uint16)
    images, depth = map(np.concatenate, zip(before, (world.frames, stored(world.depth, 5000)), strict=True))
    write_bonn(tmp_path, "crowd2", images, depth, folders=("rgb", "depth"))
    assert_reads(only_sequence("bonn_depth", tmp_path), world, 1.1e-4)


def test_a_bonn_depth_map_of_known_numbers(tmp_path, world):
    write_crowd(tmp_path, world)
    path = only_sequence("bonn_depth", tmp_path).depth_paths[0]
    save_picture(path, np.array([[12345, 0], [65535, 1]], np.uint16))
    depth = only_sequence("bonn_depth", tmp_path).depth(0)
    np.testing.assert_allclose(depth, [[2.469, -1.0], [13.107, 0.0002]], rtol=1e-12)


@pytest.mark.parametrize("below", ["", "kitti"])
def test_kitti_is_read_back_as_published(tmp_path, world, below):
    write_kitti_published(tmp_path / below, world.frames, stored(world.depth, 256))
    sequence = only_sequence("kitti_depth", tmp_path)
    assert sequence.name == DRIVE
    assert_reads(sequence, world, 2e-3)


@pytest.mark.parametrize("folder", [f"{DRIVE}_sync_02", f"{DRIVE}_02"])
def test_kitti_is_read_back_as_prepared(tmp_path, world, folder):
    write_kitti(tmp_path, world.frames, stored(world.depth, 256), folder)
    sequence = only_sequence("kitti_depth", tmp_path)
    assert_reads(sequence, world, 2e-3)
    save_picture(sequence.depth_paths[0], np.array([[5120, 0]], np.uint16))
    np.testing.assert_array_equal(sequence.depth(0), [[20.0, -1.0]])


@pytest.fixture
def small_files(tmp_path):
    """(8-bit picture, 16-bit map, .dpt) of 4 x 2 pixels, outside of what is opened."""
    save_picture(tmp_path / "files/picture.png", np.zeros((2, 4, 3), np.uint8))
    save_picture(tmp_path / "files/depth.png", np.full((2, 4), 512, np.uint16))
    write_dpt(tmp_path / "files/depth.dpt", np.full((2, 4), 2.0))
    return [tmp_path / "files" / name for name in ("picture.png", "depth.png", "depth.dpt")]


def test_the_complete_bonn_and_its_rules(tmp_path, small_files):
    for name in BONN:
        for folder, source in zip(("rgb", "depth"), small_files, strict=False):
            link_many(source, tmp_path / f"rgbd_bonn_{name}" / folder, [f"{1000 + n}.5.png" for n in range(150)])
    benchmark = open_benchmark("bonn_depth", tmp_path)
    assert benchmark.counts().complete
    assert benchmark.counts().describe() == "5 of 5 sequences, 550 of 550 frames"
    assert (benchmark.max_depth, benchmark.clip_max, benchmark.mode) == (70.0, None, "resize")
    assert [path.name for path in (benchmark.sequences[0].frame_paths[0], benchmark.sequences[0].depth_paths[-1])] == [
        "1030.5.png",
        "1139.5.png",
    ]


def test_the_complete_sintel_and_its_rules(tmp_path, small_files):
    shorter = {"ambush_2": 21, "ambush_4": 33, "ambush_6": 20, "market_6": 40}
    for name in sintel.FRAMES:
        stems = [f"frame_{number:04d}" for number in range(1, shorter.get(name, 50) + 1)]
        link_many(small_files[0], tmp_path / "sintel/training/final" / name, [f"{stem}.png" for stem in stems])
        link_many(small_files[2], tmp_path / "sintel/training/depth" / name, [f"{stem}.dpt" for stem in stems])
    benchmark = open_benchmark("sintel_depth", tmp_path)
    assert benchmark.counts().describe() == "23 of 23 sequences, 1,064 of 1,064 frames"
    assert (benchmark.max_depth, benchmark.clip_max, benchmark.mode) == (70.0, 70.0, "resize")


def test_the_complete_kitti_keeps_110_frames_a_drive_at_most(tmp_path, small_files):
    for drive, annotated in kitti.ANNOTATED.items():
        names = [f"{number:010d}.png" for number in range(5, 5 + min(annotated, 112))]
        link_many(small_files[1], tmp_path / f"val/{drive}_sync/proj_depth/groundtruth/image_02", names)
        link_many(small_files[0], tmp_path / drive[:10] / f"{drive}_sync/image_02/data", names)
    benchmark = open_benchmark("kitti_depth", tmp_path)
    assert benchmark.counts().describe() == "13 of 13 sequences, 1,269 of 1,269 frames"
    assert benchmark.sequences[1].depth_paths[-1].name == "0000000114.png"
    assert (benchmark.max_depth, benchmark.clip_max, benchmark.mode) == (None, None, "resize")


def test_what_is_missing_is_named_unless_allowed(tmp_path, world):
    write_crowd(tmp_path, world)
    with pytest.raises(DataError, match=r"1 of 5 sequences, 3 of 550 frames \(balloon2: 0 of 110 .* crowd2: 3 of 110"):
        open_benchmark("bonn_depth", tmp_path)
    settings = json.loads(json.dumps(open_benchmark("bonn_depth", tmp_path, allow_incomplete=True).settings()))
    assert settings["counts"]["complete"] is False
    assert settings["sequences"] == ["crowd2"]
    assert "crowd2: 3 of 110 frames" in settings["counts"]["differences"]


def test_too_many_frames_are_not_the_published_ones_either(tmp_path, small_files):
    for name in BONN:
        for folder, source in zip(("rgb_110", "depth_110"), small_files, strict=False):
            link_many(source, tmp_path / f"rgbd_bonn_{name}" / folder, [f"{1000 + n}.png" for n in range(111)])
    with pytest.raises(DataError, match="synchronous: 111 of 110 frames"):
        open_benchmark("bonn_depth", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sintel_depth", r"training/final/SEQUENCE"),
        ("bonn_depth", r"rgbd_bonn_SEQUENCE/rgb_110 \(prepared\) or rgbd_bonn_SEQUENCE/rgb"),
        ("kitti_depth", r"groundtruth_depth_gathered/DRIVE_sync_02 \(prepared\) or val/DRIVE_sync/proj_depth"),
    ],
)
def test_another_layout_is_refused_by_what_was_expected(tmp_path, name, expected):
    with pytest.raises(DataError, match=rf"{tmp_path}: holds no .*{expected}"):
        open_benchmark(name, tmp_path, allow_incomplete=True)
    with pytest.raises(DataError, match=rf"nowhere: there is no such folder; expected .*{expected}"):
        open_benchmark(name, tmp_path / "nowhere")


def test_a_layout_without_frames_is_refused(tmp_path):
    (tmp_path / "training/final/alley_1").mkdir(parents=True)
    with pytest.raises(DataError, match="sintel_depth has no frames here"):
        open_benchmark("sintel_depth", tmp_path, allow_incomplete=True)


def test_an_unknown_name_gets_a_suggestion(tmp_path):
    with pytest.raises(DataError, match=r"'bon-depth' is not known; did you mean bonn_depth\? There are sintel_depth,"):
        open_benchmark("bon-depth", tmp_path)


def test_frames_without_their_partner_are_refused(tmp_path, world):
    write_sintel(tmp_path / "s", "alley_1", world.frames, world.depth)
    (tmp_path / "s/training/depth/alley_1/frame_0002.dpt").unlink()
    with pytest.raises(DataError, match=r"frame_0002\.dpt: there is no such file; expected the depth of .*0002\.png"):
        open_benchmark("sintel_depth", tmp_path / "s", allow_incomplete=True)
    write_crowd(tmp_path / "b", world)
    next((tmp_path / "b/rgbd_bonn_crowd2/depth_110").iterdir()).unlink()
    with pytest.raises(DataError, match=r"rgb_110: 3 frames but 2 depth maps; expected one a frame"):
        open_benchmark("bonn_depth", tmp_path / "b", allow_incomplete=True)
    write_kitti_published(tmp_path / "k", world.frames, stored(world.depth, 256))
    (tmp_path / f"k/2011_09_26/{DRIVE}_sync/image_02/data/0000000006.png").unlink()
    with pytest.raises(DataError, match=r"data/0000000006\.png: there is no such file; expected the picture of .*val"):
        open_benchmark("kitti_depth", tmp_path / "k", allow_incomplete=True)
    (tmp_path / "k/2011_09_26").rename(tmp_path / "k/elsewhere")
    with pytest.raises(DataError, match=r"2011_09_26/.*/data: there is no such folder; expected the pictures of"):
        open_benchmark("kitti_depth", tmp_path / "k", allow_incomplete=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"HEIP" + struct.pack("<iif", 1, 1, 1.0), "its tag is .*, expected 202021.25"),
        (struct.pack("<fiif", 202021.25, 2, 1, 1.0), "it has 16 bytes, 2 x 1 pixels take 20"),
        (struct.pack("<fii", 202021.25, 100_000, 100_000), "100000 x 100000 pixels; expected 1 to 64,000,000"),
        (struct.pack("<fii", 202021.25, -1, 1), "-1 x 1 pixels; expected 1 to"),
        (b"", "expected a Sintel depth map"),
    ],
)
def test_a_damaged_sintel_depth_map_is_named(tmp_path, content, message):
    (tmp_path / "a.dpt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.dpt: .*{message}"):
        sintel.read_dpt(tmp_path / "a.dpt")


def test_an_eight_bit_depth_map_is_refused(tmp_path, world):
    write_crowd(tmp_path, world)
    sequence = only_sequence("bonn_depth", tmp_path)
    save_picture(sequence.depth_paths[1], np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match=r"19999\.png: expected a 16-bit PNG"):
        sequence.depth(1)


@pytest.mark.parametrize(
    ("source", "first", "final"),
    [
        ((1024, 436), (512, 218), (512, 208)),  # Sintel
        ((640, 480), (512, 384), (512, 384)),  # Bonn, TUM
        ((1242, 375), (512, 155), (512, 144)),  # KITTI
        ((1296, 968), (512, 382), (512, 368)),  # ScanNet
        ((436, 1024), (218, 512), (208, 512)),
        ((320, 240), (512, 384), (512, 384)),
        ((700, 700), (512, 512), (512, 384)),  # the quirk: a square picture gets 3/4 of its width as height
    ],
)
def test_sizes_are_those_of_the_published_evaluations(source, first, final):
    assert prepared_size(*source) == (first, final)
    for mode in ("resize", "crop"):
        frames = prepare_frames(np.zeros((source[1], source[0], 3), np.uint8), mode=mode)
        assert frames.shape == (final[1], final[0], 3)
        assert frames.dtype == np.uint8


def test_pixels_are_those_of_the_two_lanczos_resizes_or_of_the_crop():
    image = np.random.default_rng(0).integers(0, 256, (968, 1296, 3), np.uint8)
    first = Image.fromarray(image).resize((512, 382), Image.LANCZOS)
    np.testing.assert_array_equal(prepare_frames(image), np.asarray(first.resize((512, 368), Image.LANCZOS)))
    np.testing.assert_array_equal(prepare_frames(image, mode="crop"), np.asarray(first)[7:375])
    small = image[:120, :200]
    enlarged = np.asarray(Image.fromarray(small).resize((512, 307), Image.BICUBIC))
    np.testing.assert_array_equal(prepare_frames(small, mode="crop"), enlarged[1:305])
    clip = prepare_frames(np.stack([image, image[::-1]]), long_side=64, patch=8)
    np.testing.assert_array_equal(clip[1], prepare_frames(image[::-1].copy(), long_side=64, patch=8))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((4, 4, 3)), {}, r"image: float64 \[4, 4, 3\], expected uint8"),
        (np.zeros((8, 512, 3), np.uint8), {}, "512 x 8 pixels has no whole patch of 16"),
        (np.zeros((8, 8, 3), np.uint8), {"mode": "pad"}, "mode: 'pad', expected"),
        (np.zeros((8, 8, 3), np.uint8), {"long_side": 8}, "long_side: 8, expected at least one patch of 16"),
    ],
)
def test_what_cannot_be_prepared_is_told(image, options, message):
    with pytest.raises(DataError, match=message):
        prepare_frames(image, **options)


def test_a_sequence_is_prepared_upright_and_in_one_size(tmp_path, world):
    write_crowd(tmp_path, world)
    sequence = only_sequence("bonn_depth", tmp_path)
    frames = sequence.frames("resize", long_side=32, patch=8)
    np.testing.assert_array_equal(frames, world.frames)  # 32 x 24 already
    turned = Image.fromarray(np.rot90(world.frames[1]))  # turned counter-clockwise, and marked so
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(sequence.frame_paths[1], exif=exif)
    np.testing.assert_array_equal(sequence.frames("resize", long_side=32, patch=8), world.frames)
    save_picture(sequence.frame_paths[2], world.frames[2, :, :20])
    with pytest.raises(DataError, match=r"002\.18551\.png: 20 x 24 pixels, the sequence began with 32 x 24"):
        sequence.frames("resize", long_side=32, patch=8)
