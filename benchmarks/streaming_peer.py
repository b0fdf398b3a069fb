"""The PyTorch side of `streaming.py`: answers requests on standard input with one measurement each.

It imports the released model from the folder that --code names; see streaming.py for the three ways it is run.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads

parser = argparse.ArgumentParser()
parser.add_argument("--code", required=True)
parser.add_argument("--model", choices=SIZES, required=True)
parser.add_argument("--size", type=int, required=True)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
arguments = parser.parse_args()
sys.path.insert(0, arguments.code)

import torch  # noqa: E402
from model.configuration_omnistream import OmnistreamConfig  # noqa: E402
from model.modeling_omnistream import OmnistreamMultiFrameTransformer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = getattr(torch, arguments.dtype)
WIDTH, DEPTH, HEADS = SIZES[arguments.model]
HEAD_WIDTH = WIDTH // HEADS
SIDE = arguments.size // 16
TOKENS = SIDE * SIDE + 5
STREAM_UNIT = 16

torch.manual_seed(0)
config = OmnistreamConfig(
    image_size=arguments.size,
    hidden_size=WIDTH,
    video_aggregator_layer=DEPTH,
    num_attention_heads=HEADS,
    mlp_ratio=4.0,
)
released = OmnistreamMultiFrameTransformer(config).eval()
for parameter in released.parameters():
    if parameter.dim() > 1:
        parameter.data.normal_(0, 0.02)
released = released.to(DEVICE, DTYPE)
core = released.patch_embed


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, arguments.size, arguments.size, device=DEVICE, dtype=DTYPE)


def random_cache(frames: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape = (1, HEADS, frames * TOKENS, HEAD_WIDTH)
    return [tuple(torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)) for _ in range(DEPTH)]


def with_cache(frames: int) -> Callable[[], object]:
    """One frame through the released model, with the cache of the earlier ones."""
    past = tuple(random_cache(frames - 1)) if frames > 1 else None
    image = images(1)
    shape = (1, 1, 3, arguments.size, arguments.size)
    index, unit = frames - 1, max(STREAM_UNIT, frames)
    return lambda: core(image, shape, use_cache=True, past_key_values=past, logical_frame_idx=index, total_length=unit)


def recompute(frames: int) -> Callable[[], object]:
    """All frames at once, each seeing all: no cache, no mask."""
    pictures = images(frames)
    shape = (1, frames, 3, arguments.size, arguments.size)
    everything = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)  # broadcasts over queries and keys
    return lambda: core(pictures, shape, attention_mask=everything, total_length=max(STREAM_UNIT, frames))


def rotary_tables(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    quarter = HEAD_WIDTH // 4
    frequencies = 2 * math.pi / 100 ** (torch.arange(quarter) / quarter)
    centres = 2 * (torch.arange(SIDE) + 0.5) / SIDE - 1
    one_axis = (centres[:, None] * frequencies).repeat(1, 2)
    angles = torch.cat(
        [one_axis[:, None].expand(SIDE, SIDE, -1), one_axis[None].expand(SIDE, SIDE, -1)], dim=-1
    ).reshape(SIDE * SIDE, HEAD_WIDTH)
    angles = angles.clone()
    angles[:, 3::4] = ((frames - 1) / STREAM_UNIT * frequencies[: HEAD_WIDTH // 8]).repeat(2)
    special = torch.zeros(5, HEAD_WIDTH)
    angles = torch.cat([special, angles]).to(DEVICE)
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


def tuned(frames: int) -> Callable[[], object]:
    """The same mathematics with a preallocated cache, no mask, and rotary tables made once."""
    caches = random_cache(frames)
    cos, sin = rotary_tables(frames)
    image = images(1)
    version = 0 if frames == 1 else 1

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def run() -> torch.Tensor:
        patches = core.patch_embed(image).flatten(1, 2)
        x = torch.cat([core.cls_token, core.register_token[:, version], patches], 1)
        for block, (keys, values) in zip(core.blocks, caches, strict=True):
            qkv = block.attn.qkv(block.norm1(x)).reshape(1, TOKENS, 3, HEADS, HEAD_WIDTH)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            keys[:, :, -TOKENS:] = rotate(key)
            values[:, :, -TOKENS:] = value
            attended = torch.nn.functional.scaled_dot_product_attention(rotate(query), keys, values)
            x = x + block.ls1(block.attn.proj(attended.transpose(1, 2).reshape(1, TOKENS, WIDTH)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return core.post_layernorm(x)

    return run


MODES = {"cache": with_cache, "recompute": recompute, "tuned": tuned}


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_gb() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


current, run = None, None
for line in sys.stdin:
    request = json.loads(line)
    try:
        with torch.inference_mode():
            if (request["mode"], request["frames"]) != current:
                run = None
                current = (request["mode"], request["frames"])
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                run = MODES[request["mode"]](request["frames"])
                run()
            synchronise()
            started = time.perf_counter()
            run()
            synchronise()
            answer = {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": peak_gb()}
    except (RuntimeError, MemoryError) as error:  # PyTorch tells the lack of memory as either
        lacking = "out of memory" in str(error).lower() or "can't allocate" in str(error).lower()
        answer = {"error": "out of memory" if lacking else str(error).splitlines()[0][:80]}
        current, run = None, None
    print(json.dumps(answer), flush=True)
