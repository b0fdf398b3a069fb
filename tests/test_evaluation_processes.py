"""Evaluations by two processes of two devices: what they leave is what one process leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from benchmark_trees import LONG_SIDE, folder_of, world_scenes, write_trees
from dense_probe_cases import write_ade
from evaluation_processes import PROGRAM, run_all
from geometry_model_cases import random_geometry_model
from probe_cases import CLASSES, write_images
from process_cases import environment
from vos_cases import world_sequences, write_davis

from omnistream_jax import launcher, probe
from omnistream_jax.config import ConfigError, load
from omnistream_jax.utils.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PROBES = f"{CONFIGS}/evaluate_probes.py"
LEFT_OUT = ("seconds", "key", "device", "output", "config", "settings")
"""What may differ: times, and where results lie and were made."""
EVALUATIONS = "evaluations.json"
QUICK = ("features", "imagenet", "vos")


def run_two(runs, folder, timeout=600):
    """In two processes; what each printed."""
    file, port = folder / "runs.txt", launcher.free_port()
    file.write_text(repr(runs))
    variables = {"JAX_NUM_CPU_DEVICES": "2", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    children = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(file)],
            env=environment(index, 2, port, **variables),
            cwd=PROGRAM.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_geometry_model().save(directory)
    return directory


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """By the name of their output's folder: a config, its fields, and the file of results."""
    data = tmp_path_factory.mktemp("data")
    davis = write_davis(data / "davis", world_sequences(3, 4, 64))
    trees, ade = write_trees(data / "trees", world_scenes()), write_ade(data / "ade", counts=(4, 5))
    images = write_images(data / "images", train=5, val=3)
    few = {"compilation_cache": "", "plots": False}
    probe = {**few, "loader.workers": 0, "loader.prefetch": 0, "steps": 4, "evaluate_every": 2, "batch": 4}
    probe |= {"checkpoint_every": 1, "log_every": 1, "learning_rates": (0.1, 10.0), "evaluate_batch": 4}
    real = {"allow_incomplete": True}
    classes = {**probe, **real, "data": str(images), "classes": len(CLASSES), "size": 16, "resize": 20}
    labels = {"size": 32, "window": 32, "stride": 21, "augmentation.crop": 32, "augmentation.short_side": 32}
    labels |= {"learning_rates": (1e-3, 1e-1), "dropout": 0.0, "warmup_steps": 1, "data": str(ade)}
    depth = {"learning_rates": (1e-2,), "scenes": 8, "heldout_scenes": 5, "size": 32, "warmup_steps": 1}
    depth |= {"bins": 16, "variance_from": 0}
    motion = {"learning_rates": (1e-3,), "scenes": 11, "heldout_scenes": 5, "size": 16, "frames": 2, "probe_heads": 4}
    followed = {"data": str(davis), "short_side": 64, **real, "compilation_cache": ""}
    streamed = {f"benchmarks.{name}": str(trees / folder_of(name)) for name in ("sintel_depth", "tum_pose")}
    streamed |= {"long_side": LONG_SIDE, "frames_per_step": 2, **real, **few}
    return {
        "imagenet": (f"{PROBES}:imagenet", {**classes, "mesh.fsdp": 2, "mesh.data": -1}, EVALUATIONS),
        "features": (f"{PROBES}:imagenet", {**classes, "augment": False}, EVALUATIONS),
        "ade20k": (f"{PROBES}:ade20k", {**probe, **real, **labels}, EVALUATIONS),
        "depth": (f"{PROBES}:world_depth", {**probe, **depth}, EVALUATIONS),
        "motion": (f"{PROBES}:world_motion", {**probe, **motion}, EVALUATIONS),
        "vos": (f"{CONFIGS}/evaluate_vos.py", followed, "vos.json"),
        "geometry": (f"{CONFIGS}/evaluate_geometry.py", streamed, "geometry.json"),
    }


