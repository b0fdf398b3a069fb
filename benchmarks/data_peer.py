"""The PyTorch side of `data.py`: a DataLoader whose workers decode with PyAV and augment with torch operations.

It does the work of ours: sixteen neighbouring frames, a random crop to a square by antialiased bicubic interpolation,
mirrored half of the time, colour jitter that is the same for all frames, uint8 batches.
"""

import argparse
import math
import resource
import time

import av
import numpy as np
import torch
from peer import serve
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

ASPECT, SCALE = (3 / 4, 4 / 3), (0.32, 1.0)
LUMINANCE = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)


class Clips(Dataset):
    """Random clips of a list of videos."""

    def __init__(self, paths: list[str], frames: int, size: int):
        self._paths, self._frames, self._size = paths, frames, size

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> torch.Tensor:
        random = np.random.default_rng(index)
        clip = decode(self._paths[index % len(self._paths)], self._frames, random)
        return jitter(crop(clip, self._size, random), random)


def decode(path: str, frames: int, random: np.random.Generator) -> torch.Tensor:
    """[T, 3, H, W] in 0 to 1: seek to the key frame before a random start, decode forward."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        start = int(random.integers(stream.frames - frames + 1))
        stamp = int(start / stream.average_rate / stream.time_base)
        container.seek(stamp, stream=stream)
        found = []
        for frame in container.decode(stream):
            if frame.pts >= stamp:
                found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == frames:
                    break
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def crop(clip: torch.Tensor, size: int, random: np.random.Generator) -> torch.Tensor:
    height, width = clip.shape[2:]
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_width <= width and box_height <= height:
            break
    else:
        box_width = box_height = min(height, width)
    left, top = random.integers(width - box_width + 1), random.integers(height - box_height + 1)
    clip = clip[:, :, top : top + box_height, left : left + box_width]
    clip = functional.interpolate(clip, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return clip.flip(3) if random.random() < 0.5 else clip


def jitter(clip: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue in a random order, four times out of five; uint8."""
    changes = [brightness, contrast, saturation, hue]
    if random.random() < 0.8:
        for change in random.permutation(4):
            clip = changes[change](clip, random)
    return (clip * 255).round().byte()


def brightness(clip, random):
    return (clip * random.uniform(0.6, 1.4)).clamp(0, 1)


def contrast(clip, random):
    mean = (clip * LUMINANCE).sum(1).mean()
    return (mean + (clip - mean) * random.uniform(0.6, 1.4)).clamp(0, 1)


def saturation(clip, random):
    grey = (clip * LUMINANCE).sum(1, keepdim=True)
    return (grey + (clip - grey) * random.uniform(0.8, 1.2)).clamp(0, 1)


def hue(clip, random):
    """The colour circle turned, through HSV."""
    largest, smallest = clip.amax(1), clip.amin(1)
    spread = largest - smallest
    divisor = torch.where(spread == 0, 1.0, spread)
    red, green, blue = clip.unbind(1)
    turn = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turn = (turn / 6 + random.uniform(-0.1, 0.1)) % 1
    weight = spread / torch.where(largest == 0, 1.0, largest)
    sector = turn[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0]).reshape(1, 3, 1, 1)
    sector = sector % 6
    shade = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return largest[:, None] * (1 - weight[:, None] * shade)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--paths", required=True, help="a text file, one video a line")
    for name in ("frames", "size", "batch", "workers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with open(arguments.paths, encoding="utf-8") as file:
        clips = Clips(file.read().split("\n"), arguments.frames, arguments.size)
    batches = iter(DataLoader(clips, arguments.batch, num_workers=arguments.workers, prefetch_factor=2))
    next(batches)

    def measure(request: dict) -> dict:
        for _ in range(2 * arguments.workers):  # made while the other side was measured
            next(batches)
        started = time.perf_counter()
        for _ in range(request["batches"]):
            next(batches)
        return {
            "clips_per_second": request["batches"] * arguments.batch / (time.perf_counter() - started),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }

    serve(measure)


if __name__ == "__main__":
    main()
