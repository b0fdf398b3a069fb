"""Decoding from the first frame to the last: sampling by time, sizes, damage, worker processes."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clip_cases import decode_plainly, real_frames, turn, write_clip, write_pictures
from PIL import Image

from omnistream_jax.data.decode_pool import DecodePool
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.frames import FrameOptions, TimedFrame, decode_item, exact_rate, sample_frames
from omnistream_jax.data.items import Item, list_items

SMALL = FrameOptions(height=32, width=48)


def read(path: Path, options: FrameOptions = SMALL, kind="video"):
    chunks = list(decode_item(Item(path.name, str(path), kind), options))
    frames, times = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("frames", "times"))
    return frames, times, chunks


def sampled(times, rate) -> list[int]:
    """Indices of the frames that are taken."""
    frames = [TimedFrame(Fraction(repr(time)), 0.0, lambda index=index: index) for index, time in enumerate(times)]
    return [frame.picture() for frame in sample_frames(frames, exact_rate(rate))]


@pytest.mark.parametrize(
    ("times", "rate", "taken"),
    [
        ([i / 25 for i in range(20)], 5.0, [0, 5, 10, 15]),
        ([i / 25 for i in range(20)], 25.0, list(range(20))),
        ([i / 25 for i in range(20)], 90.0, list(range(20))),
        ([round(i / 30, 3) for i in range(31)], 30.0, list(range(31))),  # Matroska's milliseconds
        ([round(i / 30, 3) for i in range(31)], 10.0, list(range(0, 31, 3))),
        ([round(i * 1001 / 30000, 6) for i in range(90)], 29.97, list(range(90))),
        ([7.5], 5.0, [0]),
        ([0.0, 0.1, 0.2, 3.0, 3.1], 10.0, [0, 1, 2, 3, 4]),  # a gap is not filled
        ([0.0, 0.4, 0.9, 1.1, 2.0], 1.0, [0, 2, 4]),
    ],
)
def test_the_frames_nearest_to_even_times_are_taken_once(times, rate, taken):
    assert sampled(times, rate) == taken


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "2"}),
        ("a.mkv", "libx264", {"bf": "2"}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {}),
        ("a.mov", "mjpeg", {}),
        ("a.ts", "libx264", {}),
    ],
)
def test_whole_videos_are_read_to_the_end_and_cut_ones_refused(tmp_path, name, codec, options):
    path = write_clip(tmp_path / name, real_frames(0, 40), codec, **options)
    expected, _ = decode_plainly(path, 32, 48)
    frames, times, chunks = read(path)
    assert [len(chunk.times) for chunk in chunks] == [16, 16, 8]
    assert chunks[0].source_size == (64, 96)
    assert [chunk.progress for chunk in chunks] == sorted(chunk.progress for chunk in chunks)
    np.testing.assert_array_equal(frames, expected)
    np.testing.assert_allclose(times, np.arange(40) / 25, atol=1e-3)  # from 0, whatever the container's clock says

    if path.suffix == ".ts":
        return  # a transport stream promises no length
    data = path.read_bytes()
    for share in (0.9, 0.6, 0.25):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=name):
            read(path)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_with_reordered_frames_gets_even_times(tmp_path, codec):
    path = write_clip(tmp_path / "a.avi", real_frames(0, 40), codec, bf="2")
    frames, times, _ = read(path)
    np.testing.assert_array_equal(frames, decode_plainly(path, 32, 48)[0])
    np.testing.assert_allclose(np.diff(times), 1 / 25, atol=1e-6)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mov", "mjpeg")])
def test_flipped_bytes_are_refused_and_not_concealed(tmp_path, name, codec):
    path = write_clip(tmp_path / name, real_frames(0, 40), codec)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[np.random.default_rng(0).integers(len(data) // 3, len(data) * 2 // 3, 60)] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(DataError, match=name):
        read(path)


def test_a_file_without_video_or_missing_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.mp4: expected a video file"):
        read(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="no such video file"):
        read(tmp_path / "b.mp4")


def test_crop_keeps_proportions_and_takes_the_middle(tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 200  # the middle third
    pixels[:20, 40:80, 0] = 90
    folder = write_pictures(tmp_path / "pictures", [pixels])
    cropped = read(folder, FrameOptions(20, 20, "crop"), "images")[0][0]
    assert (cropped[:, :, 1] == 200).all()
    assert (cropped[:10, :, 0] == 90).all()
    stretched = read(folder, FrameOptions(20, 30, "stretch"), "images")[0][0]
    assert (stretched[:, [0, 9, 20, 29], 1] == 0).all()
    assert (stretched[:, 10:20, 1] == 200).all()


def test_a_frame_turned_in_its_container_is_brought_upright(tmp_path):
    path = write_clip(tmp_path / "a.mp4", real_frames(0, 4))
    plain = decode_plainly(path, 32, 48)[0]
    turn(path, (0, 1, -1, 0))  # show it turned by 90 degrees clockwise
    frames, _, chunks = read(path, FrameOptions(48, 32))
    assert chunks[0].source_size == (96, 64)
    np.testing.assert_array_equal(frames, np.rot90(plain, -1, axes=(1, 2)))


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    images = [np.full((16, 16, 3), 10 * index, np.uint8) for index in range(12)]
    folder = write_pictures(tmp_path / "pictures", images)
    frames, times, _ = read(folder, FrameOptions(16, 16, image_rate=10.0), "images")
    assert frames[:, 0, 0, 0].tolist() == [10 * index for index in range(12)]
    np.testing.assert_allclose(times, np.arange(12) / 10)
    frames, times, _ = read(folder, FrameOptions(16, 16, image_rate=10.0, frame_rate=2.0), "images")
    assert times.tolist() == [0.0, 0.5, 1.0]
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png"):
        read(folder, FrameOptions(16, 16), "images")


def test_a_tree_is_listed_as_videos_and_folders_of_pictures(tmp_path):
    for name in ("b/x.MP4", "a/2.jpg", "a/clip.avi", "a/.hidden.mp4", ".git/y.mp4", "notes.md", "top.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = {(item.name, item.kind) for item in list_items(tmp_path)}
    assert found == {("a", "images"), ("a/clip.avi", "video"), ("b/x.MP4", "video"), (tmp_path.name, "images")}


def test_a_text_list_names_items_relative_to_itself(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "list.txt").write_text("b.strange\n\npictures/\n./sub/a.mp4\n/else/c.mp4\n")
    items = list_items(tmp_path / "list.txt")
    assert [(item.name, item.kind) for item in items] == [
        ("/else/c.mp4", "video"),
        ("b.strange", "video"),
        ("pictures", "images"),
        ("sub/a.mp4", "video"),
    ]
    (tmp_path / "list.txt").write_text("a.mp4\n./a.mp4\n")
    with pytest.raises(DataError, match=r"line 2: '\./a\.mp4' stands in line 1 already"):
        list_items(tmp_path / "list.txt")


@pytest.mark.parametrize("content", ["", None])
def test_nothing_to_do_is_refused(tmp_path, content):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"list\.txt.*: (holds no video|there is no such)"):
        list_items(path)


def test_workers_import_no_jax():
    program = (
        "import sys, omnistream_jax.data.decode_pool\n"
        "print([name for name in ('jax', 'jaxlib', 'flax', 'grain', 'absl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pool_gives_what_decoding_here_gives_and_outlives_a_dead_worker(tmp_path):
    paths = [write_clip(tmp_path / f"{index}.mp4", real_frames(index, 40)) for index in range(3)]
    items = list_items(tmp_path)
    options = FrameOptions(32, 48, chunk=2)
    chunks, ends = {item.name: [] for item in items}, {}
    with DecodePool(items, options, workers=1, prefetch=1) as pool:
        for decoded in pool:
            if decoded.chunk is None:
                ends[decoded.item.name] = decoded.failure
                continue
            chunks[decoded.item.name].append(decoded.chunk.frames)
            if decoded.item.name == "1.mp4" and len(chunks["1.mp4"]) == 1:
                (process,) = pool._processes
                os.kill(process.pid, signal.SIGKILL)
    assert ends == {"0.mp4": None, "1.mp4": f"{paths[1]}: the decoding process died of it (SIGKILL)", "2.mp4": None}
    assert len(chunks["1.mp4"]) < 20
    for name in ("0.mp4", "2.mp4"):
        np.testing.assert_array_equal(np.concatenate(chunks[name]), decode_plainly(tmp_path / name, 32, 48)[0])


def test_closing_the_pool_early_ends_its_processes(tmp_path):
    for index in range(4):
        write_clip(tmp_path / f"{index}.mp4", real_frames(0, 40))
    pool = DecodePool(list_items(tmp_path), FrameOptions(256, 256, chunk=1), workers=2, prefetch=1)
    next(iter(pool))
    processes = list(pool._processes)
    pool.close()
    assert processes
    assert all(process.poll() is not None for process in processes)
    assert not pool._processes


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 4_000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 20000 x 4000"):
        read(tmp_path, SMALL, "images")
