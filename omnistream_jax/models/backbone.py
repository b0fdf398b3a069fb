"""The frame-causal vision transformer (OmniStream Sec. 3.2): whole clips, and one frame at a time with a cache.

Letters: B clips or streams, T frames, H x W pixels, p patch side, h = H/p, w = W/p, d width, R registers,
P = specials + h*w tokens a frame in the order CLS, (CAM), REG x R, patches row-major.
"""

import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omnistream_jax.models.block import Block, LayerNorm, kernel_init, with_remat
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.ops.attention import attend_cache, attention_path, frame_causal_attention
from omnistream_jax.ops.cache import BlockCache, frame_slot, write_frame
from omnistream_jax.ops.images import normalize_frames, patchify
from omnistream_jax.ops.precision import full_precision
from omnistream_jax.ops.rope import rope_tables
from omnistream_jax.sharding import gathered_block


@struct.dataclass
class BackboneOutput:
    """Features of T frames; absent fields are None.

    Attributes:
        patches: [B, T, h, w, d] after the final norm.
        cls: [B, T, d] after the final norm.
        registers: [B, T, R, d] after the final norm.
        camera: [B, T, d] after the final norm, or None without the camera token.
        hidden: the chosen blocks' outputs before the final norm, each [B, T, P, d].
    """

    patches: jax.Array
    cls: jax.Array
    registers: jax.Array
    camera: jax.Array | None
    hidden: tuple[jax.Array, ...]


