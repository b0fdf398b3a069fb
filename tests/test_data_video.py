"""Single frames of a video are exactly those of decoding it from the start; what is no video is refused."""

import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_cases import turn
from PIL import Image

from omnistream_jax.data import embedded, images, video
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.video import open_video

HEIGHT, WIDTH = 64, 96


def _write(path: Path, codec="libx264", pixels="yuv420p", frames=40, **options: str) -> Path:
    """A video of a panned random texture, a key frame every 12 frames."""
    texture = np.random.default_rng(0).integers(0, 255, (8, 40, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(texture).resize((320, HEIGHT)))
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, pixels, 12
        stream.options = options
        for index in range(frames):
            picture = np.ascontiguousarray(texture[:, 4 * index : 4 * index + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def _decode_all(path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return np.stack([f.to_ndarray(format="rgb24", interpolation=video._SCALING) for f in frames])


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),  # what telephones held upright write: clockwise
        ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
        ((-1, 0, 0, -1), lambda frame: frame[::-1, ::-1]),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    ],
)
def test_frames_are_turned_as_players_show_them(tmp_path, matrix, shown):
    path = _write(tmp_path / "a.mp4", frames=3)
    expected = np.stack([shown(frame) for frame in _decode_all(path)])
    turn(path, matrix)
    with open_video(path) as reader:
        assert reader.size == expected.shape[1:3]
        np.testing.assert_array_equal(reader.read(range(3)), expected)
        assert reader.read([0], short_side=32).shape[1:3] == tuple(side // 2 for side in expected.shape[1:3])


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("plain.mp4", "libx264", "yuv420p", {}),
        ("open_gop.mp4", "libx264", "yuv420p", {"bf": "4", "x264-params": "open-gop=1"}),
        ("full_chroma.mp4", "libx264", "yuv444p", {}),
        ("plain.mkv", "libx264", "yuv420p", {"bf": "2"}),
        ("part2.avi", "mpeg4", "yuv420p", {}),
        ("every_frame_a_key.mov", "mjpeg", "yuvj420p", {}),
    ],
)
def test_frames_in_any_order_equal_sequential_decoding(tmp_path, name, codec, pixels, options):
    path = _write(tmp_path / name, codec, pixels, **options)
    every = _decode_all(path)
    rng = np.random.default_rng(1)
    with open_video(path) as reader:
        assert (reader.frame_count, reader.size, reader.frame_rate) == (40, (HEIGHT, WIDTH), 25)
        for _ in range(25):
            indices = rng.integers(0, 40, rng.integers(1, 6))  # repeated ones too
            np.testing.assert_array_equal(reader.read(indices), every[indices])
        np.testing.assert_array_equal(reader.read(range(39, -1, -1)), every[::-1])


@pytest.mark.parametrize("path", embedded.embedded_files("videos", "heldout"), ids=lambda path: path.name)
def test_embedded_videos_are_read_exactly(path):
    every = _decode_all(path)
    with open_video(path) as reader:
        assert reader.frame_count == len(every)
        indices = np.random.default_rng(2).permutation(len(every))[:12]
        np.testing.assert_array_equal(reader.read(indices), every[indices])


def test_short_side_scales_both_sides(tmp_path):
    with open_video(_write(tmp_path / "a.mp4")) as reader:
        small = reader.read([3, 17], short_side=32)
        full = reader.read([3, 17])
    assert small.shape == (2, 32, 48, 3)
    luma = np.array([0.299, 0.587, 0.114])  # colour is stored at half the resolution, and so scaled otherwise
    means = (full @ luma).reshape(2, 32, 2, 48, 2).mean(axis=(2, 4))
    assert np.abs(small @ luma - means).mean() < 3


