"""A checkpoint restored on other devices and other processes than those that saved it."""

import shutil

import pytest
from fault_cases import finish, pair, victim

from omnistream_jax.utils.metrics import read_metrics

STEPS, SAVED = 10, 4
TOY = {"steps": STEPS, "checkpoint__every": SAVED, "checkpoint__keep_last": 9}
# The real model of two tasks, which look across the batch or not. Compiled in a hurry. Its features differ: else the
# nearest neighbours of KoLeo hang on the last bits.
REAL = TOY | {"real": True, "tasks__clip_ssl__weight": 0.0, "tasks__image_ssl__batch_size": 8}
REAL |= {
    "tasks__clip_geometry__weight": 1.0,
    "tasks__clip_geometry__batch_size": 8,
    "self_supervision__gram__weight": 0.0,
    "model__kernel_std": 0.09,
    "model__layer_scale": 1.0,
}


def fake_devices(count):
    options = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**options, "OMP_NUM_THREADS": "1", "NPROC": "64"}  # threads that may wait for others: see mesh_cases.py


def cut_back(workdir, copy):
    """A copy as it was when step SAVED had been saved."""
    shutil.copytree(workdir, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > SAVED:
            shutil.rmtree(path)


def assert_goes_on_alike(whole, resumed):
    losses, again = (
        [row["loss"] for row in read_metrics(path / "metrics.jsonl") if "loss" in row] for path in (whole, resumed)
    )
    assert len(losses) == len(again) == STEPS
    assert again[:SAVED] == losses[:SAVED]
    assert again[SAVED] == pytest.approx(losses[SAVED], rel=1e-6)
    assert again[SAVED + 1 :] == pytest.approx(losses[SAVED + 1 :], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [TOY, pytest.param(REAL, id="real")])
def test_from_eight_devices_onto_two(tmp_path, fields):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finish(victim(whole, {**fields, "mesh__fsdp": 4}, **fake_devices(8)), timeout=900)
    cut_back(whole, resumed)
    (output,) = finish(victim(resumed, {**fields, "mesh__fsdp": 2}, **fake_devices(2)), timeout=900)
    assert f"going on from step {SAVED}" in output
    assert_goes_on_alike(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [TOY, pytest.param(REAL, id="real")])
def test_from_two_processes_onto_one_and_back(tmp_path, fields):
    whole, resumed, back = tmp_path / "whole", tmp_path / "resumed", tmp_path / "back"
    outputs = finish(*pair(whole, {**fields, "mesh__fsdp": 2}, **fake_devices(1)), timeout=900)
    assert f"saved step {STEPS}" in outputs[0]
    cut_back(whole, resumed)
    finish(victim(resumed, fields, **fake_devices(1)), timeout=900)
    assert_goes_on_alike(whole, resumed)
    cut_back(resumed, back)
    finish(*pair(back, {**fields, "mesh__fsdp": 2}, **fake_devices(1)), timeout=900)
    assert_goes_on_alike(resumed, back)
