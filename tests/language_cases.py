"""Language models with random parameters, for tests of what is asked of them."""

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.data.chat import load_chat
from omnistream_jax.language_model import LanguageModel, build_language_model
from omnistream_jax.model import Model
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config, init_decoder


def decoder_config(**changes) -> Qwen3Config:
    sizes = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "hidden": 32}
    return Qwen3Config(**{"vocabulary_size": load_chat("embedded").vocabulary_size, **sizes, **changes})


def fresh_decoder(config: Qwen3Config, seed: int = 0) -> dict:
    return jax.jit(lambda key: init_decoder(Qwen3(config), key))(jax.random.key(seed))


def random_language_model(model: Model, config: Qwen3Config, size: int, seed: int = 0) -> LanguageModel:
    """Every parameter is random, and so large that what is said depends on all pictures."""
    generator = np.random.default_rng(0)
    shapes = {"mlp_0": (model.config.width, config.width), "mlp_1": (config.width, config.width)}
    projector = {
        name: {
            "kernel": jnp.asarray(generator.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(generator.normal(size=shape[1]), jnp.float32),
        }
        for name, shape in shapes.items()
    }
    narrow = config.head_width  # of the norms of queries and keys
    decoder = jax.tree.map(
        lambda leaf: leaf * 15 if leaf.ndim > 1 and leaf.shape[-1] != narrow else leaf, fresh_decoder(config, seed)
    )
    return build_language_model(
        model, config, {"projector": projector, "decoder": decoder}, load_chat("embedded"), size
    )
