"""The engine of the probes: all heads at once, encoding in parts, batches, features in files, what is reported."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_frames, random_model

from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.probes.base import Heads
from omnistream_jax.evals.probes.engine import Trainer, batched, init_state, make_encode, read_share
from omnistream_jax.evals.probes.feature_cache import FeatureBatches, cached_arrays, files_digest
from omnistream_jax.evals.probes.imagenet import ImageProbe
from omnistream_jax.evals.probes.optimizers import Sgd
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.evals.probes.sweep_plots import plot_confusion, plot_sweep
from omnistream_jax.evals.probes.sweep_report import Report, best_of, from_json, sweep_table
from omnistream_jax.sharding import make_mesh

HEADS = Heads((0.5, 0.05, 2.0), (0.0, 0.01, 0.0))


@dataclasses.dataclass(frozen=True)
class Named:
    """A source that has classes alone."""

    classes: tuple[str, ...] = ("ball", "cube", "pillar")


def small_probe(heads=HEADS, steps=6):
    return ImageProbe(
        heads=heads,
        batch=8,
        schedule=Cosine(steps),
        optimizer=Sgd(0.9),
        feature_kind="cls+mean",
        train=Named(),
        heldout=Named(),
        size=16,
        resize=16,
        evaluate_batch=8,
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def train(trainer, batches, width):
    state = init_state(trainer.probe, jax.ShapeDtypeStruct((8, width), jnp.float32), 0, trainer.mesh)
    first, losses = jax.device_get(state.variables), []
    for features, labels in batches:
        state, loss = trainer.step_on_features(state, features, {"label": labels})
        losses.append(np.asarray(loss))
    return first, state, np.array(losses)


def random_batches(count, width, seed=0):
    generator = np.random.default_rng(seed)
    return [
        (generator.normal(size=(8, width)).astype(np.float32), generator.integers(0, 3, 8).astype(np.int32))
        for _ in range(count)
    ]


def test_all_heads_at_once_are_what_softmax_regression_makes_of_each(mesh):
    """Beside NumPy in float64: loss, gradient, momentum, decay and the schedule, head by head."""
    batches = random_batches(6, 5)
    first, state, losses = train(Trainer(small_probe(), 0, mesh), batches, 5)
    last = jax.device_get(state.variables)
    for head, (rate, decay) in enumerate(zip(HEADS.learning_rates, HEADS.weight_decays, strict=True)):
        kernel = np.float64(first["params"]["linear"]["kernel"][head])
        bias = np.float64(first["params"]["linear"]["bias"][head])
        assert 0.004 < kernel.std() < 0.02
        assert not bias.any()
        sums = [0.0, 0.0]
        for step, (features, labels) in enumerate(batches):
            logits = features @ kernel + bias
            shares = np.exp(logits - logits.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            assert losses[step, head] == pytest.approx(-np.log(shares[np.arange(8), labels]).mean(), rel=2e-5)
            error = (shares - np.eye(3)[labels]) / 8
            gradients = [features.T @ error + decay * kernel, error.sum(0) + decay * bias]
            sums = [0.9 * total + gradient for total, gradient in zip(sums, gradients, strict=True)]
            now = rate * (1 + np.cos(np.pi * step / 6)) / 2
            kernel, bias = kernel - now * sums[0], bias - now * sums[1]
        np.testing.assert_allclose(last["params"]["linear"]["kernel"][head], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(last["params"]["linear"]["bias"][head], bias, rtol=1e-4, atol=1e-6)
    starts = first["params"]["linear"]["kernel"]
    assert not np.array_equal(starts[0], starts[1])


def test_fewer_heads_at_once_change_nothing(mesh):
    batches = random_batches(3, 5)
    _, whole, losses = train(Trainer(small_probe(), 0, mesh), batches, 5)
    _, parts, other = train(Trainer(small_probe(), 0, mesh, heads_at_once=2), batches, 5)
    np.testing.assert_allclose(losses, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, parts)


def test_training_sees_the_backbone_but_never_changes_it(mesh):
    model = random_model(patch_size=8)
    probe = small_probe()
    trainer = Trainer(probe, 0, mesh)
    frames = random_frames(8, 1, 16, 16)
    labels = np.arange(8, dtype=np.int32) % 3
    with jax.set_mesh(mesh):
        encode = make_encode(model, mesh)
        shapes = trainer.feature_shapes(encode, frames)
        assert shapes.shape == (8, 64)
        one = init_state(probe, shapes, 0, mesh)
        two = init_state(probe, shapes, 0, mesh)
        one, loss = trainer.step(encode, one, {"frames": frames, "label": labels})
        out = model.encode(frames)
        features = np.concatenate([out.cls[:, 0], np.asarray(out.patches)[:, 0].reshape(8, 4, 32).mean(1)], axis=-1)
        two, other = trainer.step_on_features(two, features, {"label": labels})
    np.testing.assert_allclose(loss, other, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, two)


@pytest.mark.parametrize("clips", [1, 2, 4, 5, 100])
def test_encoding_in_parts_changes_nothing(mesh, clips):
    model, frames = random_model(patch_size=8), random_frames(6, 2, 16, 16)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda encode, frames: encode(frames))(make_encode(model, mesh, clips=clips), frames)
    expected = model.encode(frames, layers=())
    assert out.hidden == ()
    for name in ("patches", "cls", "registers"):
        np.testing.assert_allclose(getattr(out, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_encoding_takes_the_time_unit(mesh):
    model, frames = random_model(patch_size=8, rope="dinov3"), random_frames(2, 3, 16, 16)
    with jax.set_mesh(mesh):
        cls = make_encode(model, mesh, time_unit=3.0)(frames).cls
    np.testing.assert_allclose(cls, model.encode(frames, time_unit=3.0).cls, rtol=1e-4, atol=1e-5)
    assert np.abs(cls - model.encode(frames).cls).max() > 1e-3


# Samples


@dataclasses.dataclass(frozen=True)
class Numbers:
    count: int
    bad: int | None = None

    def __len__(self):
        return self.count

    def sample(self, index):
        if index == self.bad:
            raise DataError("number.JPEG: expected a whole image file")
        return {"frames": np.full((1, 2, 2, 3), index, np.uint8), "label": np.int32(index)}


def test_samples_come_in_order_in_batches_that_are_filled_up():
    seen = []
    for batch, real in batched(read_share(Numbers(7), 2), 3):
        assert batch["frames"].shape == (3, 1, 2, 2, 3)
        assert real.shape == (3,)
        seen += np.asarray(batch["label"])[real].tolist()
    assert seen == list(range(7))
    assert real.tolist() == [True, False, False]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_broken_sample_is_told_by_its_file(threads):
    with pytest.raises(DataError, match=r"number\.JPEG"):
        list(read_share(Numbers(5, bad=3), threads))


# Features in files


def test_features_are_made_once(tmp_path):
    path, calls, said = tmp_path / "features" / "train.safetensors", [], []

    def compute():
        calls.append(1)
        return {"features/0": np.arange(6, dtype=np.float32).reshape(3, 2), "targets/label": np.arange(3)}

    first = cached_arrays(path, {"model": "a"}, compute, said.append)
    again = cached_arrays(path, {"model": "a"}, compute, said.append)
    assert len(calls) == 1
    assert sorted(first) == sorted(again)
    for name, array in again.items():
        np.testing.assert_array_equal(array, first[name])
        assert array.dtype == first[name].dtype
    cached_arrays(path, {"model": "b"}, compute, said.append)
    assert len(calls) == 2
    assert "another model" in said[-1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    cached_arrays(path, {"model": "b"}, compute, said.append)
    assert len(calls) == 3
    assert "damaged" in said[-1]
    path.write_bytes(path.read_bytes()[:-7])
    cached_arrays(path, {"model": "b"}, compute, said.append)
    assert len(calls) == 4
    assert "no whole file" in said[-1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_features_are_of_the_files_that_are_there(tmp_path):
    class Files:
        def __len__(self):
            return 3

        def describe(self, index):
            return str(tmp_path / f"{index}.png") if index else "scene 0"

    for name in "123":
        (tmp_path / f"{name}.png").write_bytes(b"abc")
    before = files_digest(Files())
    assert files_digest(Files()) == before
    (tmp_path / "2.png").write_bytes(b"abcd")
    replaced = files_digest(Files())
    (tmp_path / "2.png").unlink()
    assert len({before, replaced, files_digest(Files())}) == 3


def test_batches_of_features_are_passes_in_new_orders():
    batches = FeatureBatches({"x": np.arange(10)}, 4, seed=3)
    rows = np.concatenate([batches.batch(step)["x"] for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    np.testing.assert_array_equal(FeatureBatches({"x": np.arange(10)}, 4, seed=3).batch(3)["x"], rows[12:16])
    assert FeatureBatches({"x": np.arange(10)}, 4, seed=4).batch(0)["x"].tolist() != rows[:4].tolist()
    assert len(FeatureBatches({"x": np.arange(3)}, 8, seed=0).batch(2)["x"]) == 8
    with pytest.raises(ValueError, match="same number of rows"):
        FeatureBatches({"x": np.arange(3), "y": np.arange(4)}, 2, seed=0)


# What is reported


def test_the_best_head_is_the_first_of_the_best_and_never_a_nan():
    rows = [{"top1": 0.2}, {"top1": float("nan")}, {"top1": 0.7}, {"top1": 0.7}]
    assert best_of(rows, "top1", True) == 2
    assert best_of(rows, "top1", False) == 0
    assert best_of([{"rmse": float("nan")}], "rmse", False) == 0


@pytest.mark.parametrize(("best_evaluation", "step", "value"), [(False, 30, 0.5), (True, 20, 0.8)])
def test_the_last_or_the_best_evaluation_is_reported(best_evaluation, step, value):
    report, heads = Report("miou", True, best_evaluation), Heads((0.1, 0.2), (0.0, 0.0))
    for at, scores in ((10, (0.1, 0.3)), (20, (0.8, 0.2)), (30, (0.4, 0.5))):
        report.add(at, [{"miou": score} for score in scores])
    assert (report.step, report.scores[report.best]["miou"]) == (step, value)
    assert report.content(heads)["best"]["miou"] == value
    assert f"miou {value:.4f} after {step} steps" in sweep_table(heads, report, "miou")


def test_a_score_that_is_no_number_is_null_in_json():
    report = Report("rmse", False, False)
    report.add(5, [{"rmse": float("nan")}, {"rmse": 0.5}])
    content = report.content(Heads((0.1, 0.2), (0.0, 0.0)))
    assert json.loads(json.dumps(content, allow_nan=False))["heads"][0]["rmse"] is None
    assert content["best"]["head"] == 1
    stored = json.loads(json.dumps(report.rows(), allow_nan=False))
    assert stored == [{"step": 5, "scores": [{"rmse": None}, {"rmse": 0.5}]}]
    again = Report("rmse", False, False)
    again.add(5, from_json(stored[0]["scores"]))
    assert (again.best, again.content(Heads((0.1, 0.2), (0.0, 0.0)))) == (1, content)


def test_plots_are_pictures(tmp_path):
    rows = [{"top1": value} for value in (0.1, 0.4, 0.3)]
    plot_sweep(Heads((1e-3, 1e-2, 1e-1), (0.0, 0.0, 0.0)), rows, "top1", 1, tmp_path / "sweep.png")
    plot_confusion(np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0]]), ("a", "b", "c"), tmp_path / "confusion.png")
    plot_confusion(np.eye(60, dtype=int), [str(i) for i in range(60)], tmp_path / "many.png")
    for path in (tmp_path / "sweep.png", tmp_path / "confusion.png", tmp_path / "many.png"):
        assert Path(path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
