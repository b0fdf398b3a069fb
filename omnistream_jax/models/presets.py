"""The backbone's configuration and the sizes that have names."""

import dataclasses
import math

from omnistream_jax.ops.rope import check_rope_layout


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """What determines a backbone's parameters and mathematics.

    Attributes:
        width: d, the token width; heads of width d / heads, a multiple of 8.
        depth: number of blocks.
        heads: attention heads.
        mlp_width: hidden width of the MLP.
        patch_size: side of a square patch in pixels.
        mlp: "gelu" (two layers, exact GELU) or "swiglu" (three).
        norm_epsilon: epsilon of every LayerNorm.
        rope: layout of the rotary channels, see ops/rope.py.
        rope_base: base of the rotary periods.
        time_unit: frames per unit of the time coordinate.
        registers: register tokens a frame.
        token_versions: 2 keeps first-frame and later-frame registers apart (OmniStream), 1 shares them (DINOv3).
        camera: whether the camera token and the aspect-ratio embedding exist.
        query_bias, key_bias, value_bias, projection_bias, mlp_bias: which linear maps have a bias.
        layer_scale: LayerScale's value at initialisation.
        kernel_std: standard deviation of kernels at initialisation.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: int = 16
    mlp: str = "gelu"
    norm_epsilon: float = 1e-5
    rope: str = "dinov3"
    rope_base: float = 100.0
    time_unit: float = 16.0
    registers: int = 4
    token_versions: int = 2
    camera: bool = True
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    projection_bias: bool = True
    mlp_bias: bool = True
    layer_scale: float = 0.01
    kernel_std: float = 0.02

    def __post_init__(self):
        for field in ("width", "depth", "heads", "mlp_width", "patch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected a positive number, got {getattr(self, field)}")
        for field in ("rope_base", "time_unit"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}: expected a positive number, got {getattr(self, field)}")
        if self.width % self.heads or self.head_width % 8:
            raise ValueError(
                f"heads: width {self.width} must split into {self.heads} heads whose width is a multiple of 8"
            )
        if self.mlp not in ("gelu", "swiglu"):
            raise ValueError(f"mlp: expected 'gelu' or 'swiglu', got {self.mlp!r}")
        if self.token_versions not in (1, 2):
            raise ValueError(f"token_versions: expected 1 or 2, got {self.token_versions}")
        check_rope_layout(self.rope)

    @property
    def head_width(self) -> int:
        """D, the width of one head."""
        return self.width // self.heads


# DINOv3's ViT-S, B and L; tiny is for the quick start and for tests.
PRESETS = {
    "tiny": BackboneConfig(width=128, depth=4, heads=4, mlp_width=512),
    "small": BackboneConfig(width=384, depth=12, heads=6, mlp_width=1536),
    "base": BackboneConfig(width=768, depth=12, heads=12, mlp_width=3072),
    "large": BackboneConfig(width=1024, depth=24, heads=16, mlp_width=4096),
}


def preset(name: str, **changes: object) -> BackboneConfig:
    """The named size with some fields changed; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"model.preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return dataclasses.replace(PRESETS[name], **changes)