def test_no_frames_is_an_empty_array(tmp_path):
    with open_video(_write(tmp_path / "a.mp4")) as reader:
        assert reader.read([]).shape == (0, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("index", [-1, 40])
def test_a_frame_out_of_range_is_refused(tmp_path, index):
    with open_video(_write(tmp_path / "a.mp4")) as reader, pytest.raises(DataError, match=r"a\.mp4.*has 40 frames"):
        reader.read([0, index])


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.5, 0.99])
def test_a_truncated_video_is_refused_by_name(tmp_path, share):
    content = _write(tmp_path / "whole.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"cut\.mp4"):
        open_video(path)


def test_other_files_are_no_video(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    with pytest.raises(DataError, match=r"text\.mp4: expected a video file"):
        open_video(text)
    with pytest.raises(DataError, match=r"gone\.mp4: there is no such video file"):
        open_video(tmp_path / "gone.mp4")
    with pytest.raises(DataError, match="expected a video file"):
        open_video(tmp_path)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(DataError, match=r"sound\.mp4: .*no video stream"):
        open_video(sound)


def test_an_avi_with_b_frames_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b_frames\.avi: an AVI with B-frames.*transcode it to mp4"):
        open_video(_write(tmp_path / "b_frames.avi", bf="2"))


def test_a_video_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.mp4")
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DataError, match=f"{WIDTH} x {HEIGHT} pixels"):
        open_video(path)


def _texture(height=12, width=20) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_images_are_rgb_and_upright(tmp_path):
    texture = _texture()
    Image.fromarray(texture).save(tmp_path / "plain.png")
    np.testing.assert_array_equal(read_image(tmp_path / "plain.png"), texture)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: shown turned by 90 degrees clockwise
    Image.fromarray(texture).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(texture, -1))
    Image.fromarray(texture[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), np.repeat(texture[..., :1], 3, axis=2))
    alpha = np.where(np.arange(20) < 10, 255, 0).astype(np.uint8)
    rgba = np.concatenate([texture, np.broadcast_to(alpha[None, :, None], (12, 20, 1))], axis=2)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), texture * (alpha[None, :, None] > 0))


def test_bad_images_are_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(_texture()).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for name in ("cut.png", "text.jpg", "deep.png"):
        with pytest.raises(DataError, match=f"{name}: expected a whole image file"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.png: there is no such image file"):
        read_image(tmp_path / "gone.png")
    decoded = []
    monkeypatch.setattr(images, "_to_rgb", decoded.append)
    with pytest.raises(DataError, match=r"whole\.png: 20 x 12 pixels, at most 239"):
        read_image(tmp_path / "whole.png", max_pixels=239)
    assert not decoded


def _bomb(side: int, bits: int) -> bytes:
    """A whole PNG of black pixels, so many bits each."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels, row = zlib.compressobj(), bytes(1 + side * bits // 8)
    content = b"".join([*(pixels.compress(row) for _ in range(side)), pixels.flush()])
    header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


# Not ru_maxrss, which begins with the peak of the process that started this one.
READ_BOMB = """
import importlib, sys
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
module, _, name = sys.argv[1].partition(":")
read = getattr(importlib.import_module("omnistream_jax.data." + module), name)
before = peak()
try:
    for _ in read(sys.argv[2]):  # some read when they are asked for more
        pass
except Exception as error:
    print(peak() - before, type(error).__name__, error)
"""


@pytest.mark.parametrize("reader", ["images:read_image", "readers.files:read_png16"])
@pytest.mark.parametrize("side", [10_000, 20_000])  # the second is beyond Pillow's own limit too
def test_a_small_file_of_a_huge_picture_is_refused_without_the_memory_for_it(tmp_path, reader, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(_bomb(side, bits=1))
    assert path.stat().st_size < 100_000
    assert "pixels" in _refusal(reader, path)


@pytest.mark.parametrize("reader", ["video:open_video", "frames:_video_frames"])
def test_a_small_video_of_a_huge_frame_is_refused_without_the_memory_for_it(tmp_path, reader):
    path = tmp_path / "bomb.mov"
    with av.open(path, "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "gray"
        packet = av.Packet(_bomb(16_000, bits=8))
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
        container.mux(packet)
    assert path.stat().st_size < 1_000_000
    _refusal(reader, path)


def _refusal(reader: str, path: Path) -> str:
    """What a reader says of a file that would take hundreds of megabytes, having taken less than a hundred."""
    result = subprocess.run(
        [sys.executable, "-c", READ_BOMB, reader, str(path)], capture_output=True, text=True, timeout=60
    )
    kibibytes, kind, told = result.stdout.split(maxsplit=2)
    assert kind == "DataError"
    assert f"{path}: " in told
    assert int(kibibytes) < 100 * 1024
    return told
