"""A run that starts from the weights of another one's checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_cases import bits
from training_cases import small_config, whole_config

from omnistream_jax import config as config_lib
from omnistream_jax.build import build
from omnistream_jax.checkpoint import CheckpointError, Checkpoints
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.step import fresh_params
from omnistream_jax.tasks.build import build_backbone, build_tasks
from omnistream_jax.weights import restore_weights, taken_parts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def shapes(config):
    """Of the parameters of a config's model."""
    backbone = build_backbone(config)
    tasks = build_tasks(config, backbone, None)
    return jax.eval_shape(lambda: fresh_params(backbone, tasks, config.seed))


def filled(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), tree)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A run of all tasks with checkpoints of steps 5 and 9, and the teacher of the last one."""
    workdir, config = tmp_path_factory.mktemp("stage1"), whole_config()
    metadata = {"config": config_lib.to_plain(config)}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in (5, 9):
            params, ema = (filled(shapes(config), seed) for seed in (step, step + 1))
            checkpoints.save(step, {"params": params, "ema": ema, "step": jnp.int32(step)}, metadata)
    return workdir, ema


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/9"])
def test_all_parts_start_from_the_teacher_that_was_trained(stage1, where):
    workdir, ema = stage1
    config = whole_config(seed=1, steps=20)
    wanted = shapes(config)
    assert set(wanted) == {"backbone", "dino_head", "ibot_head", "geometry", "projector", "decoder"}
    assert bits(restore_weights(workdir / where, wanted, config)) == bits(ema)


def test_a_run_starts_from_them_with_both_teachers_and_a_fresh_optimiser(stage1):
    workdir, ema = stage1
    init = {"init__weights": str(workdir), "init__parts": ("backbone", "dino_head")}
    run = build(small_config(**init, tasks__clip_ssl__weight=0.0, seed=1))
    for part in ("backbone", "dino_head"):
        assert bits(run.state.params[part]) == bits(run.state.ema[part]) == bits(ema[part])
    assert bits(run.state.params["ibot_head"]) != bits(ema["ibot_head"]), "it begins anew"
    assert bits(run.state.gram) == bits(ema["backbone"])
    assert run.tasks[0].settings.gram_from_step == 0, "the Gram teacher stands from the first step"
    assert int(run.state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run.state.optimizer))


def test_one_error_tells_all_that_does_not_fit(stage1):
    workdir, _ = stage1
    changes = {"self_supervision__prototypes": 48, "language__decoder__hidden": 64, "model__time_unit": 8}
    config = whole_config(geometry__units="metres", **changes)
    with pytest.raises(WeightsError) as caught:
        restore_weights(workdir, shapes(config), config)
    first, *lines = str(caught.value).splitlines()
    assert first == f"init.weights: step 9 in {workdir}/checkpoints does not fit this run:"
    assert "  ema/dino_head/last_layer/kernel: expected float32[16,48], it holds float32[16,32]" in lines
    assert "  ema/ibot_head/last_layer/kernel: expected float32[16,48], it holds float32[16,32]" in lines
    assert sum(line.startswith("  ema/decoder/") for line in lines) >= 3
    assert "  model.time_unit: it was trained with 16.0, this run has 8.0" in lines
    assert "  geometry.units: it was trained with clip, this run has metres" in lines
    assert len(lines) < 10, "and nothing else"


def test_a_part_that_was_not_trained_is_named_and_the_others_can_be_taken(tmp_path):
    config = small_config()
    ema = filled(shapes(config), 0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": ema, "ema": ema}, {"config": config_lib.to_plain(config)})
    wanted = shapes(whole_config())
    with pytest.raises(WeightsError) as caught:
        restore_weights(tmp_path, wanted, whole_config())
    there = "(it has backbone, dino_head, ibot_head); leave it out of init.parts"
    missing = [f"  {part}: that run did not train it {there}" for part in ("decoder", "geometry", "projector")]
    assert sorted(str(caught.value).splitlines()[1:]) == missing
    probe = restore_weights(tmp_path, {"backbone": wanted["backbone"]}, whole_config())
    assert bits(probe) == bits({"backbone": ema["backbone"]})


def test_what_is_given_twice_is_refused():
    names = ("backbone", "decoder", "projector")
    config = small_config(init__weights="/run", init__backbone="/dinov3", init__decoder="/qwen3")
    with pytest.raises(ConfigError, match=r"init.backbone and init.decoder: init.weights gives it already"):
        taken_parts(config, names)
    config.init.parts = ("projector",)
    assert taken_parts(config, names) == ("projector",)


def test_the_student_is_taken_where_there_is_no_teacher(tmp_path):
    params = {"backbone": {"w": jnp.arange(4.0)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"params": params, "ema": {}, "step": jnp.int32(3)}, {})
    assert bits(restore_weights(tmp_path, params, {})) == bits(params)


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_the_one_that_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": {"backbone": {"w": jnp.arange(500.0) + step}}}, {})
    arrays = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.parent.name == "d"]
    for path in arrays:
        path.unlink()
    wanted = {"backbone": {"w": jax.ShapeDtypeStruct((500,), jnp.float32)}}
    assert restore_weights(tmp_path, wanted, {})["backbone"]["w"][0] == 1
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        restore_weights(tmp_path / "2", wanted, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "nothing of another run is put aside"


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "nowhere: no such directory"), ("", "there is no checkpoint in it; expected a run's --workdir")],
)
def test_a_place_without_checkpoints_is_told_before_anything_is_built(tmp_path, path, message):
    with pytest.raises(WeightsError, match=f"init.weights: {tmp_path}.*{message}"):
        build(small_config(init__weights=str(tmp_path / path), model__preset="none that there is"))


def test_a_part_that_there_is_not_is_refused():
    config = small_config(init__weights="/run", init__parts=("spine",))
    with pytest.raises(ConfigError, match=r"init.parts: expected some of backbone, decoder, got spine"):
        taken_parts(config, ("backbone", "decoder"))


def test_parts_of_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"init.parts: expected none without init.weights, got backbone"):
        taken_parts(small_config(init__parts=("backbone",)), ("backbone", "decoder"))
