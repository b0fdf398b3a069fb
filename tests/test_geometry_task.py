"""L_geo: what is known is learned, what is not known is not, and units do not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometry_cases import compiled
from training_cases import whole_config

from omnistream_jax import train as train_lib
from omnistream_jax.models.geometry import GeometryPrediction, geometry_config
from omnistream_jax.step import make_accumulate
from omnistream_jax.tasks.geometry import GeometryTask, geometry_target
from omnistream_jax.tasks.task import Teachers

pytestmark = pytest.mark.usefixtures("quick_compilation")
TERMS = ("depth", "rays", "points", "camera")
TEACHERS = Teachers(jnp.zeros((), jnp.int32), {}, None)


class Told(GeometryTask):
    """A task that takes its parameters as the prediction."""

    def _predict(self, params, frames, key):
        return params


# Compiled once for all tests.
told_loss = compiled(Told.loss, static_argnums=0)
target_of = compiled(geometry_target, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def run():
    """The geometry task alone; cells of the ray map are pixels."""
    alone = {"tasks__image_ssl__weight": 0.0, "tasks__clip_ssl__weight": 0.0, "tasks__caption__weight": 0.0}
    alone["model__patch_size"] = 8
    return train_lib.build(whole_config(**alone, evaluation__picture_size=32))


@pytest.fixture(scope="module")
def task(run):
    return run.tasks[0]


@pytest.fixture(scope="module")
def batch(task):
    arrays = dict(task.data.dataset(seed=0, process_index=0, process_count=1)[0])
    return {name: jnp.asarray(array) for name, array in arrays.items() if name not in ("record", "skipped")}


def truth(task, batch) -> GeometryPrediction:
    """The prediction that is right."""
    rows = batch["depth"].shape[2]
    target = jax.tree.map(jnp.asarray, target_of(batch, (rows, rows), task.geometry_heads.config.units))
    ones = jnp.ones_like(target.depth)
    return GeometryPrediction(jnp.where(target.depth_valid, target.depth, 1.0), ones, target.rays, ones, target.camera)


def losses(task, batch, prediction) -> dict[str, float]:
    """The terms for a prediction that does not come from the heads."""
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    loss, metrics = told_loss(Told(**fields | {"data": None}), prediction, TEACHERS, batch, jax.random.key(0))
    return {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}}


def changed(batch, **arrays):
    return {**batch, **{name: jnp.asarray(array) for name, array in arrays.items()}}


def test_the_truth_costs_nothing_and_anything_else_does(task, batch):
    right = truth(task, batch)
    for name, value in losses(task, batch, right).items():
        assert value == pytest.approx(0, abs=1e-5), name
    wrong = {
        "depth": right.replace(depth=1.1 * right.depth),
        "rays": right.replace(rays=right.rays + 0.1),
        "camera": right.replace(camera=right.camera + 0.1),
    }
    for name, prediction in wrong.items():
        found = losses(task, batch, prediction)
        touched = {name} if name == "camera" else {name, "points"}
        assert {term for term in TERMS if found[term] > 1e-3} == touched
    assert losses(task, batch, wrong["camera"])["camera"] == pytest.approx(0.9, abs=1e-4)  # nine numbers


def test_the_world_frame_and_the_unit_of_length_make_no_difference(task, batch):
    turn = np.eye(4, dtype=np.float32)
    turn[:3, :3] = [[0, -1, 0], [0, 0, 1], [-1, 0, 0]]
    turn[:3, 3] = [5, -2, 1]
    poses = turn @ np.asarray(batch["cam_to_world"])
    poses[..., :3, 3] *= 3
    moved = changed(batch, cam_to_world=poses, depth=3 * batch["depth"])
    for ours, theirs in zip(jax.tree.leaves(truth(task, moved)), jax.tree.leaves(truth(task, batch)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_lengths_in_metres_are_kept_and_clips_without_them_teach_none(task, batch):
    config = dataclasses.replace(task.geometry_heads.config, units="metres")
    metres = dataclasses.replace(task, geometry_heads=task.geometry_heads.clone(config=config))
    right = truth(metres, batch)
    np.testing.assert_allclose(right.depth, batch["depth"], rtol=1e-6)
    step = np.linalg.inv(batch["cam_to_world"][0, 0]) @ batch["cam_to_world"][0, 1]
    np.testing.assert_allclose(right.camera[0, 1, :3], step[:3, 3], atol=1e-5)
    longer = right.replace(depth=2 * right.depth, camera=right.camera.at[:, 1:, :3].add(1))
    assert losses(metres, batch, longer)["depth"] > 0.1
    unknown = losses(metres, changed(batch, metric=np.zeros(2, bool)), longer)
    assert unknown["loss"] == pytest.approx(0, abs=1e-5)


def test_without_poses_only_the_first_camera_and_depth_are_learned(task, batch):
    none = changed(batch, has_pose=np.zeros(2, bool), cam_to_world=np.full_like(batch["cam_to_world"], np.nan))
    right = truth(task, none)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(right))
    elsewhere = right.replace(rays=right.rays.at[:, 1:].add(1), camera=right.camera.at[:, 1:, :7].add(1))
    assert losses(task, none, elsewhere)["loss"] == pytest.approx(0, abs=1e-5)
    first = right.replace(rays=right.rays.at[:, :1].add(1))
    assert losses(task, none, first)["rays"] > 0.1
    assert losses(task, none, right.replace(camera=right.camera.at[:, 1:, 7:].add(1)))["camera"] > 0.1
    assert losses(task, none, right.replace(depth=2 * right.depth))["depth"] > 0.1


def test_without_depth_directions_are_learned_and_lengths_are_not(task, batch):
    blind = changed(batch, has_depth=np.zeros(2, bool), valid=np.zeros_like(batch["valid"]))
    right = truth(task, blind)
    longer = right.replace(
        depth=3 * right.depth, rays=right.rays.at[:, 1:, ..., :3].add(1), camera=right.camera.at[:, 1:, :3].add(1)
    )
    assert losses(task, blind, longer)["loss"] == pytest.approx(0, abs=1e-5)
    assert losses(task, blind, right.replace(rays=right.rays.at[..., 3:].add(1)))["rays"] > 0.1


def test_gradients_reach_the_backbone_and_every_part_of_the_heads(run, task, batch):
    accumulate = make_accumulate(task, seed=0)
    gradients = jax.tree.map(jnp.zeros_like, run.state.params)
    gradients, metrics = accumulate(run.state, gradients, batch)
    assert set(TERMS) <= set(metrics)
    still = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(leaf).max() > 0
    ]
    # Frames are square, their log(height / width) is 0; nothing is masked; the clip's own token is not read.
    assert {name.split("'")[3] for name in still} <= {"aspect_kernel", "mask_token"}, still


def test_the_layers_that_feed_the_heads_must_exist():
    assert geometry_config(24).layers == (11, 15, 19, 23)
    with pytest.raises(ValueError, match="layers: expected blocks 0 to 3"):
        geometry_config(4, (0, 1, 2, 4))
    with pytest.raises(ValueError, match="units"):
        geometry_config(4, units="feet")
