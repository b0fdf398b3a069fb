"""Clips per second from video files to batches, beside a PyTorch DataLoader that does the same work, in one run.

    python benchmarks/data.py --workers=2 --peer-python=/path/to/venv/bin/python

Embedded videos are transcoded to a short side of 256 pixels and a key frame every 12. Both sides then draw random clips
of 16 neighbouring frames, decode them with PyAV, cut a random crop to 224 x 224 (antialiased, bicubic), mirror half of
them and jitter brightness, contrast, saturation and hue, the same for all frames of a clip. Their samples alternate,
and those taken while other processes used more than half a core are repeated; the table gives medians. With --minutes
ours then goes on alone for that long, and the growth of its memory (workers included) is told.
"""

import argparse
import itertools
import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import grain
import numpy as np
from absl import flags
from peer import Peer, quiet

from omnistream_jax.data.embedded import embedded_files
from omnistream_jax.data.multicrop import FIRST_GLOBAL, Distortion, distort, draw_distortion, draw_view, render
from omnistream_jax.data.sources import VideoSource, video_source

SCALE = (0.32, 1.0)


def transcode(source: Path, target: Path, short_side: int, seconds: int) -> None:
    """A copy for training: small, with a key frame every 12 frames."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        video = reader.streams.video[0]
        ratio = short_side / min(video.width, video.height)
        stream = writer.add_stream("libx264", rate=25, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height = (2 * round(side * ratio / 2) for side in (video.width, video.height))
        stream.pix_fmt, stream.gop_size = "yuv420p", 12
        for number, frame in enumerate(itertools.islice(reader.decode(video), 25 * seconds)):
            frame = frame.reformat(width=stream.width, height=stream.height, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())


class Augment(grain.transforms.RandomMap):
    """A number -> a clip uint8 [T, S, S, 3] of one of the videos."""

    def __init__(self, source: VideoSource, frames: int, size: int):
        self._source, self._frames, self._size = source, frames, size

    def random_map(self, element: int, rng: np.random.Generator) -> np.ndarray:
        clip = self._source.sample(element % len(self._source), rng, self._frames, (1, 1)).frames
        crop = render(clip, draw_view(rng, *clip.shape[1:3], SCALE), self._size)
        return distort(crop, Distortion(jitter=draw_distortion(rng, FIRST_GLOBAL).jitter))


class Ours:
    """The Grain pipeline and its workers."""

    def __init__(self, source: VideoSource, arguments: argparse.Namespace):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        data = grain.MapDataset.range(1 << 30).seed(0)
        data = data.random_map(Augment(source, arguments.frames, arguments.size)).batch(arguments.batch)
        options = grain.MultiprocessingOptions(num_workers=arguments.workers, per_worker_buffer_size=2)
        stream = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(options)
        self._batches, self._arguments = iter(stream), arguments
        next(self._batches)

    def measure(self, batches: int) -> dict:
        for _ in range(2 * self._arguments.workers):  # made while the other side was measured
            next(self._batches)
        started = time.perf_counter()
        for _ in range(batches):
            batch = next(self._batches)
        assert batch.shape[0] == self._arguments.batch
        return {"clips_per_second": batches * self._arguments.batch / (time.perf_counter() - started)}


def family(pid: int) -> list[int]:
    """A process and all below it, whichever thread started them."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    below = [int(child) for children in lists for child in children.read_text().split()]
    return [pid, *itertools.chain.from_iterable(map(family, below))]


def memory_mb(pids: list[int]) -> str:
    """Memory of processes of their own, and of batches on their way between them; mapped files do not count."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    sums = [sum(int(text.partition(kind)[2].split()[0]) for text in texts) / 1e3 for kind in kinds]
    return " + ".join(f"{each:.0f}" for each in sums)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=12, help="of a sample")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0.0, help="of ours alone, for its memory")
    parser.add_argument("--peer-python", help="an interpreter with PyTorch and PyAV; none: ours alone")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        for file in embedded_files("videos", "train"):
            transcode(file, Path(folder) / f"{file.stem}.mp4", arguments.short_side, seconds=20)
        source = video_source(folder)
        paths = Path(folder) / "paths.txt"
        paths.write_text("\n".join(source.paths))
        ours, peer = Ours(source, arguments), None
        if arguments.peer_python:
            options = {name: getattr(arguments, name) for name in ("frames", "size", "batch", "workers")}
            peer = Peer(arguments.peer_python, "data_peer.py", paths=paths, **options)
        report(sample(ours, peer, arguments), arguments)
        if arguments.minutes:
            endure(ours, arguments)
        if peer:
            peer.close()


def sample(ours: Ours, peer: Peer | None, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Samples of each side in turn."""
    sides = {"ours": lambda: ours.measure(arguments.batches)}
    if peer:
        sides["PyTorch DataLoader"] = lambda: peer.measure(batches=arguments.batches)
        peer.measure(batches=1)  # its workers are there then
    pids = [pid for root in [os.getpid(), *([peer.pid] if peer else [])] for pid in family(root)]
    taken: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(arguments.samples):
        for name, measure in sides.items():
            taken[name].append(quiet(measure, pids))
    return taken


def report(taken: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    """Print the table."""
    shape = f"{arguments.frames} x {arguments.size} x {arguments.size} from short side {arguments.short_side}"
    print(f"clips of {shape}, batches of {arguments.batch}, {arguments.workers} workers, grain {grain.__version__}")
    print("| | clips/s | a worker | ours / theirs |\n|---|---|---|---|")
    rates = {
        name: float(np.median([entry["clips_per_second"] for entry in entries])) for name, entries in taken.items()
    }
    for name, rate in rates.items():
        busy = " (busy)" if any("busy" in entry for entry in taken[name]) else ""
        ratio = "" if name == "ours" else f"{rates['ours'] / rate:.2f}"
        print(f"| {name}{busy} | {rate:.1f} | {rate / max(arguments.workers, 1):.1f} | {ratio} |")


def endure(ours: Ours, arguments: argparse.Namespace) -> None:
    """Ours alone for some minutes: does its memory grow?"""
    ours.measure(arguments.batches)
    started, clips, sizes = time.monotonic(), 0, [memory_mb(family(os.getpid()))]
    while (minutes := (time.monotonic() - started) / 60) < arguments.minutes:
        ours.measure(arguments.batches)
        clips += arguments.batches * arguments.batch
        if minutes >= len(sizes):
            sizes.append(memory_mb(family(os.getpid())))
    print(f"memory in MB, own + shared, minute by minute, {clips:,} clips: {', '.join(sizes)}")


if __name__ == "__main__":
    main()
