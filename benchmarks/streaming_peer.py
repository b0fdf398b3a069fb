"""The PyTorch side of `streaming.py`: answers requests on standard input with one measurement each.

It imports the released model from the folder that --code names; see streaming.py for the three ways it is run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from peer import SIZES, SPECIAL_TOKENS, released_model, rotary_angles, serve, torch_peak_gb

parser = argparse.ArgumentParser()
parser.add_argument("--code", required=True)
parser.add_argument("--model", choices=SIZES, required=True)
parser.add_argument("--size", type=int, required=True)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
arguments = parser.parse_args()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = getattr(torch, arguments.dtype)
WIDTH, DEPTH, HEADS = SIZES[arguments.model]
HEAD_WIDTH = WIDTH // HEADS
SIDE = arguments.size // 16
TOKENS = SIDE * SIDE + SPECIAL_TOKENS
STREAM_UNIT = 16

released = released_model(arguments.code, arguments.model, arguments.size).to(DEVICE, DTYPE)
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
    angles = rotary_angles(SIDE, HEAD_WIDTH, (frames - 1) / STREAM_UNIT).to(DEVICE)
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


current, run = None, None


@torch.inference_mode()
def measure(request: dict) -> dict:
    global current, run
    wanted = (request["mode"], request["frames"])
    if wanted != current:
        current, run = None, None
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run = MODES[request["mode"]](request["frames"])
        run()
        current = wanted
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": torch_peak_gb()}


serve(measure)
