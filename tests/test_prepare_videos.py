"""Prepared videos: the published ones again, in frames, times and labels, whatever happened while they were written."""

import dataclasses
import io
import json
import pickle
import re
import shutil
from fractions import Fraction

import av
import numpy as np
import prepare_cases
import pytest
from clip_cases import real_frames, turn, write_clip
from PIL import Image
from prepare_cases import assert_a_killed_run_goes_on_to_the_same_bytes, contents
from tar_cases import write_tar

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.prepared import Prepared
from omnistream_jax.data.readers.prepared_videos import PreparedVideos
from omnistream_jax.data.readers.videos import open_kinetics
from omnistream_jax.data.registry import open_dataset
from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.data.transcode import VideoOptions, transcode
from omnistream_jax.data.video import open_video

SMALL = ("--short_side=48", "--crf=12", "--shard_videos=2")
TICKS = [0, 1, 2, 5, 6, 7, 15, 16, 17, 18, 40, 41, 42, 43, 44, 60]  # in 1/30 s: a variable frame rate
CLIPS = {
    "train/abseiling/a_000000_000010.mp4": (0, 30),
    "train/abseiling/b_000000_000010.webm": (1, 16),
    "train/riding a bike/c_000000_000010.avi": (2, 16),
    "train/riding a bike/d_000000_000010.mkv": (3, 16),
    "train/zumba/e_000000_000010.mp4": (4, 25),
}


def frames_of(name):
    index, count = CLIPS[name]
    return real_frames(index, 40)[:count]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five videos of 96 x 64, in four containers; read only."""
    root = tmp_path_factory.mktemp("source")
    kinds = [("libx264", {"bf": "2"}), ("libvpx-vp9", {}), ("mjpeg", {}), ("libx264", {}), ("libx264", {})]
    for (name, _), (codec, options) in zip(CLIPS.items(), kinds, strict=True):
        write_clip(root / name, frames_of(name), codec, 30, **options)
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    output = tmp_path_factory.mktemp("prepared") / "kinetics"
    assert run(source, output, *SMALL) == 0
    return output


def run(source, output, *arguments, dataset="kinetics") -> int:
    return prepare_cases.run(source, output, *arguments, dataset=dataset)


def decoded(data: bytes) -> tuple[np.ndarray, list[float]]:
    """All frames and their times, by PyAV alone."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