def with_output(runs, checkpoint, folder, **changes):
    """The runs with where they start from and where their results go."""
    return [
        (config, fields | {"checkpoint": str(checkpoint), "output": str(folder / name)} | changes)
        for name, (config, fields, _) in runs.items()
    ]


def results(path):
    return without(json.loads(path.read_text()))


def without(value):
    if isinstance(value, dict):
        return {name: without(part) for name, part in value.items() if name not in LEFT_OUT}
    return [without(part) for part in value] if isinstance(value, list) else value


def assert_alike(actual, expected, where):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_alike(actual[name], value, f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_alike(actual[index], value, f"{where}/{index}")
    else:
        assert actual == (pytest.approx(expected, rel=2e-3) if isinstance(expected, float) else expected), where


def by_one_and_two(chosen, checkpoint, tmp_path_factory):
    """The folders of one process and of two, and what the two printed."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run_all(with_output({name: (c, without_mesh(f), r) for name, (c, f, r) in chosen.items()}, checkpoint, one))
    return one, two, run_two(with_output(chosen, checkpoint, two), two)


@pytest.fixture(scope="module")
def quick(runs, checkpoint, tmp_path_factory):
    """Some of the runs."""
    return by_one_and_two({name: runs[name] for name in QUICK}, checkpoint, tmp_path_factory)


def without_mesh(fields):
    return {name: value for name, value in fields.items() if not name.startswith("mesh.")}


def assert_same_scores(one, two, chosen):
    for name, (_, _, file) in chosen.items():
        assert_alike(results(two / name / file), results(one / name / file), name)
        if file == EVALUATIONS:
            losses = [[row["loss"] for row in read_metrics(folder / name / "metrics.jsonl")] for folder in (one, two)]
            assert len(losses[0]) == 4
            assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_two_processes_have_the_scores_of_one(quick, runs):
    one, two, _ = quick
    assert_same_scores(one, two, {name: runs[name] for name in QUICK})


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one_in_every_evaluation(runs, checkpoint, tmp_path_factory):
    chosen = {name: run for name, run in runs.items() if name not in QUICK}
    one, two, outputs = by_one_and_two(chosen, checkpoint, tmp_path_factory)
    assert_same_scores(one, two, chosen)
    assert "step 4: miou" in outputs[0]
    assert "step 4:" not in outputs[1]


def test_the_sequences_are_shared_and_told_by_who_did_them(quick):
    printed = [
        [line.split()[1] for line in output.splitlines() if line.startswith("davis2017 ") and "J&F" in line]
        for output in (text.partition(" objects ")[0] for text in quick[2])  # the table comes after
    ]
    assert sorted(map(len, printed)) == [1, 2]
    assert not set(printed[0]) & set(printed[1])


def test_features_of_both_are_joined_in_one_file(quick):
    _, two, _ = quick
    assert [path.name for path in (two / "features" / "features").iterdir()] == ["train.safetensors"]


def test_two_processes_go_on_where_one_was_stopped(quick, runs, checkpoint, tmp_path):
    """The features of one process and its heads at a step are taken over."""
    chosen = {"features": runs["features"]}
    one, _, _ = quick
    first = with_output(chosen, checkpoint, tmp_path)
    run_all(first)
    last = tmp_path / "features" / "checkpoints" / "4"
    os.rename(last, last.with_name("4.gone"))
    outputs = run_two(first, tmp_path)
    assert "features of an earlier run" in outputs[0]
    assert "going on from step 3" in outputs[0]
    assert_alike(results(tmp_path / "features" / EVALUATIONS), results(one / "features" / EVALUATIONS), "")


def test_more_processes_than_samples_are_refused(checkpoint, runs, tmp_path, monkeypatch):
    config, fields, _ = runs["motion"]
    monkeypatch.setattr(probe.jax, "process_count", lambda: 6)
    config = load(config, fields | {"checkpoint": str(checkpoint), "output": str(tmp_path)})
    with pytest.raises(ConfigError, match="data: 5 samples are too few for 6 processes"):
        probe.build(config)
