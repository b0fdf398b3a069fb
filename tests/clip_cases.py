"""Clips of many sizes, lengths and codecs, made from the embedded videos."""

import functools
import itertools
import struct
from pathlib import Path

import av
import numpy as np
from PIL import Image

from omnistream_jax.data.embedded import embedded_files


@functools.cache
def real_frames(index: int, count: int) -> tuple[np.ndarray, ...]:
    """The first frames of an embedded video, scaled to 240 x 136."""
    names = ("bicycles", "cockatoo", "pedestrians", "street_4", "tree")
    files = {file.stem: file for split in ("train", "heldout") for file in embedded_files("videos", split)}
    with av.open(str(files[names[index]])) as container:
        frames = [frame.to_image() for frame in itertools.islice(container.decode(video=0), count)]
    assert len(frames) == count
    return tuple(np.asarray(frame.resize((240, 136))) for frame in frames)


def write_clip(path: Path, frames, codec="libx264", rate=25, size=(96, 64), **options: str) -> Path:
    """A video of the frames, scaled to size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    muxing = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=muxing) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 12
        stream.options = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


def write_pictures(folder: Path, frames) -> Path:
    """A folder of pictures 0.png, 1.png, ... 10.png, without leading zeros."""
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def decode_plainly(path: Path, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """All frames of a video or of a folder of pictures, stretched, and their times: what extraction is held against."""
    frames, times = [], []
    if path.is_dir():
        files = sorted(path.iterdir(), key=lambda file: int(file.stem))
        pictures = [av.VideoFrame.from_image(Image.open(file)) for file in files]
        times = [index / 30 for index in range(len(files))]
    else:
        with av.open(str(path)) as container:
            pictures = list(container.decode(video=0))
        times = [frame.time for frame in pictures]
    for picture in pictures:
        small = picture.reformat(width=width, height=height, format="rgb24", interpolation=0x20 | 0x40000 | 0x80000)
        frames.append(small.to_ndarray())
    return np.stack(frames), np.array(times)


def write_twenty(folder: Path) -> dict[str, Path]:
    """Twenty items, by name: 17 videos and a folder of pictures that are whole, and two damaged videos."""
    kinds = [
        (".mp4", "libx264", {"bf": "2"}),
        (".avi", "mpeg4", {}),
        (".webm", "libvpx-vp9", {}),
        (".mkv", "libx264", {}),
        (".mov", "mjpeg", {}),
        (".ts", "libx264", {}),
        (".mp4", "libx265", {"x265-params": "log-level=none"}),
    ]
    sizes, lengths = [(96, 64), (160, 90), (64, 64), (90, 160)], [1, 7, 16, 12, 5]
    paths = []
    for index in range(17):
        suffix, codec, options = kinds[index % len(kinds)]
        frames = real_frames(index % 5, 40)[: lengths[index % len(lengths)]]
        path = folder / f"group {index % 3}" / f"clip_{index}{suffix}"
        rate = (25, 30, 12)[index % 3]
        paths.append(write_clip(path, frames, codec, rate, sizes[index % len(sizes)], **options))
    paths.append(write_pictures(folder / "pictures" / "walk", real_frames(1, 40)[:16]))
    whole = paths[0].with_name("whole.mp4")
    data = write_clip(whole, real_frames(2, 40)).read_bytes()
    whole.unlink()
    paths.append(folder / "damaged" / "truncated.mp4")
    paths[-1].parent.mkdir()
    paths[-1].write_bytes(data[: len(data) * 2 // 3])
    paths.append(folder / "garbage.mkv")
    paths[-1].write_bytes(np.random.default_rng(0).bytes(5000))
    return {path.relative_to(folder).as_posix(): path for path in paths}


def turn(path: Path, matrix) -> None:
    """Writes a, b, c and d of the track header's matrix (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
