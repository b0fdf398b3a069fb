"""Muon's updates: which parameters are matrices, along which axes, and how large a step is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import small_config

from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.optim import Optimizer
from omnistream_jax.step import fresh_params, init_state
from omnistream_jax.tasks.build import build_backbone, build_tasks
from omnistream_jax.utils.trees import named_leaves, nest

MUON = Optimizer(
    peak=0.01,
    warmup_steps=0,
    steps=10,
    final=0.01,
    beta1=0.9,
    beta2=0.99,
    clip_norm=0.0,
    freeze_prototypes_steps=0,
    kind="muon",
)


def each_block(array, inputs):
    """[L, ..., ...] with so many axes of inputs as [L, inputs, outputs]."""
    split = 1 + inputs
    return array.reshape(len(array), np.prod(array.shape[1:split]), np.prod(array.shape[split:]))


# The matrices in an array, each [inputs, outputs] as a linear map has it.
MATRICES = {
    "backbone/blocks/attention/qkv_kernel": lambda a: np.concatenate([each_block(a[:, :, i], 1) for i in range(3)]),
    "backbone/blocks/attention/projection/kernel": lambda a: each_block(a, 2),
    "backbone/blocks/mlp/hidden/kernel": lambda a: a,
    "backbone/blocks/mlp/output/kernel": lambda a: a,
    "decoder/blocks/query/kernel": lambda a: each_block(a, 1),
    "decoder/blocks/key/kernel": lambda a: each_block(a, 1),
    "decoder/blocks/value/kernel": lambda a: each_block(a, 1),
    "decoder/blocks/projection/kernel": lambda a: each_block(a, 2),
    "decoder/blocks/gate/kernel": lambda a: a,
    "decoder/blocks/up/kernel": lambda a: a,
    "decoder/blocks/down/kernel": lambda a: a,
    "projector/mlp_0/kernel": lambda a: a[None],
    "projector/mlp_1/kernel": lambda a: a[None],
}


@pytest.fixture(scope="module")
def params():
    """Of a model that has every matrix, all of them random."""
    config = small_config(tasks__caption__weight=1.0, tasks__clip_ssl__weight=0.0)
    backbone = build_backbone(config)
    tasks = build_tasks(config, backbone, backbone.config)
    shapes = named_leaves(jax.eval_shape(functools.partial(fresh_params, backbone, tasks, 0)))
    rng = np.random.default_rng(0)
    return nest({name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()})


@pytest.fixture(scope="module")
def first_update(params):
    """(gradients, changes), by name."""
    gradients = jax.tree.map(lambda leaf: jnp.cos(37 * leaf), params)
    transform = MUON.transform()
    changes, _ = jax.jit(transform.update)(gradients, transform.init(params), params)
    return named_leaves(gradients), named_leaves(changes)


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_moves_along_the_nearest_orthogonal_matrix(first_update, name):
    gradients, changes = (np.asarray(leaves[name]) for leaves in first_update)
    for gradient, change in zip(MATRICES[name](gradients), MATRICES[name](changes), strict=True):
        left, _, right = np.linalg.svd(gradient.astype(float), full_matrices=False)
        orthogonal = left @ right
        step = 0.01 * 0.2 * np.sqrt(max(change.shape))
        singular = np.linalg.svd(change, compute_uv=False) / step
        assert 0.6 < np.median(singular) <= singular.max() < 1.3  # the smallest ones may stay behind
        assert -(orthogonal * change).sum() / np.linalg.norm(orthogonal) / np.linalg.norm(change) > 0.95


def test_its_steps_have_the_size_of_adams(first_update):
    """A square matrix; of others less, as they have fewer singular values."""
    change = np.asarray(first_update[1]["projector/mlp_1/kernel"])
    assert np.sqrt((change**2).mean()) == pytest.approx(0.2 * 0.01, rel=0.15)


def test_all_that_is_no_matrix_of_a_transformer_takes_adam(first_update, params):
    gradients, changes = first_update
    adam = optax.nadam(0.01, b1=0.9, b2=0.99)
    expected, _ = jax.jit(adam.update)(gradients, adam.init(named_leaves(params)))
    others = gradients.keys() - MATRICES.keys()
    assert {"decoder/embedding", "backbone/patch_kernel", "dino_head/last_layer/kernel"} <= others
    for name in others:
        np.testing.assert_allclose(changes[name], expected[name], rtol=1e-5, err_msg=name)


def test_its_state_is_saved_and_restored(tmp_path, params):
    some = {part: params[part] for part in ("projector", "dino_head")}
    fresh = init_state(some, [], MUON, None)
    _, moved = jax.jit(MUON.transform().update)(some, fresh.optimizer, some)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, dataclasses.replace(fresh, optimizer=moved), {})
    with Checkpoints(tmp_path) as checkpoints:
        _, restored, _ = checkpoints.restore_latest(jax.eval_shape(lambda: fresh))
    jax.tree.map(np.testing.assert_array_equal, restored.optimizer, moved)
    assert named_leaves(restored.optimizer).keys() == named_leaves(fresh.optimizer).keys()


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.kind: expected adam or muon, got 'sgd'"):
        dataclasses.replace(MUON, kind="sgd")
