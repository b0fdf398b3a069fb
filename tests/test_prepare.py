"""Prepared shards: the frames of the published layout again, whatever happened while they were written."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare_cases
import pytest
from PIL import Image
from prepare_cases import assert_a_killed_run_goes_on_to_the_same_bytes, contents, environment
from scannet_cases import write_scannet
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data import records, shards
from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.posed import PosedData
from omnistream_jax.data.readers.base import posed_frame
from omnistream_jax.data.readers.prepared import Prepared
from omnistream_jax.data.readers.scannet import ScanNet
from omnistream_jax.data.schema import CaptionedImage, SequenceInfo
from omnistream_jax.data.shards import Settings, write_shards
from omnistream_jax.data.source_check import NamedSource, Skipped, check_records
from omnistream_jax.data.sources import image_source

FRAMES = 7
SMALL = ("--chunk=3", "--shard_frames=10")


@pytest.fixture(scope="module")
def world():
    return room(FRAMES)


@pytest.fixture(scope="module")
def source(tmp_path_factory, world):
    """Five scenes of 7 frames; read only."""
    return write_scannet(tmp_path_factory.mktemp("source"), {f"scene000{n}_00": world for n in range(5)})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    output = tmp_path_factory.mktemp("prepared") / "scannet"
    assert run(source, output, *SMALL) == 0
    return output


def run(source, output, *arguments) -> int:
    return prepare_cases.run(source, output, *arguments, dataset="scannet")


# What is read back


def test_shards_hold_the_frames_of_the_published_layout(undisturbed, source, world):
    raw, prepared = ScanNet.open(source), Prepared.open(undisturbed)
    assert prepared.name == raw.name == "scannet (train)"
    assert len(prepared) == len(raw) == 5
    assert prepared.describe(4).endswith("scans/scene0004_00")
    for index in range(5):
        assert prepared.frame_count(index) == raw.frame_count(index) == FRAMES
        assert prepared.info(index) == raw.info(index)
        assert prepared.neighbours(index, 0) is None
        numbers = [6, 0, 3, 2, 2]
        for ours, theirs in zip(prepared.read(index, numbers), raw.read(index, numbers), strict=True):
            assert np.abs(ours.image.astype(int) - theirs.image).mean() < 3  # tiny, and of harsh colours
            np.testing.assert_array_equal(ours.depth, theirs.depth)  # millimetres are stored as they are
            np.testing.assert_array_equal(ours.valid, theirs.valid)
            np.testing.assert_array_equal(ours.intrinsics, theirs.intrinsics)
            np.testing.assert_array_equal(ours.cam_to_world, theirs.cam_to_world)
            assert ours.path.endswith(theirs.path.removeprefix(f"{source}{os.sep}"))
            assert (ours.depth.dtype, ours.valid.dtype, ours.sky) == (np.float32, bool, None)
    frames = prepared.read(2, range(FRAMES))
    assert_is_world(frames, world)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)


def test_training_draws_the_same_clips_from_shards_as_from_the_published_layout(undisturbed, source):
    batches = [
        PosedData((reader,), 4, frames=3, size=(36, 48), colour=False).dataset(7, 0, 1)[5]
        for reader in (ScanNet.open(source), Prepared.open(undisturbed))
    ]
    raw, prepared = batches
    for name in ("record", "depth", "valid", "intrinsics", "cam_to_world"):
        np.testing.assert_array_equal(raw[name], prepared[name])
    assert np.abs(raw["frames"].astype(int) - prepared["frames"]).mean() < 3


def test_png_keeps_images_bit_for_bit(source, tmp_path):
    assert run(source, tmp_path / "out", "--image_format=png", *SMALL) == 0
    raw, prepared = ScanNet.open(source), Prepared.open(tmp_path / "out")
    for ours, theirs in zip(prepared.read(1, range(3)), raw.read(1, range(3)), strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)


def test_larger_frames_are_scaled_with_their_cameras(source, tmp_path, world):
    assert run(source, tmp_path / "out", "--short_side=24", "--image_format=png", *SMALL) == 0
    frames = Prepared.open(tmp_path / "out").read(0, range(FRAMES))
    small = room(FRAMES, 24, 32, 25.0)  # half the size
    scaled = np.diag([0.5, 0.5, 1]) @ world.intrinsics
    assert frames[0].image.shape == (24, 32, 3)
    np.testing.assert_allclose(frames[0].intrinsics, scaled, atol=1e-4)
    picture = np.asarray(Image.fromarray(world.frames[0]).resize((32, 24), Image.Resampling.BOX))
    assert np.abs(frames[0].image.astype(int) - picture).mean() < 4
    assert frames[0].depth.shape == small.depth[0].shape
    assert_reprojects(frames)


def test_a_reader_sent_to_a_worker_reads_the_same(undisturbed):
    program = (
        "import sys, multiprocessing\n"
        "from omnistream_jax.data.readers.prepared import Prepared\n"
        "from omnistream_jax.data.worker_pool import map_in_processes\n"
        "if __name__ == '__main__':\n"
        "    reader = Prepared.open(sys.argv[1]); reader.read(0, [0])\n"
        "    print([count for _, count in sorted(map_in_processes(reader.frame_count, range(5), 2))])\n"
    )
    script = undisturbed.parent / "script.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script, undisturbed], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == str([FRAMES] * 5), done.stderr


# Depth


def maps():
    rng = np.random.default_rng(0)
    near_and_far = np.exp(rng.uniform(np.log(0.05), np.log(2000.0), (40, 50))).astype(np.float32)
    holes = np.where(rng.random((40, 50)) < 0.3, 0, near_and_far).astype(np.float32)
    return {
        "millimetres": (rng.integers(0, 60000, (40, 50)) / 1000).astype(np.float32),
        "centimetres": (rng.integers(0, 65000, (40, 50)) / 100).astype(np.float32),
        "floats": near_and_far,
        "holes": holes,
        "one value": np.full((40, 50), 1 / 3, np.float32),
        "nothing": np.zeros((40, 50), np.float32),
        "far apart": np.where(rng.random((40, 50)) < 0.5, 1e-4, 1e5).astype(np.float32),
    }


@pytest.mark.parametrize("name", maps())
@pytest.mark.parametrize("with_sky", [False, True])
def test_depth_is_kept_within_the_stated_error(name, with_sky):
    depth = maps()[name]
    sky = None
    if with_sky:
        sky = np.random.default_rng(1).random(depth.shape) < 0.2
        depth = np.where(sky, 0, depth).astype(np.float32)
    data, encoding = records.encode_depth(depth, sky)
    kinds = {"floats": "log", "holes": "log", "one value": "log", "far apart": "float32"}
    assert encoding["kind"] == kinds.get(name, "linear")
    found, found_sky = records.decode_depth(data, json.loads(json.dumps(encoding)))
    np.testing.assert_array_equal(found > 0, depth > 0)
    np.testing.assert_array_equal(found_sky, sky if with_sky else np.zeros_like(found_sky))
    error = np.abs(found.astype(np.float64) - depth)[depth > 0] / depth[depth > 0]
    assert error.max(initial=0) <= 1e-4
    if encoding["kind"] != "log":
        np.testing.assert_array_equal(found, depth)


def test_sparse_depth_keeps_its_points_when_scaled():
    image, intrinsics = np.zeros((40, 60, 3), np.uint8), np.diag([50.0, 50, 1])
    depth = np.zeros((40, 60))
    depth[1, 1], depth[9, 20], depth[11, 23], depth[39, 59] = 3, 5, 4, 2  # none at a centre
    frame = records.scaled(posed_frame(image, intrinsics, depth, None, "x"), 10)
    expected = np.zeros((10, 15))
    expected[0, 0], expected[2, 5], expected[9, 14] = 3, 4, 2  # of two in a pixel the nearer
    np.testing.assert_array_equal(frame.depth, expected)
    np.testing.assert_array_equal(frame.valid, expected > 0)


# Unordered photographs


class Photographs:
    """Two clusters that do not see each other: the even frames and the odd ones. Frame 4 is damaged."""

    name = "photographs (train)"
    world = room(10)

    def __len__(self):
        return 1

    def describe(self, index):
        return "/data/place"

    def info(self, index):
        return SequenceInfo(metric=False, dynamic=False, ordered=False)

    def frame_count(self, index):
        return 10

    def neighbours(self, index, frame):
        others = [other for other in range(10) if other != frame and other % 2 == frame % 2]
        return sorted(others, key=lambda other: (abs(other - frame), other))

    def read(self, index, frames):
        if 4 in frames:
            raise DataError(f"/data/place/4.jpg: expected a whole image file, but reading it failed (at {frames})")
        world = self.world
        return [
            posed_frame(
                world.frames[n],
                world.intrinsics,
                None if n == 1 else world.depth[n],
                None if n == 3 else world.cam_to_world[n],
                f"/data/place/{n}.jpg",
                sky=world.depth[n] > 4 if n == 1 else None,
            )
            for n in frames
        ]


def test_photographs_without_order_are_stored_by_what_they_see(tmp_path):
    index = write_shards(NamedSource(Photographs(), Path("/data")), tmp_path, Settings("x", "train", chunk=4))
    # By their first numbers: 0 2 (4) 6, 1 3 5 7, 8, 9.
    assert index["sequences"][0]["sets"] == [[0, 2, 5], [1, 3, 4, 6], [7], [8]]
    reader = Prepared.open(tmp_path)
    assert reader.frame_count(0) == 9
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    frames = reader.read(0, range(9))
    assert [Path(frame.path).name for frame in frames] == [f"{number}.jpg" for number in kept]
    for new, number in enumerate(kept):
        expected = [kept.index(other) for other in Photographs().neighbours(0, number) if other != 4]
        assert list(reader.neighbours(0, new)) == expected
    no_depth, no_pose = frames[1], frames[3]
    assert no_depth.depth is None
    assert no_depth.valid is None
    np.testing.assert_array_equal(no_depth.sky, Photographs.world.depth[1] > 4)
    assert no_pose.cam_to_world is None
    assert [entry["count"] for entry in index["skipped"].values()] == [1]


def test_overlap_sets_part_the_frames_and_grow_along_what_is_seen():
    ring = [[(n + 1) % 6, (n - 1) % 6] for n in range(6)]
    assert shards.overlap_sets(ring, 4) == [[0, 1, 2, 5], [3, 4]]
    assert shards.overlap_sets([[], [2], [1]], 4) == [[0], [1, 2]]


# Stops, damage and other settings


def test_a_killed_run_goes_on_to_the_same_bytes(undisturbed, source, tmp_path, capsys):
    last = "scans/scene0004_00/depth/3.png"
    assert_a_killed_run_goes_on_to_the_same_bytes(
        undisturbed, source, last, tmp_path, Prepared.open, SMALL, dataset="scannet"
    )
    assert "3 shards, 2 finished already, 1 to do" in capsys.readouterr().out


def test_the_bytes_do_not_depend_on_where_the_source_lies(undisturbed, source, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(source)
    assert run(moved, tmp_path / "out", *SMALL) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_damaged_frames_are_left_out_and_counted_by_reason(world, tmp_path, capsys):
    root = write_scannet(tmp_path / "in", {"scene0000_00": world, "scene0001_00": world})
    scene = root / "scans/scene0000_00"
    (scene / "depth/2.png").write_bytes(b"no picture")
    for number in (4, 5):
        whole = (scene / f"color/{number}.jpg").read_bytes()
        (scene / f"color/{number}.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(scene / "depth/6.png")
    (root / "scans/scene0001_00/pose/0.txt").write_text("no numbers")
    expected = {
        "scans/scene0000_00/color/4.jpg": 2,
        "scans/scene0000_00/color/6.jpg": 1,  # where the depth of its frame is empty
        "scans/scene0000_00/depth/2.png": 1,
        "scans/scene0001_00/pose/0.txt": 1,
    }
    assert run(root, None, "--check") == 1
    told = capsys.readouterr().out
    assert "scannet (train): 2 sequences; 1,201 are published, 1,199 are not here" in told
    assert "3 frames can be used, 5 faults" in told
    assert run(root, tmp_path / "out", "--chunk=2") == 0
    index = json.loads((tmp_path / "out/index.json").read_text())
    found = {entry["first"].partition(": ")[0]: entry["count"] for entry in index["skipped"].values()}
    assert found == expected
    assert index["skipped"]["depth is empty"]["count"] == 1
    whole = [entry for reason, entry in index["skipped"].items() if reason.startswith("a whole sequence: ")]
    assert [entry["first"].partition(": ")[0] for entry in whole] == ["scans/scene0001_00/pose/0.txt"]
    for reason, entry in index["skipped"].items():
        assert f"skipped {entry['count']}: {reason}; the first: {entry['first']}\n" in told
    reader = Prepared.open(tmp_path / "out")
    assert (len(reader), reader.frame_count(0)) == (1, 3)
    assert_is_world(reader.read(0, range(3)), world, numbers=[0, 1, 3])


def test_reasons_leave_out_what_differs_from_file_to_file():
    skipped = Skipped()
    for size in (7, 12.5):
        message = f"/a/{size}.jpg: its depth has 16-bit size {size}, expected 3 (as told)"
        skipped.add(DataError(message), message)
    assert skipped.reasons == {
        "its depth has 16-bit size N, expected N": {
            "count": 2,
            "first": "/a/7.jpg: its depth has 16-bit size 7, expected 3 (as told)",
        }
    }


@dataclasses.dataclass(frozen=True)
class Captions:
    name = "captions"

    def __len__(self):
        return 130

    def read(self, index):
        answer = " " if index % 10 == 0 else "a dog"
        return CaptionedImage(np.zeros((4, 4, 3), np.uint8), "what?", answer, np.zeros((0, 4)), (), f"/d/{index}.jpg")


def test_images_and_captions_are_checked_record_by_record(tmp_path):
    for number in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:200])
    usable, skipped = check_records(NamedSource(image_source(tmp_path), tmp_path))
    assert (usable, skipped.count) == (2, 1)
    assert next(iter(skipped.reasons.values()))["first"].startswith("1.jpg: expected a whole image file")
    usable, skipped = check_records(NamedSource(Captions(), Path("/d")))
    assert (usable, skipped.count) == (117, 13)
    assert next(iter(skipped.reasons.values()))["first"].startswith("0.jpg: ")


def test_a_source_of_which_nothing_can_be_read_is_an_error(world, tmp_path, capsys):
    root = write_scannet(tmp_path / "in", {"scene0000_00": world})
    for path in (root / "scans/scene0000_00/depth").iterdir():
        path.write_bytes(b"")
    assert run(root, tmp_path / "out") == 1
    assert re.search(r"no frame could be read; skipped 7: .*expected a 16-bit PNG", capsys.readouterr().err)


def test_checksums_find_a_flipped_bit_and_a_missing_shard(source, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(source, output, *SMALL) == 0
    assert run(None, output, "--check") == 0
    path = output / "shards/00001.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert run(None, output, "--check") == 1
    assert "00001.array_record: its sha256 is not that of the index" in capsys.readouterr().out
    reader = Prepared.open(output)
    with pytest.raises(DataError, match=r"00001\.array_record: record \d+ cannot be read"):
        [reader.read(index, range(FRAMES)) for index in range(len(reader))]
    path.unlink()
    assert run(None, output, "--check") == 1
    with pytest.raises(DataError, match=r"00001\.array_record: there is no such file"):
        Prepared.open(output)


def test_an_output_of_other_settings_is_refused(undisturbed, source, tmp_path, capsys):
    before = contents(undisturbed)
    assert run(source, undisturbed, "--chunk=4", "--shard_frames=10") == 2
    assert "holds shards of other settings" in (told := capsys.readouterr().err)
    assert "chunk: 3 -> 4" in told
    assert "shard_frames" not in told
    assert contents(undisturbed) == before
    (tmp_path / "letter.txt").write_text("not ours")
    assert run(source, tmp_path) == 2
    assert "holds other files (letter.txt), expected a new or empty folder" in capsys.readouterr().err


def test_an_output_of_another_source_is_refused(undisturbed, world, tmp_path):
    other = write_scannet(tmp_path, {"scene0000_00": world, "scene0009_00": world})
    settings = Settings("scannet", "train", {}, 3, 10)
    with pytest.raises(UsageError, match="begun from a source of 5 sequences; 4 of them are gone now, 1 are new"):
        write_shards(NamedSource(ScanNet.open(other), other), undisturbed, settings)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--dataset=scanet",), 2, "'scanet' is not known; did you mean scannet?"),
        (("--chunk=0",), 2, "chunk: expected at least 1, got 0"),
        (("--chunks=3",), 2, "Unknown command line flag 'chunks'"),
        (("--option=colour=red",), 1, "its reader takes"),
        (("--split=val",), 1, "scannetv2_val.txt: there is no such file or folder"),
        (("more",), 2, "unexpected argument 'more'"),
        (("--dataset=prepared",), 2, "dataset prepared: is prepared already; there is only --check for it"),
        (
            ("--dataset=scannet", "--shard_records=3"),
            2,
            "--shard_records: does nothing for scannet, whose kind is posed",
        ),
    ],
)
def test_wrong_flags_are_one_message(source, tmp_path, capsys, arguments, status, message):
    assert run(source, tmp_path / "out", *arguments) == status
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_is_told_with_its_shard(tmp_path):
    program = (
        "import os, signal\n"
        "from omnistream_jax.data.errors import DataError\n"
        "from omnistream_jax.data.worker_pool import map_in_processes\n"
        "def die(number):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if number == 3 else None\n"
        "    return number\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        list(map_in_processes(die, range(5), 2))\n"
        "    except DataError as error:\n"
        "        print(error)\n"
    )
    (tmp_path / "script.py").write_text(program)
    line = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout.startswith("a worker process died at 3 (SIGKILL)"), done.stderr