class Backbone(nn.Module):
    """A DINOv3 ViT made frame-causal.

    Attributes:
        config: sizes and mathematics.
        dtype: of the activations; parameters are float32.
        remat: one of models.block.REMAT: what of a block is kept for the backward pass, and not computed again.
        attention: one of ops.attention.ATTENTION_PATHS, or "auto" for the fastest on this process's devices.
        streaming: the parameters are those of `streaming_params`, made for `step`.
    """

    config: BackboneConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "auto"
    attention: str = "auto"
    streaming: bool = False

    @property
    def attention_path(self) -> str:
        """One of ops.attention.ATTENTION_PATHS."""
        if self.attention != "auto":
            return self.attention
        return attention_path(self.dtype, self.config.head_width)

    def setup(self):
        """Declare the parameters; those of all blocks are stacked along a leading axis [depth, ...]."""
        config = self.config
        width, small = config.width, nn.initializers.normal(0.02)
        self.patch_kernel = self.param("patch_kernel", kernel_init(config), (3 * config.patch_size**2, width))
        self.patch_bias = self.param("patch_bias", nn.initializers.zeros, (width,))
        self.cls_token = self.param("cls_token", small, (width,))
        self.mask_token = self.param("mask_token", nn.initializers.zeros, (width,))
        self.register_tokens = self.param("register_tokens", small, (config.token_versions, config.registers, width))
        if config.camera:
            self.camera_tokens = self.param("camera_tokens", small, (config.token_versions, width))
            self.aspect_kernel = self.param("aspect_kernel", small, (width,))
            self.aspect_bias = self.param("aspect_bias", nn.initializers.zeros, (width,))
        self.blocks = self.param("blocks", self._init_blocks)
        self.norm = LayerNorm(config.norm_epsilon, self.dtype)

    def _block(self) -> Block:
        return Block(self.config, self.dtype, parent=None)

    def _init_blocks(self, key: jax.Array) -> dict:
        token = jnp.zeros((1, 1, 1, self.config.width), self.dtype)
        table = jnp.zeros((1, 1, 1, self.config.head_width))

        def init_one(block_key: jax.Array) -> dict:
            return self._block().init(block_key, token, (table, table), lambda q, k, v: (v, None))["params"]

        stacked = jax.vmap(init_one)(jax.random.split(key, self.config.depth))
        return split_kernels(stacked) if self.streaming else stacked

    @full_precision
    def __call__(
        self,
        frames: jax.Array,
        *,
        masks: jax.Array | None = None,
        rope_scale: tuple[jax.Array | float, jax.Array | float] = (1.0, 1.0),
        layers: Sequence[int] | None = None,
        camera_token: bool = False,
        aspect_ratio: jax.Array | None = None,
        time_unit: float | None = None,
        window: int | None = None,
        sinks: int = 1,
    ) -> BackboneOutput:
        """Encode whole clips; T = 1 is an image.

        Args:
            frames: [B, T, H, W, 3], uint8 or normalised floats.
            masks: bool, [B, T, h, w] or anything that reshapes to it; True replaces a patch by the mask token.
            rope_scale: factors on the time and the spatial coordinates, the jitter of training.
            layers: blocks whose outputs are returned in `hidden`, in that order; None for all.
            camera_token: add the camera token to each frame.
            aspect_ratio: height / width [B]; None adds no embedding.
            time_unit: frames per unit of time; None takes the config's.
            window, sinks: frames that a query sees, see ops/attention.py.
        """
        time, height, width = frames.shape[1:4]
        layers = select_layers(layers, self.config.depth)
        index = jnp.arange(time)[None]
        tokens = self._embed(frames, index, masks, camera_token, aspect_ratio)
        rope = self._rope(index, height, width, camera_token, time_unit, rope_scale)

        def attend(query, key, value):
            path = self.attention_path
            return frame_causal_attention(query, key, value, window=window, sinks=sinks, path=path), None

        def run_block(x, params):
            params = gathered_block(params, self.dtype)
            return self._block().apply({"params": params}, x, rope, attend)[0]

        remat = self.remat
        if remat == "auto":
            # On a CPU what is cheap is computed again: 2.6 times less memory than "none", and faster for it. Fused
            # attention is no product, so that "dots" would run it twice.
            remat = "dots" if self.attention_path == "xla" else "none"
        run_block = with_remat(run_block, remat)
        tokens, hidden = _scan_blocks(run_block, tokens, self.blocks, layers, self.config.depth)
        return self._output(tokens, hidden, (height, width), camera_token)

    @full_precision
    def step(
        self,
        frame: jax.Array,
        cache: tuple[BlockCache, ...],
        frame_index: jax.Array,
        *,
        active: jax.Array | None = None,
        layers: Sequence[int] | None = None,
        camera_token: bool = False,
        aspect_ratio: jax.Array | None = None,
        time_unit: float | None = None,
        window: int | None = None,
        sinks: int = 1,
    ) -> tuple[BackboneOutput, tuple[BlockCache, ...]]:
        """Encode the next frame of each stream; equals the clip's pass frame by frame.

        Args:
            frame: [B, 1, H, W, 3].
            cache: one BlockCache per block, capacity >= window, or > max(frame_index) without a window.
            frame_index: int32 [B], each frame's index in its stream.
            active: bool [B]; the output of the others means nothing, and only the slot that their next frame will
                overwrite is touched. None: all take part.
            layers, camera_token, aspect_ratio, time_unit, window, sinks: as in `__call__`.

        Returns:
            The output with T = 1, and the cache with this frame in it.
        """
        height, width = frame.shape[2:4]
        layers = select_layers(layers, self.config.depth)
        tokens = self._embed(frame, frame_index[:, None], None, camera_token, aspect_ratio)
        rope = self._rope(frame_index[:, None], height, width, camera_token, time_unit, (1.0, 1.0))
        slot = frame_slot(frame_index, window, sinks)
        visible_frames = jnp.minimum(frame_index + 1, cache[0].capacity)
        if active is not None:
            visible_frames = jnp.where(active, visible_frames, 1)  # a paused stream costs next to nothing

        outputs, new_cache = [], []
        for i, block_cache in enumerate(cache):  # unrolled: a scan would copy every block's cache

            def attend(query, key, value, block_cache=block_cache):
                written = write_frame(block_cache, key[:, 0], value[:, 0], slot)
                attended = attend_cache(query[:, 0], written, visible_frames, path=self.attention_path)
                return attended[:, None], written

            # A leaf is stacked over the blocks or, with `streaming`, a tuple over them: both take an index.
            params = jax.tree.map(lambda leaf, i=i: leaf[i], self.blocks, is_leaf=lambda leaf: isinstance(leaf, tuple))
            tokens, written = self._block().apply({"params": params}, tokens, rope, attend)
            new_cache.append(written)
            outputs.append(tokens)
        hidden = tuple(outputs[i] for i in layers)
        return self._output(tokens, hidden, (height, width), camera_token), tuple(new_cache)

    def special_tokens(self, camera_token: bool) -> int:
        """Tokens before the patches of a frame: CLS, perhaps CAM, and the registers."""
        return 1 + int(camera_token) + self.config.registers

    def _embed(self, frames, frame_index, masks, camera_token, aspect_ratio) -> jax.Array:
        """Frames [B, T, H, W, 3] and their indices [B or 1, T] to tokens [B, T, P, d]."""
        config = self.config
        batch, time = frames.shape[:2]
        pixels = patchify(normalize_frames(frames), config.patch_size).astype(self.dtype)
        patches = pixels @ self.patch_kernel.astype(self.dtype) + self.patch_bias.astype(self.dtype)
        if masks is not None:
            masks = masks.reshape(patches.shape[:3])[..., None]
            patches = jnp.where(masks, self.mask_token.astype(self.dtype), patches)

        def for_frame(versions: jax.Array) -> jax.Array:  # [versions, ...] -> [B, T, ...]
            later = (frame_index > 0).astype(jnp.int32) if config.token_versions == 2 else jnp.zeros_like(frame_index)
            chosen = versions.astype(self.dtype)[later]
            return jnp.broadcast_to(chosen, (batch, time, *chosen.shape[2:]))

        tokens = [jnp.broadcast_to(self.cls_token.astype(self.dtype), (batch, time, 1, config.width))]
        if camera_token:
            camera = for_frame(self.camera_tokens)
            if aspect_ratio is not None:
                log_ratio = jnp.log(aspect_ratio.astype(jnp.float32))[:, None, None]
                camera = camera + (log_ratio * self.aspect_kernel + self.aspect_bias).astype(self.dtype)
            tokens.append(camera[:, :, None])
        return jnp.concatenate([*tokens, for_frame(self.register_tokens), patches], axis=2)

    def _rope(self, frame_index, height, width, camera_token, time_unit, scale) -> tuple[jax.Array, jax.Array]:
        config = self.config
        return rope_tables(
            frame_index,
            height // config.patch_size,
            width // config.patch_size,
            head_width=config.head_width,
            special_tokens=self.special_tokens(camera_token),
            layout=config.rope,
            base=config.rope_base,
            time_unit=config.time_unit if time_unit is None else time_unit,
            scale=scale,
        )

    def _output(self, tokens, hidden, image_size, camera_token) -> BackboneOutput:
        normed = self.norm(tokens)
        specials = self.special_tokens(camera_token)
        rows, columns = (side // self.config.patch_size for side in image_size)
        return BackboneOutput(
            patches=normed[:, :, specials:].reshape(*normed.shape[:2], rows, columns, -1),
            cls=normed[:, :, 0],
            registers=normed[:, :, specials - self.config.registers : specials],
            camera=normed[:, :, 1] if camera_token else None,
            hidden=hidden,
        )


def split_kernels(blocks: dict) -> dict:
    """Stacked block parameters with each kernel [depth, ...] as a tuple of `depth` arrays.

    A step that slices a stacked kernel copies it: a third of the time of a frame (ViT-B, CPU). Vectors stay stacked,
    because the fewer arrays a program takes, the sooner it starts.
    """

    def split(leaf: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        return tuple(leaf) if leaf.ndim > 2 else leaf

    return jax.tree.map(split, blocks)


def streaming_params(params: dict, dtype: jnp.dtype) -> dict:
    """The parameters for `Backbone(streaming=True)`: kernels apart, and what the blocks cast to `dtype` cast once.

    On a CPU in float32 the kernels are views of the stacked ones and take no memory.
    """

    def prepare(params: dict) -> dict:
        def cast(path: tuple, leaf: jax.Array) -> jax.Array:
            stays = any("norm" in str(key) or "aspect" in str(key) for key in path)  # these compute in float32
            return leaf if stays else leaf.astype(dtype)

        params = jax.tree_util.tree_map_with_path(cast, params)
        return {**params, "blocks": split_kernels(params["blocks"])}

    if jax.default_backend() == "cpu" and dtype == jnp.float32:
        views = jax.tree.map(np.asarray, params["blocks"])
        # All of them on the device: NumPy's would be copied there at every call.
        return jax.tree.map(jnp.asarray, {**params, "blocks": split_kernels(views)})
    return jax.jit(prepare)(params)


def default_dtype() -> jnp.dtype:
    """Of the activations: float32 on a CPU, bfloat16 on accelerators."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def select_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks that `layers` names, all for None; ValueError for an index outside 0 .. depth - 1."""
    if layers is None:
        return tuple(range(depth))
    try:
        layers = tuple(operator.index(i) for i in layers)
    except TypeError:
        raise ValueError(f"layers: expected a sequence of block indices, got {layers!r}") from None
    wrong = [i for i in layers if not 0 <= i < depth]
    if wrong:
        raise ValueError(f"layers: expected block indices 0 to {depth - 1}, got {wrong}")
    return layers


def _scan_blocks(run_block, tokens, stacked, layers, depth) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Scan over the blocks in stages that end at the chosen layers, so that only those outputs are kept."""
    if set(layers) == set(range(depth)):  # one scan compiles faster than a stage for every block

        def body(x, params):
            x = run_block(x, params)
            return x, x

        tokens, outputs = jax.lax.scan(body, tokens, stacked)
        return tokens, tuple(outputs[i] for i in layers)

    kept, start = {}, 0
    for end in sorted({*layers, depth - 1}):
        stage = jax.tree.map(lambda leaf, a=start, b=end + 1: leaf[a:b], stacked)
        tokens, _ = jax.lax.scan(lambda x, params: (run_block(x, params), None), tokens, stage)
        kept[end] = tokens
        start = end + 1
    return tokens, tuple(kept[i] for i in layers)