def write_timed(path, frames, ticks):
    """A video whose frames come at these thirtieths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 30
        stream.codec_context.time_base = Fraction(1, 30)
        for frame, tick in zip(frames, ticks, strict=True):
            picture = av.VideoFrame.from_ndarray(frame)
            picture.pts, picture.time_base = tick, Fraction(1, 30)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def resized(frames, width, height):
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def assert_same_frames(found, expected, limit=4.0):
    """Frame by frame, up to compression: none is much nearer than the one in the same place."""
    assert found.shape == expected.shape
    small, other = (np.asarray(every, np.float32).reshape(len(every), -1) for every in (found, expected))
    distance = np.stack([np.abs(small - frame).mean(axis=1) for frame in other], axis=1)
    assert np.diag(distance).max() < limit
    assert (np.diag(distance) < distance.min(axis=1) + 0.5).all()
    assert abs((small - other).mean()) < 1.5  # no shift in brightness: FFmpeg's RGB is rounded down
    assert np.polyfit(other.ravel(), small.ravel(), 1)[0] == pytest.approx(1, abs=0.07)  # nor in contrast: 219 / 255


# What is read back


def test_prepared_videos_hold_the_published_frames_and_labels(undisturbed, source):
    raw, prepared = open_kinetics(source), PreparedVideos.open(undisturbed)
    assert (prepared.name, len(prepared), prepared.labels) == (raw.name, 5, raw.labels)
    assert raw.labels == ("abseiling", "riding a bike", "zumba")
    for index, (name, (_, count)) in enumerate(CLIPS.items()):
        record = prepared.record(index)
        assert (record.name, record.label, record.label_name) == (name, raw.label(index), name.split("/")[1])
        assert prepared.label(index) == raw.label(index)
        assert prepared.describe(index) == f"{undisturbed}/shards/{index // 2:05d}.array_record: {name}"
        assert (record.size, record.frame_rate, record.source) == ((64, 96), 30, "kinetics (train)")
        frames, times = decoded(record.video)
        with open_video(source / name) as video, open_video(name, file=io.BytesIO(record.video)) as ours:
            assert record.frames == video.frame_count == ours.frame_count == len(frames) == count
            assert ours.frame_rate == pytest.approx(30, rel=1e-3)
            assert_same_frames(frames, video.read(range(count), 48))
        np.testing.assert_allclose(np.array(times) - times[0], np.arange(count) / 30, atol=1e-3)
        with av.open(io.BytesIO(record.video)) as container:
            (stream,) = container.streams  # no sound
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
        assert all(any(keys[start : start + 12]) for start in range(0, len(keys), 12))


def test_the_index_tells_what_is_there(undisturbed):
    index = json.loads((undisturbed / "index.json").read_text())
    assert (index["kind"], index["frames"], index["skipped"]) == ("videos", 103, {})
    assert [shard["records"] for shard in index["shards"]] == [2, 2, 1]
    assert [(video["name"], video["label"], video["frames"]) for video in index["videos"]] == [
        (name, label, CLIPS[name][1]) for name, label in zip(CLIPS, (0, 0, 1, 1, 2), strict=True)
    ]


def test_clips_are_those_of_the_published_videos(undisturbed, source):
    fields = {"short_side": 32, "frame_rate": 10.0}
    prepared = dataclasses.replace(open_dataset("prepared_videos", undisturbed), **fields)
    raw = dataclasses.replace(open_kinetics(source), **fields)
    for index in (0, 4):
        ours, theirs = (
            reader.sample(index, np.random.default_rng(1), 4, (1, 2)).frames
            for reader in (pickle.loads(pickle.dumps(prepared)), raw)
        )
        assert_same_frames(ours, theirs)
    with pytest.raises(DataError, match=r"00000.array_record: train/abseiling/b.*has 16 frames, a clip of 17"):
        dataclasses.replace(prepared, frame_rate=None).sample(1, np.random.default_rng(1), 17, (1, 1))


def test_self_supervision_draws_from_prepared_videos(undisturbed):
    data = SelfSupervisedData(
        sources=(PreparedVideos.open(undisturbed),),
        global_batch_size=4,
        frames=4,
        global_size=32,
        local_size=16,
        mask_scheme="tubes",
    )
    batch = data.dataset(0, 0, 1)[0]
    assert batch["global_crops"].shape == (4, 2, 4, 32, 32, 3)
    assert batch["global_crops"].std() > 10


def test_what_is_in_tars_is_prepared_too(source, tmp_path):
    names = list(CLIPS)
    files = {"7f.mp4": (source / names[0]).read_bytes(), "7f.json": b"{}", "80.mp4": (source / names[4]).read_bytes()}
    write_tar(tmp_path / "in/train/000000.tar", files)
    assert run(tmp_path / "in", tmp_path / "out", dataset="pe_video") == 0
    prepared = PreparedVideos.open(tmp_path / "out")
    assert [prepared.record(index).name for index in (0, 1)] == ["train/000000.tar:7f", "train/000000.tar:80"]
    assert (prepared.name, prepared.labels, prepared.label(1)) == ("pe_video (train)", (), None)
    assert_same_frames(decoded(prepared.record(1).video)[0], decoded(files["80.mp4"])[0])


# Single videos


def test_times_of_a_variable_frame_rate_are_kept(tmp_path):
    path = write_timed(tmp_path / "a.mp4", real_frames(0, 40)[: len(TICKS)], TICKS)
    video = transcode(path, VideoOptions())
    frames, times = decoded(video.data)
    np.testing.assert_allclose(times, np.array(TICKS) / 30, atol=1e-4)
    assert_same_frames(frames, decoded(path.read_bytes())[0])
    with open_video(path) as theirs, open_video("b.mp4", file=io.BytesIO(video.data)) as ours:
        assert ours.frame_count == video.frames == theirs.frame_count == len(TICKS)
        assert video.frame_rate == theirs.frame_rate


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),  # what telephones held upright write: clockwise
        ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
        ((-1, 0, 0, -1), lambda frame: frame[::-1, ::-1]),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    ],
)
def test_videos_are_turned_as_players_show_them(tmp_path, matrix, shown):
    path = write_clip(tmp_path / "a.mp4", real_frames(2, 40)[:3])
    expected = [shown(frame) for frame in decoded(path.read_bytes())[0]]
    turn(path, matrix)
    video = transcode(path, VideoOptions())
    assert video.size == expected[0].shape[:2]
    found = decoded(video.data)[0].astype(int)
    assert found.shape == np.shape(expected)
    assert np.abs(found - expected).mean() < 4
    with av.open(io.BytesIO(video.data)) as container:
        assert next(container.decode(video=0)).rotation == 0  # not once more


def test_a_video_at_an_odd_angle_is_refused(tmp_path):
    turn(path := write_clip(tmp_path / "a.mp4", real_frames(2, 40)[:3]), (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(DataError, match=r"a\.mp4: its display matrix .* is no quarter turn"):
        transcode(path, VideoOptions())


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((96, 64), 48, (72, 48)), ((90, 160), 50, (50, 88)), ((96, 64), 64, (96, 64)), ((97, 65), 256, (96, 64))],
)
def test_sizes_are_scaled_down_and_even(tmp_path, size, short_side, expected):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:  # lossless and of colours as they are, of any size
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        for frame in (frames := resized(real_frames(2, 40)[:2], *size)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    found = decoded(transcode(path, VideoOptions(short_side, crf=10)).data)[0]
    cut = frames[:, : expected[1], : expected[0]] if short_side == 256 else resized(frames, *expected)
    assert_same_frames(found, cut, limit=5)


def test_the_same_video_gives_the_same_bytes(source):
    """With one thread and nothing else x264 differs in about one of ten runs on such videos."""
    for name in list(CLIPS)[:2]:
        assert len({transcode(source / name, VideoOptions(48)).data for _ in range(20)}) == 1


def test_a_video_of_one_frame_is_kept(tmp_path):
    path = write_clip(tmp_path / "a.mp4", real_frames(3, 40)[:1])
    video = transcode(path, VideoOptions())
    assert video.frames == 1
    assert_same_frames(decoded(video.data)[0], decoded(path.read_bytes())[0])


# Stops, damage and other settings


def test_a_killed_run_goes_on_to_the_same_bytes(undisturbed, source, tmp_path, capsys):
    assert_a_killed_run_goes_on_to_the_same_bytes(
        undisturbed, source, list(CLIPS)[4], tmp_path, PreparedVideos.open, SMALL, dataset="kinetics"
    )
    assert "3 shards, 2 finished already, 1 to do" in capsys.readouterr().out


def test_damaged_videos_are_left_out_and_counted_by_reason(source, tmp_path, capsys):
    root, names = tmp_path / "in", list(CLIPS)
    shutil.copytree(source, root)
    (root / names[1]).write_bytes(np.random.default_rng(0).bytes(5000))
    whole = (root / names[4]).read_bytes()
    (root / names[4]).write_bytes(whole[: len(whole) * 2 // 3])
    turn(root / names[0], (0.7, 0.7, -0.7, 0.7))
    assert run(root, tmp_path / "out") == 0
    told = capsys.readouterr().out
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert sorted((entry["first"].partition(": ")[0], entry["count"]) for entry in index["skipped"].values()) == [
        (names[0], 1),
        (names[1], 1),
        (names[4], 1),
    ]
    assert index["skipped"]["turned by an odd angle"]["count"] == 1
    for reason, entry in index["skipped"].items():
        assert f"skipped 1: {reason}; the first: {entry['first']}\n" in told
    assert re.search(r"2 videos, 32 frames, \d\.\d MiB in 1 shards: .*index\.json", told)
    prepared = PreparedVideos.open(tmp_path / "out")
    assert [prepared.record(index).name for index in range(len(prepared))] == names[2:4]
    assert [prepared.label(index) for index in range(len(prepared))] == [1, 1]


def test_a_source_without_one_whole_video_is_an_error(tmp_path, capsys):
    (tmp_path / "in/train").mkdir(parents=True)
    (tmp_path / "in/train/a.mp4").write_bytes(b"no video")
    assert run(tmp_path / "in", tmp_path / "out") == 1
    assert re.search(r"no video could be read; skipped 1: expected a video file", capsys.readouterr().err)


def test_checksums_find_a_flipped_bit(undisturbed, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    assert run(None, output, "--check") == 0
    path = output / "shards/00000.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(b"mdat") + 99] ^= 1
    path.write_bytes(data)
    assert run(None, output, "--check") == 1
    assert "00000.array_record: its sha256 is not that of the index" in capsys.readouterr().out
    prepared = PreparedVideos.open(output)
    with pytest.raises(DataError, match=r"00000\.array_record: record \d cannot be read"):
        [prepared.record(index) for index in range(2)]
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.array_record: there is no such file"):
        PreparedVideos.open(output)


def test_prepared_videos_can_be_checked_as_a_source(undisturbed, capsys):
    assert run(undisturbed, None, "--check", dataset="prepared_videos") == 0
    assert "5 records can be used, 0 faults" in capsys.readouterr().out


def test_an_output_of_other_settings_or_another_source_is_refused(undisturbed, source, tmp_path, capsys):
    before = contents(undisturbed)
    assert run(source, undisturbed, "--short_side=32", "--shard_videos=2") == 2
    told = capsys.readouterr().err
    assert "holds shards of other settings" in told
    assert "'short_side': 48} -> " in told
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "train/zumba").rename(other / "train/aerobics")
    assert run(other, undisturbed, *SMALL) == 2
    message = "begun from a source of 5 videos; 1 of them are gone now, 1 are new"
    assert message in capsys.readouterr().err
    assert contents(undisturbed) == before


def test_an_output_of_other_labels_is_refused(source, tmp_path, capsys):
    rows = tmp_path / "list.csv"
    rows.write_text("".join(f"{name},{label}\n" for label, name in enumerate(CLIPS)))
    line = (source, tmp_path / "out", f"--option=annotations={rows}", *SMALL)
    assert run(*line) == 0
    prepared = PreparedVideos.open(tmp_path / "out")
    assert (prepared.labels, [prepared.label(index) for index in range(5)]) == ((), [0, 1, 2, 3, 4])
    assert prepared.record(3).label_name is None
    rows.write_text(rows.read_text().replace(",3\n", ",7\n"))
    assert run(*line) == 2
    told = capsys.readouterr().err
    assert "begun with other labels of 1 videos (train/riding a bike/d_000000_000010.mkv is one)" in told


def test_videos_and_posed_sets_are_not_taken_for_each_other(undisturbed):
    with pytest.raises(DataError, match=r"is of the kind 'videos', expected 'posed'; open it as dataset prepared_vid"):
        Prepared.open(undisturbed)
    with pytest.raises(DataError, match=r"holds the split 'train' of kinetics, 'val' was asked for"):
        PreparedVideos.open(undisturbed, "val")


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        ("kinetics", ("--short_side=47",), "short_side: expected an even number of pixels"),
        ("kinetics", ("--crf=52",), "crf: expected 0 to 51, got 52"),
        ("kinetics", ("--shard_videos=0",), "shard_videos: expected at least 1, got 0"),
        ("kinetics", ("--chunk=8",), "--chunk: does nothing for kinetics, whose kind is videos"),
        ("kinetics", ("--option=frame_rate=5",), "option frame_rate: is for drawing clips"),
        ("scannet", ("--crf=20",), "--crf: does nothing for scannet, whose kind is posed"),
        ("grit", ("--crf=20",), "--crf: does nothing for grit, whose kind is captions"),
        ("prepared_videos", (), "dataset prepared_videos: is prepared already"),
    ],
)
def test_wrong_flags_are_one_message(source, tmp_path, capsys, dataset, arguments, message):
    assert run(source, tmp_path / "out", *arguments, dataset=dataset) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
