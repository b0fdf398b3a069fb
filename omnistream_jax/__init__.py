"""OmniStream (arXiv 2603.12265) in JAX: one causal visual backbone for images, clips and endless streams.

Importing the package costs no JAX; `load` imports what it needs when it is called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnistream_jax.geometry_model import GeometryModel
    from omnistream_jax.language_model import LanguageModel
    from omnistream_jax.model import Model

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_geometry", "load_language"]


def load(path: str, rope: str | None = None, dtype: Any = None) -> "Model":
    """Load weights of OmniStream or DINOv3 from a directory or the hub.

    Args:
        path: a directory with config.json and model.safetensors in the released Hugging Face layout, one of our
            exports, or a hub id when online.
        rope: "released", "dinov3" or "dinov3_2d"; None takes what config.json says, else the family's own.
        dtype: of the activations; None is float32 on a CPU and bfloat16 on accelerators.
    """
    from omnistream_jax import model

    return model.load(path, rope=rope, dtype=dtype)


def load_geometry(path: str, rope: str | None = None, dtype: Any = None) -> "GeometryModel":
    """Load a backbone with geometry heads (depth, rays, cameras) from a directory or the hub.

    Args:
        path: a directory that training left as WORKDIR/model, or a hub id when online.
        rope, dtype: as of `load`.
    """
    from omnistream_jax import geometry_model

    return geometry_model.load_geometry(path, rope=rope, dtype=dtype)


def load_language(path: str, rope: str | None = None, dtype: Any = None) -> "LanguageModel":
    """Load a backbone with a decoder, which answers questions about images and clips, from a directory or the hub.

    Args:
        path: a directory that training left as WORKDIR/model, or a hub id when online.
        rope, dtype: as of `load`.
    """
    from omnistream_jax import language_model

    return language_model.load_language(path, rope=rope, dtype=dtype)
