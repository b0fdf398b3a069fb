"""k-NN and linear accuracy of frozen features: against scikit-learn and a NumPy loop, and as a part of a run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from backbone_cases import random_model
from mesh_cases import run_processes, run_program
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from training_cases import small_config

from omnistream_jax import train as train_lib
from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.config import ConfigError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.probes.labelled import LabelledViews, WorldObjects
from omnistream_jax.evals import evaluators as evaluators_lib
from omnistream_jax.evals.during_training import RunEvaluators
from omnistream_jax.evals.evaluators import (
    KnnEvaluator,
    LabelledFeatures,
    LabelledSets,
    LinearEvaluator,
    knn_classes,
)
from omnistream_jax.model import build_model
from omnistream_jax.utils.metrics import read_metrics
from omnistream_jax.utils.trees import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")
COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (210, 40, 30)}


class Given:
    """Stands for LabelledSets where the features are known."""

    def __init__(self, features):
        self._features = features

    def __len__(self):
        return len(self._features.train_labels)

    def features(self, model, kind):
        return self._features


def clusters(spread, classes=4, train=300, test=70, width=16, seed=0):
    """Features around one random direction a class; at a large spread the classes lie in one another."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = [rng.integers(classes, size=count) for count in (train, test)]
    values = [centres[of] + spread * rng.normal(size=(len(of), width)) for of in labels]
    return LabelledFeatures(*(x.astype(np.float32) for x in values), *(of.astype(np.int32) for of in labels), classes)


def shuffled(features, seed=1):
    return dataclasses.replace(features, train_labels=np.random.default_rng(seed).permutation(features.train_labels))


@pytest.mark.parametrize(("k", "temperature", "spread"), [(20, 0.07, 1.5), (1, 0.07, 1.5), (300, 0.02, 2.5)])
def test_the_votes_are_those_of_scikit_learn(k, temperature, spread):
    features = clusters(spread, test=520)  # more than are compared at once, and no multiple of it
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / temperature)
    ).fit(features.train.astype(np.float64), features.train_labels)
    expected = reference.predict(features.test.astype(np.float64))
    accuracy = np.mean(expected == features.test_labels)
    assert 0.3 < accuracy < 0.99
    np.testing.assert_array_equal(knn_classes(features, k, temperature), expected)
    ((name, value),) = KnnEvaluator(Given(features), (k,), temperature).run(None)
    assert (name, value) == ("knn_top1", pytest.approx(100 * accuracy))


def test_weights_matter_at_a_low_temperature_alone():
    """Two far neighbours of one class against a near one of another."""
    train = np.array([[1, 0.1], [0.6, 0.8], [0.55, 0.8]], np.float32)
    features = LabelledFeatures(train, np.array([[1, 0]], np.float32), np.array([0, 1, 1]), np.array([0]), 2)
    assert knn_classes(features, 3, 0.07)[0] == 0
    assert knn_classes(features, 3, 10.0)[0] == 1
    assert knn_classes(features, 3, 1e-4)[0] == 0, "exp(1 / T) is infinite"


def test_several_k_have_names_of_their_own():
    found = dict(KnnEvaluator(Given(clusters(0.1)), (20, 5)).run(None))
    assert found == {"knn_top1": 100.0, "knn_top1_k5": 100.0}


@pytest.mark.parametrize("evaluator", [KnnEvaluator, LinearEvaluator])
def test_perfect_features_score_all_and_shuffled_labels_chance(evaluator):
    features = clusters(0.1, train=800, test=800)
    assert next(evaluator(Given(features)).run(None))[1] == 100.0
    (_, chance), *_ = evaluator(Given(shuffled(features))).run(None)
    assert 10 < chance < 45  # of four classes, the best of several learning rates on the test set itself


def numpy_heads(features, rate, steps, batch, order, weights, bias):
    """Linear regression to classes by SGD with momentum 0.9 and a cosine, in float64, written out."""
    velocity = [np.zeros_like(weights), np.zeros_like(bias)]
    for step in range(steps):
        rows = order[step]
        x, y = features.train[rows].astype(np.float64), np.eye(features.classes)[features.train_labels[rows]]
        logits = x @ weights + bias
        shares = np.exp(logits - logits.max(1, keepdims=True))
        error = (shares / shares.sum(1, keepdims=True) - y) / batch
        now = rate * batch / 256 * (1 + np.cos(np.pi * step / steps)) / 2
        velocity = [0.9 * v + g for v, g in zip(velocity, (x.T @ error, error.sum(0)), strict=True)]
        weights, bias = weights - now * velocity[0], bias - now * velocity[1]
    return weights, bias


