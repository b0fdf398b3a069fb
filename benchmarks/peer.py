"""What the benchmarks share: the PyTorch process, samples on a quiet machine, peak memory.

Imported on both sides, by an interpreter with JAX and by one with PyTorch, so neither is imported at the top.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_OTHERS = 0.5  # cores that other processes may use while a sample is taken
MAX_REPEATS = 5
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads
SPECIAL_TOKENS = 5  # a CLS token and four registers


class Peer:
    """A script beside this file in another interpreter; each request is a line of JSON, and so is each answer."""

    def __init__(self, python: str, script: str, **options: object):
        command = [python, str(Path(__file__).parent / script)]
        command += [f"--{name}={value}" for name, value in options.items()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def measure(self, **request: object) -> dict:
        """{"ms": ..., "peak_gb": ...} of one step, or {"error": ...}."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"the peer ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(measure: Callable[[dict], dict]) -> None:
    """The peer's side: answer each request on standard input until it ends; what PyTorch raises is answered too."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = measure(request)
        except (RuntimeError, MemoryError) as error:  # PyTorch tells the lack of memory as either
            text = str(error)
            lacking = isinstance(error, MemoryError) or any(
                words in text.lower() for words in ("out of memory", "can't allocate")
            )
            answer = {"error": "out of memory" if lacking else (text.splitlines() or [repr(error)])[0][:80]}
        print(json.dumps(answer), flush=True)


def resident_peak_gb() -> float:
    """The most memory that this process held so far, code and compilers included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def jax_peak_gb() -> float:
    """Peak memory of the accelerator where its allocator tells it, else of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else resident_peak_gb()


def torch_peak_gb() -> float:
    """Peak memory of the GPU since its statistics were reset, else of this process."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else resident_peak_gb()


def _busy_seconds() -> float:
    user, nice, system, _, _, interrupt, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def _own_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def quiet(sample: Callable[[], dict], pids: list[int]) -> dict:
    """A sample taken while other processes used little; the last one of `MAX_REPEATS` says "busy" if none was."""
    for _ in range(MAX_REPEATS):
        busy, own, started = _busy_seconds(), _own_seconds(pids), time.monotonic()
        result = sample()
        elapsed = max(time.monotonic() - started, 1e-3)
        others = (_busy_seconds() - busy - (_own_seconds(pids) - own)) / elapsed
        if others <= MAX_OTHERS or "error" in result:
            return result
    return {**result, "busy": True}


def released_model(code: str, model: str, size: int) -> "torch.nn.Module":
    """The released model with random weights, float32 on the CPU, from the folder that holds its `model` package."""
    sys.path.insert(0, code)
    import torch
    from model.configuration_omnistream import OmnistreamConfig
    from model.modeling_omnistream import OmnistreamMultiFrameTransformer

    torch.manual_seed(0)
    width, depth, heads = SIZES[model]
    config = OmnistreamConfig(
        image_size=size,
        hidden_size=width,
        video_aggregator_layer=depth,
        num_attention_heads=heads,
        mlp_ratio=4.0,
    )
    released = OmnistreamMultiFrameTransformer(config).eval()
    for parameter in released.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
    return released


def rotary_angles(side: int, head_width: int, time_coordinate: float) -> "torch.Tensor":
    """Angles of one frame's tokens as the released model turns them, [5 + side * side, head width], on the CPU."""
    import torch

    quarter = head_width // 4
    frequencies = 2 * math.pi / 100 ** (torch.arange(quarter) / quarter)
    centres = 2 * (torch.arange(side) + 0.5) / side - 1
    one_axis = (centres[:, None] * frequencies).repeat(1, 2)
    angles = torch.cat(
        [one_axis[:, None].expand(side, side, -1), one_axis[None].expand(side, side, -1)], dim=-1
    ).reshape(side * side, head_width)
    angles = angles.clone()
    angles[:, 3::4] = (time_coordinate * frequencies[: head_width // 8]).repeat(2)
    return torch.cat([torch.zeros(SPECIAL_TOKENS, head_width), angles])
