"""Tiny geometry models whose every parameter is random."""

import jax
import jax.numpy as jnp
import numpy as np
from backbone_cases import random_model

from omnistream_jax.geometry_model import GeometryModel, build_geometry_model
from omnistream_jax.models.geometry import GeometryConfig


def random_geometry_model(seed: int = 0, **changes) -> GeometryModel:
    """Depth, rays and cameras that differ from frame to frame and are what cameras can be: views of about 1 rad."""
    config = GeometryConfig(layers=(0, 1, 2, 3), features=8, out_channels=(4, 8, 12, 12), **changes)
    built = build_geometry_model(random_model(seed, depth=4), config, {})
    hidden = [jax.ShapeDtypeStruct((1, 1, 6, 32), jnp.float32)] * 4
    camera = jax.ShapeDtypeStruct((1, 1, 32), jnp.float32)

    def init(*inputs):
        return built.heads.init(jax.random.key(0), *inputs, 16, 16)["params"]

    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        values = generator.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            strength = 0.1 if path[-2].key == "output" and path[-3].key == "camera" else 1
            values *= strength * np.prod(leaf.shape[:-1]) ** -0.5
        else:
            values *= 0.2
            if path[-1].key == "scale":
                values += 1
        return jnp.asarray(values, jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, hidden, camera))
    bias = params["camera"]["output"]["bias"]
    params["camera"]["output"]["bias"] = bias + jnp.array([0, 0, 0, 0, 0, 0, 1, 1, 1], jnp.float32)
    ray_bias = params["dpt"]["ray_output"]["bias"]
    params["dpt"]["ray_output"]["bias"] = ray_bias + jnp.array([0, 0, 0, 0, 0, 1, 0], jnp.float32)
    return build_geometry_model(built.model, config, params)
