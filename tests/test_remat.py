"""What the backbone keeps for its backward pass, by policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_model
from jax.sharding import AbstractMesh, AxisType

from omnistream_jax import sharding
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.block import REMAT
from omnistream_jax.models.presets import BackboneConfig

SIZES = BackboneConfig(width=64, depth=2, heads=4, mlp_width=256)
FRAMES = jnp.zeros((2, 2, 32, 32, 3))


def kept_shapes(remat: str) -> list[tuple[int, ...]]:
    """Shapes of what a training step of the backbone keeps between its two passes."""
    backbone = Backbone(SIZES, remat=remat)
    params = jax.eval_shape(backbone.init, jax.random.key(0), FRAMES)["params"]

    def backward(params):
        return jax.vjp(lambda params: backbone.apply({"params": params}, FRAMES, layers=()).cls.sum(), params)[1]

    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, params))]


def test_each_policy_keeps_less_than_the_one_before():
    sizes = [sum(np.prod(shape) for shape in kept_shapes(remat)) for remat in ("none", "dots", "block")]
    assert sizes[0] > sizes[1] > sizes[2]


def test_every_policy_has_the_same_gradient():
    def gradient(remat):
        backbone = Backbone(SIZES, remat=remat)
        loss = jax.jit(jax.grad(lambda params: (backbone.apply({"params": params}, frames, layers=()).cls ** 2).sum()))
        return loss(params)

    params = random_model(**dataclasses.asdict(SIZES)).params
    frames = np.random.default_rng(1).normal(size=FRAMES.shape).astype(np.float32)
    expected = jax.tree.leaves(gradient("none"))
    for remat in ("dots", "block"):
        for leaf, other in zip(jax.tree.leaves(gradient(remat)), expected, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6 * float(jnp.abs(other).max() + 1))


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "auto"])
def test_no_policy_keeps_parameters_that_were_gathered(remat, monkeypatch):
    """Else "fsdp" would save nothing: the stacked kernels of all blocks would be whole between the passes."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 128)
    kernels = {(SIZES.depth, 64, 3, 4, 16), (SIZES.depth, 4, 16, 64), (SIZES.depth, 64, 256), (SIZES.depth, 256, 64)}

    def kernels_kept() -> int:
        return sum(
            tuple(sorted(shape)) in {tuple(sorted(kernel)) for kernel in kernels} for shape in kept_shapes(remat)
        )

    alone = kernels_kept()
    mesh = AbstractMesh((1, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.gathers()
        shared = kernels_kept()
    assert alone == shared == len(kernels), "the parameters themselves, which are split, are kept once"


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat: expected one of auto, none, dots, block, got 'all'"):
        jax.eval_shape(Backbone(SIZES, remat="all").init, jax.random.key(0), FRAMES)
