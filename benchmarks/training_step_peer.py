"""The PyTorch side of `training_step.py`: answers each request on standard input with one measured step.

It imports the released model from the folder that --code names; see training_step.py for the three ways it is run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from peer import SIZES, SPECIAL_TOKENS, released_model, rotary_angles, serve, torch_peak_gb
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--code", required=True)
parser.add_argument("--mode", choices=["released", "stored", "tuned"], required=True)
parser.add_argument("--model", choices=SIZES, required=True)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
for name in ("size", "frames", "batch", "remat"):
    parser.add_argument(f"--{name}", type=int, required=True)
arguments = parser.parse_args()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = getattr(torch, arguments.dtype)
WIDTH, DEPTH, HEADS = SIZES[arguments.model]
HEAD_WIDTH = WIDTH // HEADS
SIDE = arguments.size // 16
TOKENS = SIDE * SIDE + SPECIAL_TOKENS
BATCH, FRAMES = arguments.batch, arguments.frames

Features = tuple[torch.Tensor, torch.Tensor]  # patches [B, T, patches, d], CLS [B, T, d]


def released_features(released: torch.nn.Module) -> Callable[[torch.Tensor], Features]:
    """The released forward pass; in training mode it recomputes its blocks and jitters the positions."""

    def features(frames: torch.Tensor) -> Features:
        out = released(pixel_values=frames, return_dict=True)
        return out.last_hidden_state, out.pooler_output

    return features


def tuned_features(released: torch.nn.Module) -> Callable[[torch.Tensor], Features]:
    """The same mathematics without a mask: a frame's queries meet the keys up to its own."""
    core = released.patch_embed
    unit = max(16, FRAMES)
    angles = torch.cat([rotary_angles(SIDE, HEAD_WIDTH, t / unit) for t in range(FRAMES)]).to(DEVICE)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def run_block(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        qkv = block.attn.qkv(block.norm1(x)).reshape(BATCH, FRAMES * TOKENS, 3, HEADS, HEAD_WIDTH)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query), rotate(key)
        attended = [
            functional.scaled_dot_product_attention(
                of_frame, key[:, :, : (t + 1) * TOKENS], value[:, :, : (t + 1) * TOKENS]
            )
            for t, of_frame in enumerate(query.split(TOKENS, 2))
        ]
        joined = torch.cat(attended, 2).transpose(1, 2).reshape(BATCH, FRAMES * TOKENS, WIDTH)
        x = x + block.ls1(block.attn.proj(joined))
        return x + block.ls2(block.mlp(block.norm2(x)))

    def features(frames: torch.Tensor) -> Features:
        patches = core.patch_embed(frames.flatten(0, 1)).reshape(BATCH, FRAMES, SIDE * SIDE, WIDTH)
        later = core.register_token[:, 1:].expand(-1, FRAMES - 1, -1, -1)
        registers = torch.cat([core.register_token[:, :1], later], 1).expand(BATCH, -1, -1, -1)
        cls = core.cls_token[None].expand(BATCH, FRAMES, -1, -1)
        x = torch.cat([cls, registers, patches], 2).reshape(BATCH, FRAMES * TOKENS, WIDTH)
        for block in core.blocks:
            x = checkpoint(run_block, block, x, use_reentrant=False) if arguments.remat else run_block(block, x)
        x = core.post_layernorm(x).reshape(BATCH, FRAMES, TOKENS, WIDTH)
        return x[:, :, SPECIAL_TOKENS:], x[:, :, 0]

    return features


def training_step() -> Callable[[], torch.Tensor]:
    """A forward and backward pass; the gradients are made anew each time."""
    released = released_model(arguments.code, arguments.model, arguments.size).to(DEVICE)
    released.train(arguments.mode == "released")
    features = tuned_features(released) if arguments.mode == "tuned" else released_features(released)
    frames = torch.randn(BATCH, FRAMES, 3, arguments.size, arguments.size, device=DEVICE)
    shapes = ((BATCH, FRAMES, SIDE * SIDE, WIDTH), (BATCH, FRAMES, WIDTH))
    targets = [torch.randn(shape, device=DEVICE) for shape in shapes]

    def step() -> torch.Tensor:
        released.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            outputs = features(frames)
        pairs = zip(outputs, targets, strict=True)
        loss = sum((output.float() - target).square().mean() for output, target in pairs)
        loss.backward()
        return loss

    return step


step: Callable[[], torch.Tensor] | None = None


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(request: dict) -> dict:
    """One step; the model is made at the first request, so that a lack of memory is answered."""
    global step
    if step is None:
        step = training_step()
    synchronise()
    started = time.perf_counter()
    step()
    synchronise()
    return {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": torch_peak_gb()}


serve(measure)