def test_all_learning_rates_at_once_train_as_each_in_numpy(monkeypatch):
    features, rates, steps, batch = clusters(2.0, train=100), (0.01, 1.0, 30.0), 7, 32
    seen = {}
    trained = evaluators_lib._trained

    def watched(classifier, x, labels, scaled, order, key):
        seen["start"] = classifier.init(key, x[:1])["params"]["linear"]
        seen["order"], seen["heads"] = order, trained(classifier, x, labels, scaled, order, key)
        return seen["heads"]

    monkeypatch.setattr(evaluators_lib, "_trained", watched)
    evaluator = LinearEvaluator(Given(features), rates, steps, batch)
    accuracies = evaluator.accuracies(features)
    assert seen["order"].shape == (steps, batch)
    for place, rate in enumerate(rates):
        start = (np.asarray(seen["start"][name], np.float64) for name in ("kernel", "bias"))
        weights, bias = numpy_heads(features, rate, steps, batch, seen["order"], *start)
        head = {name: leaf[place] for name, leaf in seen["heads"]["params"]["linear"].items()}
        np.testing.assert_allclose(head["kernel"], weights, rtol=2e-4, atol=1e-5 * np.abs(weights).max())
        np.testing.assert_allclose(head["bias"], bias, rtol=2e-4, atol=1e-5 * np.abs(weights).max())
        found = np.argmax(features.test @ weights + bias, axis=1)
        assert accuracies[place] == pytest.approx(100 * np.mean(found == features.test_labels))
    best = dict(evaluator.run(None))
    assert best == {"linear_top1": accuracies.max(), "linear_learning_rate": rates[int(accuracies.argmax())]}


def test_every_picture_is_learned_from_once_an_epoch(monkeypatch):
    orders = []
    trained = evaluators_lib._trained
    monkeypatch.setattr(evaluators_lib, "_trained", lambda *given: orders.append(given[4]) or trained(*given))
    features = clusters(1.0, train=100)
    LinearEvaluator(Given(features), (0.1,), steps=7, batch=25).accuracies(features)
    (order,) = orders
    assert sorted(order[:4].ravel()) == list(range(100))
    assert order[:4].tolist() != order[4:].tolist()


def world_sets(train=70, test=10, size=32):
    sources = WorldObjects("train", train, render_size=48), WorldObjects("heldout", test, render_size=48)
    return LabelledSets(*[LabelledViews(source, size, size) for source in sources])


def test_features_are_the_models_own_and_encoded_once(monkeypatch):
    sets, model, encoded = world_sets(), random_model(), []
    encode = type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda self, *args, **named: encoded.append(1) or encode(self, *args, **named)
    )
    both, cls, mean = (sets.features(model, kind) for kind in ("cls+mean", "cls", "mean"))
    assert len(encoded) == 2 + 1, "70 and 10 pictures, 64 at once"
    np.testing.assert_array_equal(both.train, np.concatenate([cls.train, mean.train], axis=1))
    assert both.train.shape == (70, 2 * model.config.width)
    views = [WorldObjects("train", 70, render_size=48).read(index) for index in range(70)]
    np.testing.assert_array_equal(both.train_labels, [label for _, label in views])
    image = LabelledViews(WorldObjects("train", 70, render_size=48), 32, 32).sample(69)["frames"]
    out = encode(model, image[None], layers=())
    np.testing.assert_allclose(cls.train[69], out.cls[0, 0], atol=1e-4)
    np.testing.assert_allclose(mean.train[69], out.patches[0, 0].mean((0, 1)), atol=1e-4)
    other = random_model(1)
    assert not np.allclose(sets.features(other, "cls").train, cls.train)


