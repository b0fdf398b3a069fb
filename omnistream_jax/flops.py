"""Model FLOPs of a step, counted by hand, and the share of the devices' peak that they are.

Counted are the matrix products and convolutions that the mathematics needs, two operations for a multiplication with
its addition: of whole batches (padding rows of the iBOT head too), attention over visible keys only, the vocabulary at
learned tokens only. Training costs three times the forward pass; what a program computes again (remat, scores of fused
attention) does not count, nor does what is done element by element. XLA's own count is of no use: it takes the body of
a scan once, and is absent on GPUs.

Letters: T frames, h x w patches, P tokens a frame, d width.
"""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp

from omnistream_jax.models.dpt import HIDDEN_WIDTH
from omnistream_jax.models.geometry import GeometryConfig
from omnistream_jax.models.heads import DinoHead
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.models.qwen3 import Qwen3Config
from omnistream_jax.tasks.caption import CaptionTask
from omnistream_jax.tasks.geometry import GeometryTask
from omnistream_jax.tasks.self_supervision import SelfSupervisionTask
from omnistream_jax.tasks.task import Task

_GLOBAL_CROPS = 2

# Dense bfloat16 peaks a device, in TFLOP/s, by `device_kind`: NVIDIA's data sheets (without sparsity) and Google
# Cloud's pages on TPU versions. A part of a device (MIG) has no line.
PEAK_TERAFLOPS = {
    r"NVIDIA H200|NVIDIA H100 80GB HBM3|NVIDIA GH200 .*": 989.4,
    r"NVIDIA H200 NVL|NVIDIA H100 NVL": 835.5,
    r"NVIDIA H100 PCIe": 756.5,
    r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": 312.0,
    r"NVIDIA L4": 121.0,
    r"TPU v4": 275.0,
    r"TPU v5 lite|TPU v5e": 197.0,
    r"TPU v5|TPU v5p": 459.0,
    r"TPU v6 lite|TPU v6e": 918.0,
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a forward pass or, added and multiplied, of more.

    Attributes:
        linear: of linear layers and convolutions.
        attention: of scores and of weighted values.
        recomputed: of scores that fused attention makes again in a backward pass. Not in `total`.
    """

    linear: float = 0.0
    attention: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention, self.recomputed + other.recomputed)

    def __rmul__(self, factor: float) -> "Flops":
        return Flops(factor * self.linear, factor * self.attention, factor * self.recomputed)

    @property
    def total(self) -> float:
        """The model's, for its share of the peak."""
        return self.linear + self.attention

    @property
    def executed(self) -> float:
        """What a device with fused attention and without remat executes, for rooflines."""
        return self.total + self.recomputed


def train(forward: Flops) -> Flops:
    """Forward and backward: each product has two in the backward pass."""
    return Flops(3 * forward.linear, 3 * forward.attention, forward.attention / 2)


def backbone(config: BackboneConfig, frames: int, height: int, width: int, camera_token: bool = False) -> Flops:
    """The forward pass of one clip of `frames` frames of height x width pixels, frame-causal."""
    patches = (height // config.patch_size) * (width // config.patch_size)
    tokens = 1 + camera_token + config.registers + patches
    layers = 3 if config.mlp == "swiglu" else 2
    per_token = 2 * config.width * (4 * config.width + layers * config.mlp_width)
    embed = 2 * frames * patches * 3 * config.patch_size**2 * config.width
    visible = tokens * frames * (frames + 1) / 2  # keys, added up over the frames of the queries
    return Flops(
        linear=embed + config.depth * frames * tokens * per_token,
        attention=config.depth * 4 * tokens * visible * config.width,
    )


def dino_head(head: DinoHead, width: int) -> Flops:
    """The forward pass of one row of `width` features."""
    widths = [width, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return Flops(2 * sum(a * b for a, b in itertools.pairwise(widths)))


def geometry_heads(config: GeometryConfig, width: int, patch_size: int, height: int, width_pixels: int) -> Flops:
    """The forward pass of the dual DPT and the camera head for one frame of height x width_pixels pixels."""
    rows, columns = height // patch_size, width_pixels // patch_size
    features = config.features
    levels = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns)]
    levels.append((math.ceil(rows / 2), math.ceil(columns / 2)))
    cells = [height * width for height, width in levels]

    def conv(size: int, channels_in: int, channels_out: int) -> float:
        return 2 * 9 * size * channels_in * channels_out

    def fusion(level: int) -> float:  # residual units of two convolutions, then a linear layer
        units = 1 if level == len(cells) - 1 else 2
        return units * 2 * conv(cells[level], features, features) + 2 * cells[level] * features**2

    reassemble = 0.0
    for level, channels in enumerate(config.out_channels):
        reassemble += 2 * rows * columns * width * channels
        if level < 2:  # every cell becomes a square of cells
            reassemble += 2 * cells[level] * channels**2
        elif level == 3:
            reassemble += conv(cells[level], channels, channels)
        reassemble += conv(cells[level], channels, features)
    fuse = 2 * sum(fusion(level) for level in range(len(cells)))
    fine, pixels, half = 64 * rows * columns, height * width_pixels, features // 2
    depth = conv(fine, features, half) + conv(pixels, half, HIDDEN_WIDTH) + 2 * pixels * HIDDEN_WIDTH * 2
    rays = 5 * conv(fine, features, half) + conv(fine, half, HIDDEN_WIDTH) + 2 * fine * HIDDEN_WIDTH * 7
    camera = 2 * (2 * width**2 + 9 * width)
    return Flops(reassemble + fuse + depth + rays + camera)


def decoder(config: Qwen3Config, tokens: float, segments: int) -> Flops:
    """The forward pass of the blocks on a row of `tokens` tokens in so many segments, taken as equally long.

    Several texts about one image count as one segment, though they do not see each other.
    """
    inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
    per_token = 2 * config.width * (2 * inner + 2 * shared + 3 * config.hidden)
    visible = tokens * (tokens / segments + 1) / 2  # keys, added up over the queries
    return Flops(config.depth * tokens * per_token, config.depth * 4 * visible * inner)


def task_flops(task: Task, *, learned_tokens: float | None = None, step: int | None = None) -> Flops:
    """Of a task's gradient, for one step over all devices: its global batch forward and backward, teachers forward.

    Args:
        task: as `tasks.build.build_tasks` makes it.
        learned_tokens: tokens of the global batch whose logits count, of a caption task; None: every text token.
        step: updates made before; the Gram term waits for its first. None: all terms are on.

    Raises:
        TypeError: a task of a kind that is not known here.
    """
    if isinstance(task, SelfSupervisionTask):
        gram = task.gram_backbone is not None and (step is None or step >= task.settings.gram_from_step)
        return task.data.global_batch_size * _self_supervision(task, gram)
    if isinstance(task, GeometryTask):
        return task.data.global_batch_size * train(_geometry(task))
    if isinstance(task, CaptionTask):
        rows, config = task.data.global_batch_size, task.decoder.config
        learned = rows * task.data.max_tokens if learned_tokens is None else learned_tokens
        vocabulary = Flops(2 * learned * config.width * config.vocabulary_size)
        return train(rows * _caption_row(task) + vocabulary)
    raise TypeError(f"task {task.name}: no count of FLOPs for a {type(task).__name__}")


def _self_supervision(task: SelfSupervisionTask, with_gram: bool) -> Flops:
    """One sample: the student on all crops, the EMA teacher and perhaps the Gram teacher on the global ones."""
    data, config = task.data, task.backbone.config
    global_crop = backbone(config, data.frames, data.global_size, data.global_size)
    local_crop = backbone(config, data.frames, data.local_size, data.local_size)
    row, patch_row = dino_head(task.dino_head, config.width), dino_head(task.ibot_head, config.width)
    teacher = _GLOBAL_CROPS * (global_crop + row + data.max_masked * patch_row)
    flops = train(teacher + data.local_crops * (local_crop + row)) + teacher
    if with_gram:
        side, gram = data.gram_size or data.global_size, task.gram_backbone.config
        patches = (data.global_size // data.patch_size) ** 2
        matrices = train(Flops(2 * patches**2 * config.width)) + Flops(2 * patches**2 * gram.width)
        flops += _GLOBAL_CROPS * (backbone(gram, 1, side, side) + matrices)
    return flops


def _geometry(task: GeometryTask) -> Flops:
    """The forward pass of one clip."""
    (height, width), config, frames = task.data.size, task.backbone.config, task.data.frames
    heads = geometry_heads(task.geometry_heads.config, config.width, config.patch_size, height, width)
    return backbone(config, frames, height, width, camera_token=True) + frames * heads


def _caption_row(task: CaptionTask) -> Flops:
    """The forward pass of one row, without its logits."""
    config, images, size = task.backbone.config, task.data.captions_per_row, task.data.size
    visual = images * (size // config.patch_size) ** 2
    projector = Flops(2 * visual * task.projector.width * (config.width + task.projector.width))
    row = decoder(task.decoder.config, visual + task.data.max_tokens, images)
    return images * backbone(config, 1, size, size) + projector + row


def peak_flops(device: jax.Device, dtype: jnp.dtype) -> float | None:
    """A device's dense peak a second for activations of `dtype`; None where it is not known, or not of 16 bits."""
    if jnp.dtype(dtype).itemsize != 2:
        return None
    for kinds, teraflops in PEAK_TERAFLOPS.items():
        if re.fullmatch(kinds, device.device_kind):
            return teraflops * 1e12
    return None
