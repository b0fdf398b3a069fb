"""A task's batch in parts: the gradient and the metrics of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from self_supervision_cases import first_batch
from training_cases import whole_config

from omnistream_jax.config import ConfigError
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.optim import Optimizer
from omnistream_jax.sharding import split_micro_batches
from omnistream_jax.step import init_params, init_state, make_accumulate
from omnistream_jax.tasks.build import build_tasks

pytestmark = pytest.mark.usefixtures("quick_compilation")

BACKBONE = Backbone(BackboneConfig(width=32, depth=4, heads=4, mlp_width=64, layer_scale=1.0, kernel_std=0.2))
OPTIMIZER = Optimizer(1e-3, 1, 10, 0.0, 0.9, 0.999, 0.0, 0)
SIZES = {"tasks__clip_geometry__batch_size": 4, "tasks__caption__batch_size": 4, "geometry__gradient_scales": 2}
SIZES |= {"tasks__caption__captions_per_row": 1, "geometry__ray_confidence": True, "geometry__weights__ray": 0.5}


def task_of(name: str, **overrides: object):
    tasks = build_tasks(whole_config(**SIZES, **overrides), BACKBONE, None)
    return next(task for task in tasks if task.name == name)


def uneven_batch(task) -> dict[str, np.ndarray]:
    """A batch whose rows teach unlike amounts, the first nothing."""
    batch = first_batch(task)
    if task.name == "caption":
        batch["target_mask"][0] = False
        batch["target_mask"][1] &= np.cumsum(batch["target_mask"][1]) <= 3
        learned = batch["target_mask"].sum(1)
    else:
        batch["valid"][0] = False
        batch["valid"][1, 1:] = False
        batch["valid"][1, :, ::2] = False
        batch["has_pose"][2] = False
        learned = batch["valid"].sum((1, 2, 3))
    assert learned[0] == 0
    assert learned[1] < learned[3] / 2
    return batch


@pytest.mark.parametrize("name", ["clip_geometry", "caption"])
def test_parts_add_up_to_the_gradient_and_the_metrics_of_the_whole_batch(name):
    whole, parts = task_of(name), task_of(name, **{f"tasks__{name}__micro_batches": 4})
    assert (whole.micro_batches, parts.micro_batches) == (1, 4)
    batch = uneven_batch(whole)
    state = init_state(init_params(BACKBONE, [whole], seed=0), [whole], OPTIMIZER, None)
    start = jax.tree.map(jnp.ones_like, state.params)

    def run(task):
        return jax.device_get(make_accumulate(task, seed=0)(state, jax.tree.map(jnp.copy, start), batch))

    (expected, metrics), (found, found_metrics) = run(whole), run(parts)
    assert found_metrics.keys() == metrics.keys()
    for metric, value in metrics.items():
        assert found_metrics[metric] == pytest.approx(value, rel=2e-6, abs=1e-7), metric
    largest = max(np.abs(leaf - 1).max() for leaf in jax.tree.leaves(expected))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        allowed = 1e-4 * np.abs(leaf - 1).max() + 1e-6 * largest
        assert np.abs(leaf - other).max() <= allowed, jax.tree_util.keystr(path)
    # The mean of the parts' own means is another number: what is tested makes a difference.
    accumulate = make_accumulate(whole, seed=0)
    rows = [jax.tree.map(lambda array, i=i: array[i : i + 1], batch) for i in range(4)]
    losses = [accumulate(state, jax.tree.map(jnp.copy, start), row)[1]["loss"] for row in rows]
    assert abs(np.mean(losses) - metrics["loss"]) > 1e-3 * abs(metrics["loss"])


def test_the_networks_run_once_for_each_part():
    """Counting what is valid runs none."""
    task = task_of("caption", tasks__caption__micro_batches=2)
    batch = first_batch(task)
    state = init_state(init_params(BACKBONE, [task], seed=0), [task], OPTIMIZER, None)
    gradients = jax.tree.map(jnp.copy, state.params)
    text = make_accumulate(task, seed=0).lower(state, gradients, batch).compile().as_text()
    one = make_accumulate(task_of("caption"), seed=0).lower(state, gradients, batch).compile().as_text()
    assert text.count(" dot(") == one.count(" dot(") > 0


def test_each_device_splits_its_own_rows():
    parts = split_micro_batches({"rows": jnp.arange(8)}, 2)["rows"]
    assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(ValueError, match="8 rows are no 3 equal micro-batches"):
        split_micro_batches({"rows": jnp.arange(8)}, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_ssl__micro_batches": 2}, "tasks.image_ssl.micro_batches: expected 1, for this loss compares"),
        ({"clip_ssl__micro_batches": 2}, "tasks.clip_ssl.micro_batches: expected 1, for this loss compares"),
        ({"caption__micro_batches": 3}, "tasks.caption.micro_batches: expected a divisor of the 4 samples of a device"),
        ({"clip_geometry__micro_batches": 0}, "tasks.clip_geometry.micro_batches: expected a divisor of the 4"),
    ],
)
def test_parts_that_cannot_be_are_refused(overrides, message):
    config = whole_config(**SIZES, **{f"tasks__{name}": value for name, value in overrides.items()})
    with pytest.raises(ConfigError, match=message):
        build_tasks(config, BACKBONE, BACKBONE.config)