@pytest.fixture
def folder(tmp_path):
    """Plain colours with some noise, in ImageFolder's layout: anything tells them apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(-20, 20, size=(40, 48, 3))
                Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(
                    tmp_path / split / name / f"{index}.png"
                )
    return tmp_path


def fields(**changes):
    return {**small_config().evaluators, "every": 1, "size": 32, "neighbours": (5,), "linear_steps": 50, **changes}


def test_a_folder_of_pictures_is_scored(folder):
    found = dict(RunEvaluators(fields(paths=str(folder)), 16).run(random_model()))
    assert found["knn_top1"] == found["linear_top1"] == 100.0
    assert 0 < found["evaluators_seconds"] < 60
    only = dict(RunEvaluators(fields(paths=str(folder), names=("linear",)), 16).run(random_model()))
    assert set(only) == {"linear_top1", "linear_learning_rate", "evaluators_seconds"}


def test_at_most_so_many_pictures_are_read(folder, monkeypatch):
    read = []
    view = LabelledViews.sample
    monkeypatch.setattr(LabelledViews, "sample", lambda self, index: read.append(index) or view(self, index))
    evaluators = RunEvaluators(fields(paths=str(folder), train_images=30, test_images=10), 16)
    assert len(read) == 30 + 10
    assert dict(evaluators.run(random_model()))["knn_top1"] > 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("knn", "svm")}, r"evaluators.names: expected some of knn, linear, each once, got \('knn', 'svm'\)"),
        ({"names": ()}, "evaluators.names"),
        ({"names": ("knn", "knn")}, "each once"),
        ({"size": 40}, "evaluators.size: expected a multiple of 16, got 40"),
        ({"size": 0}, "evaluators.size"),
        ({"train_images": 0}, "evaluators.train_images: expected 1 or more, got 0"),
        ({"test_images": -1}, "evaluators.test_images"),
        ({"neighbours": ()}, "evaluators.neighbours: expected one whole number"),
        ({"neighbours": (37,)}, "evaluators.neighbours: 37, of 36 pictures to learn from"),
        ({"temperature": 0.0}, "evaluators.temperature: expected a positive number"),
        ({"knn_features": "registers"}, r"evaluators.knn_features: expected cls\+mean, cls, mean, got 'registers'"),
        ({"learning_rates": (0.1, -1.0)}, "evaluators.learning_rates: expected one positive number or several"),
        ({"linear_steps": 0}, "evaluators.linear_steps: expected 1 or more"),
        ({"paths": ""}, "evaluators.paths: expected world, or a folder with train/CLASS/ and val/CLASS/"),
        ({"paths": "/nowhere"}, "/nowhere/train: there is no such folder"),
    ],
)
def test_a_field_that_cannot_work_is_named(changes, message, folder):
    with pytest.raises(ValueError, match=message):
        RunEvaluators(fields(paths=str(folder)) | changes, 16)


def test_damaged_pictures_and_other_classes_are_named(folder):
    (folder / "val" / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"val/red/0\.png"):
        RunEvaluators(fields(paths=str(folder)), 16)
    (folder / "val" / "red").rename(folder / "val" / "yellow")
    with pytest.raises(DataError, match="have other classes: red, yellow in one alone"):
        RunEvaluators(fields(paths=str(folder)), 16)


EVALUATED = {"tasks__clip_ssl__weight": 0.0, "steps": 4, "checkpoint__every": 4}
EVALUATORS = {"every": 3, "size": 32, "train_images": 40, "test_images": 20, "neighbours": (5,), "linear_steps": 10}


def run_once(workdir, **changes):
    """The rows of a run's metrics, and its last state."""
    config = small_config(**EVALUATED, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "report", lambda *_: None)
        train_lib.train(config, workdir)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train_lib.build(config).state)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        _, state, _ = checkpoints.restore_latest(state)
    return read_metrics(workdir / "metrics.jsonl"), state


