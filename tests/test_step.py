"""The two programs of a step, and the tasks that they run."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import load_golden
from training_cases import small_config

from omnistream_jax import step as step_lib
from omnistream_jax import train as train_lib
from omnistream_jax.convert import layouts
from omnistream_jax.convert.initialise import gram_config, initial_backbone
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.optim import Optimizer, TeacherSchedule, cosine, linear
from omnistream_jax.tasks.task import Teachers

OPTIMIZER = Optimizer(
    peak=0.1, warmup_steps=4, steps=20, final=0.01, beta1=0.9, beta2=0.999, clip_norm=0.0, freeze_prototypes_steps=0
)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [float(OPTIMIZER.learning_rate(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:5], [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rates[12], 0.055, rtol=1e-6)  # half-way down: the mean of peak and final
    np.testing.assert_allclose(rates[20], 0.01, rtol=1e-5)
    assert float(cosine(0.994, 1.0, 5, 10)) == pytest.approx(0.997, abs=1e-6)
    assert float(linear(0.04, 0.07, 10, 30)) == pytest.approx(0.05, abs=1e-6)


@dataclasses.dataclass(frozen=True)
class QuadraticTask:
    """Loss 0.5 |w - target|^2: its gradient is known."""

    name: str
    weight: float
    target: float
    has_teacher: bool = True
    micro_batches: int = 1

    def loss(self, params, teachers, batch, key):
        difference = params["backbone"]["w"] - self.target * batch["one"]
        return 0.5 * jnp.sum(difference**2), {"shared": jnp.float32(self.target)}


def state_of(w, optimizer, gram=None):
    params = {"backbone": {"w": jnp.asarray(w, jnp.float32)}}
    return step_lib.init_state(params, [QuadraticTask("a", 1.0, 0.0)], optimizer, gram)


def test_tasks_add_weighted_gradients_and_one_adam_update_follows():
    tasks = [QuadraticTask("a", 0.5, 1.0), QuadraticTask("b", 2.0, -3.0)]
    state = state_of([1.0, 2.0], OPTIMIZER)
    gradients = jax.tree.map(jnp.zeros_like, state.params)
    metrics = {}
    for task in tasks:
        program = step_lib.make_accumulate(task, seed=0)
        gradients, metrics[task.name] = program(state, gradients, {"one": jnp.ones(())})
    expected = 0.5 * (np.array([1.0, 2.0]) - 1.0) + 2.0 * (np.array([1.0, 2.0]) + 3.0)
    np.testing.assert_allclose(gradients["backbone"]["w"], expected, rtol=1e-6)

    adam = optax.adam(OPTIMIZER.learning_rate)
    change, _ = adam.update({"w": jnp.asarray(expected)}, adam.init({"w": jnp.zeros(2)}))
    before = np.array(state.params["backbone"]["w"])
    update = step_lib.make_update(OPTIMIZER, TeacherSchedule((0.9, 1.0)))
    state, gradients, values = update(state, gradients, [m["loss"] for m in metrics.values()])
    np.testing.assert_allclose(state.params["backbone"]["w"], before + change["w"], rtol=1e-6)
    np.testing.assert_allclose(state.ema["backbone"]["w"], before + 0.1 * np.asarray(change["w"]), rtol=1e-6)
    assert values["gradient_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-6)
    assert not np.any(gradients["backbone"]["w"])
    assert int(state.step) == 1

    merged = step_lib.merge_metrics(tasks, metrics)
    losses = [float(metrics[name]["loss"]) for name in "ab"]
    assert merged["loss"] == pytest.approx(0.5 * losses[0] + 2.0 * losses[1])
    assert merged["loss_a"] == pytest.approx(losses[0])
    assert merged["shared"] == pytest.approx(-1.0)


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    state = state_of([1.0, 2.0], OPTIMIZER)
    before = jax.tree.map(np.array, state)
    gradients = {"backbone": {"w": jnp.array([1.0, jnp.nan])}}
    update = step_lib.make_update(OPTIMIZER, TeacherSchedule((0.9, 1.0)))
    after, gradients, _ = update(state, gradients, [jnp.float32(1.0)])
    chex.assert_trees_all_equal(after, before)
    after, _, _ = update(after, {"backbone": {"w": jnp.ones(2)}}, [jnp.float32(jnp.inf)])
    chex.assert_trees_all_equal(after, before)


def test_the_gram_teacher_is_a_copy_of_the_ema_teacher_at_its_snapshots():
    state = state_of([1.0, 2.0], OPTIMIZER, gram={"w": jnp.zeros(2)})
    update = step_lib.make_update(OPTIMIZER, TeacherSchedule((0.5, 0.5), gram_snapshot_steps=(2,)))
    seen = []
    for _ in range(3):
        state, _, _ = update(state, {"backbone": {"w": jnp.ones(2)}}, [jnp.float32(1.0)])
        seen.append((np.array(state.gram["w"]), np.array(state.ema["backbone"]["w"])))
    assert not np.any(seen[0][0])
    np.testing.assert_array_equal(seen[1][0], seen[1][1])
    np.testing.assert_array_equal(seen[2][0], seen[1][1])


def test_each_module_is_clipped_by_its_own_norm():
    optimizer = dataclasses.replace(OPTIMIZER, clip_norm=1.0)
    gradients = {"backbone": {"w": jnp.array([3.0, 4.0])}, "head": {"w": jnp.array([0.3, 0.4])}}
    clipped = optimizer.clipped(gradients)
    np.testing.assert_allclose(clipped["backbone"]["w"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped["head"]["w"], [0.3, 0.4], rtol=1e-6)
    chex.assert_trees_all_equal(OPTIMIZER.clipped(gradients), gradients)


def test_prototypes_wait_for_their_step():
    optimizer = dataclasses.replace(OPTIMIZER, freeze_prototypes_steps=2)
    gradients = {"head": {"last_layer": {"kernel": jnp.ones(2)}, "mlp_0": {"kernel": jnp.ones(2)}}}
    for step, expected in ((0, 0.0), (1, 0.0), (2, 1.0)):
        kept = optimizer.scaled(gradients, jnp.int32(step))["head"]
        assert float(kept["last_layer"]["kernel"][0]) == expected
        assert float(kept["mlp_0"]["kernel"][0]) == 1.0


def test_the_longest_name_gives_the_factor_of_a_learning_rate():
    optimizer = dataclasses.replace(OPTIMIZER, factors=(("geometry/camera", 0.25), ("geometry", 0.5)))
    ones = {"kernel": jnp.ones(2)}
    params = {"backbone": ones, "geometry": {"camera": ones, "camera_like": ones}}
    optimizer.check_factors(params)
    changed = optimizer.scaled(params, jnp.int32(0))
    assert changed["backbone"]["kernel"].tolist() == [1.0, 1.0]
    assert changed["geometry"]["camera"]["kernel"].tolist() == [0.25, 0.25]
    assert changed["geometry"]["camera_like"]["kernel"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("factors", [(("geometry/cam", 0.5),), (("depth", 0.5),)])
def test_a_factor_of_no_parameters_is_refused(factors):
    optimizer = dataclasses.replace(OPTIMIZER, factors=factors)
    with pytest.raises(ValueError, match=r"optimizer.factors: no parameters are named"):
        optimizer.check_factors({"backbone": jnp.ones(2), "geometry": {"camera": jnp.ones(2)}})


@pytest.mark.parametrize("pair", [("geometry", -1.0), ("geometry",), (1.0, "geometry")])
def test_a_bad_factor_is_refused(pair):
    with pytest.raises(ValueError, match=r"optimizer.factors: expected pairs"):
        dataclasses.replace(OPTIMIZER, factors=(pair,))


@pytest.fixture(scope="module")
def run():
    return train_lib.build(small_config())


def batch_of(run, index):
    task = run.tasks[index]
    with build_pipeline({task.name: task.data}, seed=0) as pipeline:
        batch = next(pipeline)[task.name]
    return task, {name: jnp.asarray(array) for name, array in batch.items() if name != "record"}


@pytest.mark.parametrize("index", [0, 1])
def test_l_ssl_is_the_weighted_sum_of_its_terms(run, index):
    task, batch = batch_of(run, index)
    teachers = Teachers(jnp.int32(5), run.state.ema, run.state.gram)
    loss, terms = jax.jit(task.loss)(run.state.params, teachers, batch, jax.random.key(0))
    # 2 global and 2 local crops: 2 pairs of global crops and 4 with a local one; KoLeo once per global crop.
    dino = 2 / 6 * terms["dino_global"] + 4 / 6 * 0.5 * terms["dino_local"]
    expected = dino + terms[f"ibot_{task.kind}"] + 0.1 * 2 * terms["koleo"] + terms.get("gram", 0.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert ("gram" in terms) == (task.kind == "image")


def test_what_the_masks_hide_does_not_reach_the_student(run):
    task, batch = batch_of(run, 1)
    crops, masks = np.array(batch["global_crops"]), np.asarray(batch["masks"])
    hidden = np.repeat(np.repeat(masks, 16, axis=3), 16, axis=4)
    other = np.where(hidden[..., None], 255 - crops, crops)
    key = jax.random.key(1)
    flat = jnp.asarray(masks).reshape(-1, *masks.shape[2:])
    outputs = [task._student(run.state.params["backbone"], jnp.asarray(c), key, flat).patches for c in (crops, other)]
    np.testing.assert_array_equal(*outputs)
    assert np.any(other != crops)


def test_dinov3_weights_start_a_backbone_that_answers_as_dinov3():
    golden = load_golden("02a_square_dinov3_hf")
    weights = layouts.from_tensors(golden.weights, golden.config)
    config = BackboneConfig(width=64, depth=3, heads=4, mlp_width=128, rope="dinov3_2d")
    backbone = Backbone(config)
    fresh = backbone.init(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
    params = initial_backbone(weights, config, fresh)
    frames = np.moveaxis(golden.inputs["pixel_values"], 1, -1)[:, None]
    out = backbone.apply({"params": params}, frames)
    assert np.max(np.abs(out.cls[:, 0] - golden.outputs["pooler_output"])) <= 2e-4
    assert not np.any(params["blocks"]["attention"]["key_bias"])
    np.testing.assert_array_equal(params["register_tokens"][0], params["register_tokens"][1])
    np.testing.assert_array_equal(params["camera_tokens"], fresh["camera_tokens"])
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert gram_config(weights).rope == "dinov3_2d"


def test_weights_of_another_size_are_refused_with_every_difference():
    golden = load_golden("02a_square_dinov3_hf")
    weights = layouts.from_tensors(golden.weights, golden.config)
    config = BackboneConfig(width=32, depth=2, heads=4, mlp_width=128)
    with pytest.raises(ValueError, match=r"width: 64, the model has 32 .model.preset.\n.*depth: 3, the model has 2 "):
        initial_backbone(weights, config, {})
