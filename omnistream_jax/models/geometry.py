"""The heads of streaming geometry on the backbone's features (OmniStream Sec. 3.4): depth, rays and the camera.

Letters: B clips, T frames, H x W pixels, h x w patches, P tokens a frame, D width.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from omnistream_jax.models.camera_head import CameraHead
from omnistream_jax.models.dpt import LEVELS, DualDPT, check_channels, default_layers
from omnistream_jax.ops.precision import full_precision


@dataclasses.dataclass(frozen=True)
class GeometryConfig:
    """What determines the heads' parameters and mathematics.

    Attributes:
        layers: the four blocks whose outputs feed the dual DPT, counted from 0.
        features: channels of the dual DPT's fusion.
        out_channels: channels of its four stages before the fusion.
        units: "clip" if lengths are in units of the clip's mean distance of points to the first camera, "metres" if
            they are metric.
    """

    layers: tuple[int, int, int, int]
    features: int = 256
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    units: str = "clip"

    def __post_init__(self):
        if len(self.layers) != LEVELS or min(self.layers) < 0 or list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers: expected {LEVELS} blocks in their order, got {self.layers}")
        check_channels(self.features, self.out_channels)
        if self.units not in ("clip", "metres"):
            raise ValueError(f"units: expected clip or metres, got {self.units!r}")


def geometry_config(depth: int, layers: Sequence[int] = (), **fields: object) -> GeometryConfig:
    """The heads of a backbone of `depth` blocks; layers () takes `models.dpt.default_layers`."""
    layers = tuple(layers) or default_layers(depth)
    if max(layers) >= depth:
        raise ValueError(f"layers: expected blocks 0 to {depth - 1}, got {layers}")
    return GeometryConfig(layers, **fields)


@struct.dataclass
class GeometryPrediction:
    """What the heads say, float32, in the coordinates of the stream's first camera.

    Attributes:
        depth: [B, T, H, W], along each camera's axis.
        depth_confidence: [B, T, H, W], 1 or more.
        rays: [B, T, 8h, 8w, 6], origin and direction (of unit depth) at the centres of 8 x 8 cells a patch.
        ray_confidence: [B, T, 8h, 8w], 1 or more.
        camera: [B, T, 9], camera-to-world as geometry/cameras.py encodes it.
    """

    depth: jax.Array
    depth_confidence: jax.Array
    rays: jax.Array
    ray_confidence: jax.Array
    camera: jax.Array


class GeometryHeads(nn.Module):
    """The dual DPT on chosen blocks and the camera head on the camera token; each frame on its own.

    Attributes:
        config: sizes.
        width: D, of the backbone.
        patch_size: of the backbone.
        dtype: of the activations; parameters are float32.
    """

    config: GeometryConfig
    width: int
    patch_size: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """The two heads."""
        self.dpt = DualDPT(
            features=self.config.features,
            out_channels=self.config.out_channels,
            patch_size=self.patch_size,
            dtype=self.dtype,
        )
        self.camera = CameraHead(self.width, dtype=self.dtype)

    @full_precision
    def __call__(self, hidden: Sequence[jax.Array], camera: jax.Array, height: int, width: int) -> GeometryPrediction:
        """Geometry of frames of height x width pixels.

        Args:
            hidden: outputs of the blocks `config.layers`, each [B, T, P, D], with the camera token among the specials.
            camera: the camera token after the final norm [B, T, D].
            height, width: of the frames in pixels.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        maps = self.dpt([_patch_map(tokens, rows, columns) for tokens in hidden], height, width)
        return GeometryPrediction(
            depth=maps.depth,
            depth_confidence=maps.depth_confidence,
            rays=maps.rays,
            ray_confidence=maps.ray_confidence,
            camera=self.camera(camera),
        )


def _patch_map(tokens: jax.Array, rows: int, columns: int) -> jax.Array:
    """[B, T, P, D] to the patches [B, T, h, w, D], which come after the special tokens."""
    patches = tokens[:, :, tokens.shape[2] - rows * columns :]
    return patches.reshape(*tokens.shape[:2], rows, columns, tokens.shape[-1])