def test_a_run_tells_accuracies_and_trains_to_the_same_bits(tmp_path, capsys):
    chosen = {f"evaluators__{name}": value for name, value in EVALUATORS.items()}
    rows, state = run_once(tmp_path / "with", **chosen)
    printed = capsys.readouterr().out
    plain, expected = run_once(tmp_path / "without")
    leaves = named_leaves(state)
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_array_equal(leaves[name], leaf, err_msg=name)
    losses = [[row["loss"] for row in found if "loss" in row] for found in (rows, plain)]
    assert losses[0] == losses[1]
    assert not any("knn_top1" in row for row in plain)

    told = [row for row in rows if "knn_top1" in row]
    assert [row["step"] for row in told] == [0, 3, 4]
    names = {"knn_top1", "linear_top1", "linear_learning_rate"}
    for row in told:
        assert set(row) == {"step", "evaluators_seconds"} | names
        assert 0 <= row["knn_top1"] <= 100
    assert printed.count("linear_top1") == 3
    backbone = train_lib.build(small_config(**EVALUATED)).backbone
    teacher = build_model(backbone.config, state.ema["backbone"], dtype=backbone.dtype)
    found = dict(RunEvaluators({**small_config().evaluators, **EVALUATORS}, 16).run(teacher))
    assert {name: told[-1][name] for name in names} == {name: found[name] for name in names}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("every", -1, "evaluators.every: expected 0 or more, got -1"),
        ("size", 33, "evaluators.size: expected a multiple of 16, got 33"),
    ],
)
def test_a_run_with_a_wrong_field_ends_at_once_and_leaves_nothing(field, value, message, tmp_path):
    changes = {"evaluators__every": 1, f"evaluators__{field}": value}
    with pytest.raises(ConfigError, match=message):
        train_lib.train(small_config(**EVALUATED, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


PROGRAM = """
    import json, pathlib, sys
    import mesh_cases

    fields, workdir, joined = json.loads(sys.argv[1])
    if joined:
        mesh_cases.join()
    mesh_cases.compile_quickly()
    mesh_cases.shrink_model()

    import jax
    from omnistream_jax import train
    from omnistream_jax.utils.agreement import any_process

    weights = {f"tasks__{name}__weight": 0.0 for name in ("clip_ssl", "clip_geometry", "caption")}
    config = mesh_cases.mesh_config(**weights, **fields)
    run = train.build(config)
    evaluators = train._open_evaluators(config, run)
    workdir = pathlib.Path(workdir) / str(jax.process_index())
    workdir.mkdir()
    with train._open_metrics(config, workdir, 0) as metrics:
        for step in (1, 2):
            train._evaluate(evaluators, run, metrics, run.state, step)
            assert any_process(jax.process_index() == 1) == joined  # both are here
    print(jax.process_index())
"""


@pytest.mark.slow
def test_of_two_processes_the_first_evaluates_for_both(tmp_path):
    chosen = {f"evaluators__{name}": value for name, value in EVALUATORS.items()}
    rows = {}
    for joined in (False, True):
        workdir = tmp_path / str(joined)
        workdir.mkdir()
        arguments = json.dumps([{**chosen, "mesh__fsdp": 2 if joined else 1}, str(workdir), joined])
        if joined:
            assert sorted(text.split()[-1] for text in run_processes(PROGRAM, 2, 1, arguments)) == ["0", "1"]
            assert not (workdir / "1" / "metrics.jsonl").exists()
        else:
            run_program(PROGRAM, 1, arguments)
        rows[joined] = read_metrics(workdir / "0" / "metrics.jsonl")
    assert [row["step"] for row in rows[True]] == [1, 2]
    for one, two in zip(rows[False], rows[True], strict=True):
        names = [name for name in one if "seconds" not in name]
        assert {name: two[name] for name in names} == {name: one[name] for name in names}


@pytest.mark.slow
def test_two_processes_are_both_told_of_pictures_that_are_not_there(tmp_path):
    chosen = {"evaluators__every": 1, "evaluators__size": 32, "evaluators__paths": str(tmp_path / "nothing")}
    program = PROGRAM.replace(
        "    evaluators = train._open_evaluators(config, run)\n",
        "    from omnistream_jax.data.errors import DataError\n"
        "    try:\n"
        "        train._open_evaluators(config, run)\n"
        "    except DataError as error:\n"
        "        print('told', error)\n"
        "        sys.exit()\n",
    )
    outputs = run_processes(program, 2, 1, json.dumps([chosen, str(tmp_path), True]))
    assert all("nothing/train: there is no such folder" in text for text in outputs)
