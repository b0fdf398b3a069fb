"""L_ssl against a second implementation, and its programs on several devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from self_supervision_cases import first_batch, random_tasks, reference_loss
from training_cases import REPOSITORY

from omnistream_jax.sharding import global_batch, make_mesh, replicated
from omnistream_jax.step import make_accumulate
from omnistream_jax.tasks.task import Teachers

TEMPERATURES = {"self_supervision__teacher_temperature": (0.04, 0.08), "self_supervision__teacher_warmup_steps": 10}
SIZES = {
    f"tasks__{task}_ssl__{field}": value
    for task in ("image", "clip")
    for field, value in (("global_size", 48), ("local_size", 32))
}


@pytest.mark.parametrize(("kind", "gram_size"), [("image", 0), ("image", 64), ("clip", 0)])
def test_every_term_and_the_sum_match_a_plain_loop_over_crops(kind, gram_size):
    overrides = {**SIZES, **TEMPERATURES, "self_supervision__gram__size": gram_size}
    tasks, state = random_tasks(self_supervision__rope_jitter=1.0, **overrides)
    task = tasks[kind]
    batch = first_batch(task)
    assert batch["global_crops"].shape[2] == (1 if kind == "image" else 2)
    assert ("gram_crops" in batch) == (gram_size > 0)
    masked = batch["masks"].sum(axis=(2, 3, 4))
    assert masked.max() > 1, "nothing to learn for iBOT"
    assert kind == "clip" or masked.min() == 0, "no crop without masks"

    teachers = Teachers(state.step, state.ema, state.gram)
    loss, metrics = jax.jit(task.loss)(state.params, teachers, batch, jax.random.key(0))
    expected, terms = reference_loss(task, state, batch)
    for name, value in terms.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name
    assert float(loss) == pytest.approx(expected, rel=1e-5)  # the Gram term is small beside the others


@pytest.mark.slow
def test_a_batch_split_over_four_devices_gives_the_gradients_of_one():
    """In a process of its own, for the number of devices is fixed when JAX starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]),
    }
    program = "import test_self_supervision; test_self_supervision.compare_one_and_four_devices()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == ["clip", "image"]


def compare_one_and_four_devices() -> None:
    mesh = make_mesh()
    assert mesh.size == 4
    tasks, state = random_tasks(tasks__image_ssl__batch_size=4, tasks__clip_ssl__batch_size=4)
    for kind, task in tasks.items():
        arrays = first_batch(task)
        accumulate = make_accumulate(task, seed=0)
        zeros = jax.tree.map(np.zeros_like, jax.device_get(state.params))

        single = jax.devices()[0]
        one = jax.device_get(accumulate(*jax.device_put((state, zeros, arrays), single)))
        whole = replicated(mesh)
        split = global_batch(arrays, mesh)
        assert split["global_crops"].sharding.shard_shape(split["global_crops"].shape)[0] == 1
        inputs = jax.device_put(state, whole), jax.device_put(zeros, whole), split
        program = accumulate.lower(*inputs).compile()
        assert_only_small_arrays_are_gathered(program.as_text(), arrays)
        four = jax.device_get(program(*inputs))
        assert_equal_steps(four, one)
        print(kind)


def assert_only_small_arrays_are_gathered(program: str, batch: dict[str, np.ndarray]) -> None:
    """Gradients are summed over the devices; crops stay where they are, as bytes and as numbers."""
    assert re.search(r" all-reduce(-start)?\(", program)
    crops = [batch[name][:, 0, 0].size for name in ("global_crops", "local_crops")]
    for line in program.splitlines():
        found = re.search(r"= (.*?) all-gather(-start)?\(", line)
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if found else []:
            size = np.prod([int(side) for side in shape.split(",") if side], dtype=int)
            assert kind != "u8", line
            assert size < min(crops), line


def assert_equal_steps(four, one) -> None:
    (gradients, metrics), (expected_gradients, expected_metrics) = four, one
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    assert largest > 0
    expected = dict(jax.tree_util.tree_leaves_with_path(expected_gradients))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        allowed = 1e-4 * np.abs(expected[path]).max() + 1e-7 * largest
        assert np.abs(leaf - expected[path]).max() <= allowed, jax.tree_util.keystr(path)
