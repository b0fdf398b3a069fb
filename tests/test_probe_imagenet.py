"""Linear classification as a whole: accuracy, files, resuming, refusals, devices."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_model
from mesh_cases import run_program
from probe_cases import CLASSES, CONFIG, imagenet_config, write_backbone, write_images
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from omnistream_jax import config as config_lib
from omnistream_jax import probe as probe_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.probes import imagenet
from omnistream_jax.evals.probes.base import Heads
from omnistream_jax.evals.probes.engine import Trainer
from omnistream_jax.evals.probes.imagenet import ImageProbe
from omnistream_jax.evals.probes.optimizers import Sgd
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.models.backbone import BackboneOutput
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.utils.lock import WorkdirLock, WorkdirLockedError
from omnistream_jax.utils.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


# The score


@dataclasses.dataclass(frozen=True)
class Named:
    classes: tuple[str, ...]


def scored(classes, heads, evaluate_batch=16):
    return ImageProbe(
        heads=Heads((0.1,) * heads, (0.0,) * heads),
        batch=8,
        schedule=Cosine(1),
        optimizer=Sgd(0.9),
        feature_kind="cls",
        train=Named(tuple(map(str, range(classes)))),
        heldout=Named(tuple(map(str, range(classes)))),
        size=1,
        resize=1,
        evaluate_batch=evaluate_batch,
    )


def samples_of(labels, shown):
    """Frames of one pixel whose colour is the number `shown`."""
    for label, number in zip(labels, shown, strict=True):
        yield {"frames": np.full((1, 1, 1, 3), number, np.uint8), "label": np.int32(label)}


def encode_as_table(table):
    """A backbone whose CLS token is the row of a table that the colour names."""

    def encode(rows, frames):
        cls = rows[frames[:, 0, 0, 0, 0]][:, None]
        return BackboneOutput(jnp.zeros((*cls.shape[:2], 1, 1, cls.shape[-1])), cls, None, None, ())

    return jax.tree_util.Partial(encode, jnp.asarray(table, jnp.float32))


def linear(kernels):
    kernels = jnp.asarray(kernels, jnp.float32)
    return {"params": {"linear": {"kernel": kernels, "bias": jnp.zeros((len(kernels), kernels.shape[-1]))}}}


def test_accuracy_equals_scikit_learns():
    """Of random heads on 75 pictures, more than one batch and no whole number of them."""
    generator = np.random.default_rng(0)
    labels, table = generator.integers(0, 7, 75), generator.normal(size=(75, 6))
    kernels = generator.normal(size=(3, 6, 7))
    kernels[1] = np.linalg.pinv(table) @ np.eye(7)[labels]  # one head that knows something
    found = scored(7, 3).evaluate(encode_as_table(table), linear(kernels), samples_of(labels, range(75)))
    for row, kernel in zip(found.scores, kernels, strict=True):
        logits = (table.astype(np.float32) @ kernel.astype(np.float32)).astype(np.float64)
        assert row["top1"] == pytest.approx(accuracy_score(labels, logits.argmax(1)), abs=1e-12)
        assert row["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(7)), abs=1e-12)
    assert found.scores[1]["top1"] > found.scores[0]["top1"] + 0.1


def test_a_perfect_head_scores_1_and_permuted_ones_chance():
    labels = np.repeat(np.arange(10), 200)
    permuted = np.random.default_rng(0).permutation(labels)
    probe, eye = scored(10, 2, 500), np.eye(10)
    kernels = linear([eye, np.roll(eye, 1, axis=1)])
    perfect = probe.evaluate(encode_as_table(eye), kernels, samples_of(labels, labels))
    assert [row["top1"] for row in perfect.scores] == [1.0, 0.0]
    assert perfect.scores[0]["top5"] == 1.0
    chance = probe.evaluate(encode_as_table(eye), kernels, samples_of(labels, permuted))
    assert chance.scores[0]["top1"] == pytest.approx(0.1, abs=0.02)


def test_top5_is_left_out_where_there_are_no_more_classes():
    found = scored(4, 1).evaluate(encode_as_table(np.eye(4)), linear([np.eye(4)]), samples_of(range(4), range(4)))
    assert found.scores == [{"top1": 1.0}]


@pytest.mark.parametrize(("kind", "width"), [("cls+mean", 64), ("cls", 32), ("mean", 32)])
def test_features_are_the_cls_token_and_the_mean_of_the_patches(kind, width):
    model = random_model(patch_size=8)
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 24, 3)).astype(np.uint8)
    probe = dataclasses.replace(scored(3, 1), feature_kind=kind)
    out = model.encode(frames)
    parts = {"cls": np.asarray(out.cls)[:, 0], "mean": np.asarray(out.patches)[:, 0].reshape(2, 6, 32).mean(1)}
    expected = np.concatenate([parts[name] for name in kind.split("+")], axis=1)
    features = probe.features(model.encode, frames)
    assert features.shape == (2, width)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


# The job


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    """The output of a whole run through the command line, and what it said."""
    output = tmp_path_factory.mktemp("probe")
    fields = {
        "checkpoint": checkpoint,
        "data": data,
        "output": output,
        "allow_incomplete": True,
        "classes": 3,
        "size": 16,
        "resize": 20,
        "batch": 8,
        "steps": 8,
        "learning_rates": "(1e-2,1.0,10.0)",
        "evaluate_every": 4,
        "evaluate_batch": 8,
        "loader.workers": 0,
        "compilation_cache": "",
    }
    command = [sys.executable, "-m", "omnistream_jax.main", f"--config={CONFIG}:imagenet"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return output, result.stdout


def test_the_job_says_what_it_found_beside_the_paper(finished):
    output, said = finished
    content = json.loads((output / "probe.json").read_text())
    assert f"top1 {content['best']['top1']:.4f} after 8 steps" in said
    assert "imagenet: incomplete, not to be compared with published numbers" in said
    assert "84.7" not in said
    assert str(output / "probe.json") in said


@pytest.mark.parametrize("allowed", [True, False])
def test_the_papers_figure_stands_beside_complete_data_whatever_is_allowed(
    checkpoint, data, tmp_path, monkeypatch, capsys, allowed
):
    monkeypatch.setattr(imagenet, "IMAGENET_COUNTS", {"train": 24, "val": 12})
    config = imagenet_config(checkpoint, data, tmp_path, allow_incomplete=allowed, augment=False, steps=1)
    assert probe_lib.probe(config) == 0
    said, content = capsys.readouterr().out, json.loads((tmp_path / "probe.json").read_text())
    assert "84.7" in said
    assert "OmniStream" in said
    assert "incomplete" not in said
    assert [content["data"][split]["complete"] for split in ("train", "validation")] == [True, True]
    assert "84.7" in [figure["printed"] for figure in content["published"]]


def test_the_json_has_settings_counts_heads_and_versions(finished):
    output, _ = finished
    content = json.loads((output / "probe.json").read_text())
    assert content["data"]["validation"]["images"] == 12
    assert content["data"]["train"]["images"] == 24
    assert [head["learning_rate"] for head in content["heads"]] == [1e-2 / 32, 1 / 32, 10 / 32]
    assert content["best"]["top1"] == max(head["top1"] for head in content["heads"])
    assert content["settings"]["momentum"] == 0.9
    assert content["config"]["steps"] == 8
    assert content["settings"]["preset"] == "paper"
    assert len(content["settings"]["model"]) == 64
    assert content["versions"]["jax"] == jax.__version__
    assert content["published"] is None
    assert not content["data"]["train"]["complete"]
    assert content["data"]["validation"]["expected_images"] == 50_000
    evaluations = json.loads((output / "evaluations.json").read_text())["evaluations"]
    assert [row["step"] for row in evaluations] == [4, 8]
    assert {path.name for path in (output / "plots").iterdir()} == {"learning_rates.png", "confusion.png"}
    losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def heads_after(monkeypatch, config):
    """All variables that were evaluated last."""
    seen = []

    def evaluate(self, encode, variables, samples):
        seen.append(jax.device_get(variables))
        return real(self, encode, variables, samples)

    real = ImageProbe.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(ImageProbe, "evaluate", evaluate)
        assert probe_lib.probe(config) == 0
    return seen


@pytest.mark.parametrize("augment", [True, False])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(monkeypatch, checkpoint, data, tmp_path, capsys, augment):
    def config(name):
        return imagenet_config(
            checkpoint, data, tmp_path / name, checkpoint_every=2, evaluate_every=4, log_every=1, augment=augment
        )

    whole = heads_after(monkeypatch, config("whole"))
    step, count = "step" if augment else "step_on_features", [0]
    run = getattr(Trainer, step).func

    def stopping(self):
        inner = run(self)

        def counted(*arguments):
            count[0] += 1
            if count[0] == 6:
                raise KeyboardInterrupt
            return inner(*arguments)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, step, property(stopping))
        with pytest.raises(probe_lib.ProbeError, match="stopped; the same command goes on"):
            probe_lib.probe(config("stopped"))
    assert not (tmp_path / "stopped" / "probe.json").exists()
    capsys.readouterr()
    stopped = heads_after(monkeypatch, config("stopped"))
    assert "going on from step 4" in capsys.readouterr().out
    assert (len(whole), len(stopped)) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, stopped[-1], whole[-1])
    one, two = (json.loads((tmp_path / name / "probe.json").read_text()) for name in ("whole", "stopped"))
    assert one["heads"] == two["heads"]
    assert one["best"] == two["best"]
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 8
    assert (tmp_path / "whole" / "features").exists() != augment
    assert heads_after(monkeypatch, config("stopped")) == []  # all is done


def test_an_evaluation_that_was_stopped_is_done_again(monkeypatch, checkpoint, data, tmp_path):
    config = imagenet_config(checkpoint, data, tmp_path / "out", augment=False)

    def killed(self, encode, variables, samples):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImageProbe, "evaluate", killed)
        with pytest.raises(probe_lib.ProbeError, match="stopped"):
            probe_lib.probe(config)
    assert len(heads_after(monkeypatch, config)) == 1
    assert (tmp_path / "out" / "probe.json").exists()


def test_what_was_made_of_other_settings_or_is_in_use_is_refused(checkpoint, data, tmp_path):
    output = tmp_path / "out"
    config = imagenet_config(checkpoint, data, output, augment=False, steps=2)
    with WorkdirLock(output), pytest.raises(WorkdirLockedError):
        probe_lib.probe(config)
    probe_lib.probe(config)
    with pytest.raises(ConfigError, match=r"output: .* holds results of other settings.*\n  momentum: 0.9 -> 0.5"):
        probe_lib.probe(imagenet_config(checkpoint, data, output, augment=False, steps=2, momentum=0.5))
    (output / "evaluations.json").write_text("{")
    with pytest.raises(probe_lib.ProbeError, match=r"evaluations\.json cannot be read"):
        probe_lib.probe(config)


def test_a_broken_picture_is_told_by_its_file(checkpoint, tmp_path):
    root = write_images(tmp_path / "images", train=4, val=2)
    broken = root / "val" / CLASSES[1] / f"{CLASSES[1]}_val_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=broken.name):
        probe_lib.probe(imagenet_config(checkpoint, root, tmp_path / "out", augment=False, steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "checkpoint: expected a directory, got none"),
        ({"output": ""}, "output: expected a directory"),
        ({"data": ""}, "data: expected a directory"),
        ({"data": "embedded"}, "data: the embedded world is the recipe world_objects's"),
        ({"probe": "cifar"}, "probe: expected one of imagenet, .*, got 'cifar'"),
        ({"probe": "nyuv2"}, r"probe: this config is no config of probe nyuv2 \(it has no field crop, .* more\)"),
        ({"preset": "vjepa2"}, "preset: expected dinov3, paper, got 'vjepa2'"),
        ({"benchmark": "cifar"}, "benchmark: expected one of .*, got 'cifar'"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"seed": -1}, r"^seed: expected 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "^seed: expected 0 to .*, got 4294967296"),
        ({"time_unit": math.nan}, "time_unit: expected 0 or more, got nan"),
        ({"loader__workers": -1}, "loader.workers: expected 0 or more, got -1"),
        ({"loader__prefetch": 0, "loader__workers": 1}, "loader.prefetch: expected 1 or more with loader.workers"),
        ({"loader__max_failed_fraction": 1.5}, "loader.max_failed_fraction: expected a share, 0 to 1, got 1.5"),
        ({"loader__max_restarts": -1}, "loader.max_restarts: expected 0 or more, got -1"),
        ({"encode_batch": -1}, "encode_batch: expected 0 or more"),
        ({"evaluate_batch": 0}, "evaluate_batch: expected 1 or more"),
        ({"learning_rates": ()}, "learning_rates: expected numbers, one or more"),
        ({"learning_rates": ("a",)}, "learning_rates: expected numbers"),
        ({"weight_decays": (-1.0,)}, "weight_decays: expected 0 or more"),
        ({"warmup_steps": 9}, "warmup_steps: expected 0 to 8"),
        ({"momentum": 1.5}, "momentum: expected 0 to 1"),
        ({"features": "patches"}, r"features: expected one of cls\+mean"),
        ({"size": 12}, "size: expected a multiple of the patch, 8 pixels, got 12"),
        ({"resize": 8}, r"resize: expected size \(16\) or more, got 8"),
        ({"mesh__data": 3}, "mesh.data: .*devices"),
        ({"compute_dtype": "int4"}, "^compute_dtype: expected one of auto, float32, .*, got 'int4'"),
    ],
)
def test_fields_that_cannot_work_are_told_by_name(checkpoint, data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        probe_lib.build(imagenet_config(checkpoint, data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("world_objects", {"scenes": 0}, "scenes: 0, expected 1 or more"),
        ("world_objects", {"allow_incomplete": True}, "allow_incomplete: nothing of the embedded world can be missing"),
        ("world_objects", {"world_seed": -1}, "^world_seed: expected 0 to"),
        ("world_motion", {"validation_seed": -1}, "^validation_seed: expected 0 to"),
        ("world_objects", {"data": "/d"}, "data: this recipe is the embedded world's; for a directory use :imagenet"),
        ("world_depth", {"data": "/d"}, "data: this recipe is the embedded world's; for a directory use :nyuv2"),
        ("world_motion", {"data": "/d"}, "data: this recipe is .*; for a directory use :k400 or :ssv2"),
        ("world_objects", {"benchmark": "imagenet"}, "benchmark: expected '', for nobody published the world's"),
        ("world_depth", {"augmentation.rotation": -1.0}, "augmentation.rotation: -1.0, expected degrees"),
    ],
)
def test_fields_of_the_embedded_world_are_told_as_such(checkpoint, tmp_path, recipe, changes, message):
    fields = {"checkpoint": str(checkpoint), "output": str(tmp_path / "out"), "plots": False} | changes
    with pytest.raises(ConfigError, match=message):
        probe_lib.build(config_lib.load(f"{CONFIG}:{recipe}", fields))


def test_a_model_or_data_that_are_not_there_are_told(checkpoint, data, tmp_path):
    with pytest.raises(WeightsError, match="nowhere"):
        probe_lib.build(imagenet_config(tmp_path / "nowhere", data, tmp_path / "out"))
    with pytest.raises(DataError, match=r"train: 24 images of 3 classes, expected 1,281,167 images of 3 classes"):
        probe_lib.build(imagenet_config(checkpoint, data, tmp_path / "out", allow_incomplete=False))


def test_presets_fill_what_the_config_leaves_open():
    config = probe_lib.with_preset(config_lib.load(f"{CONFIG}:imagenet", {"preset": "dinov3", "steps": 5}))
    assert (config.steps, config.batch) == (5, 1024)


RECIPES = ("imagenet", "nyuv2", "ade20k", "k400", "ssv2", "world_objects", "world_depth", "world_motion")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_whole(recipe):
    config = config_lib.load(f"{CONFIG}:{recipe}")
    for preset in tuple(config.presets) or ("",):
        with config.unlocked():
            config.preset = preset
        filled = probe_lib.with_preset(config)
        config_lib.to_plain(filled)
        assert set(probe_lib.PROTOCOLS[filled.probe].FIELDS) <= set(filled)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_protocol_of_another_recipe_is_refused(recipe):
    given = {"checkpoint": "/model", "output": "/out", "data": "/data"}
    for other in set(probe_lib.PROTOCOLS) - {config_lib.load(f"{CONFIG}:{recipe}").probe}:
        with pytest.raises(ConfigError, match=f"^probe: this config is no config of probe {other} "):
            probe_lib.build(config_lib.load(f"{CONFIG}:{recipe}", {**given, "probe": other}))


@pytest.mark.parametrize("recipe", ["world_objects", "world_depth", "world_motion"])
def test_the_worlds_scenes_are_of_its_own_seed(recipe):
    def scenes(**fields):
        config = probe_lib.with_preset(config_lib.load(f"{CONFIG}:{recipe}", fields))
        protocol = probe_lib.PROTOCOLS[config.probe].build(
            config, BackboneConfig(width=32, depth=1, heads=2, mlp_width=64, patch_size=8)
        )
        return protocol.train_settings(), protocol.validation().settings()

    assert scenes(seed=1) == scenes()
    assert not any(one == other for one, other in zip(scenes(world_seed=1), scenes(), strict=True))


def test_things_of_the_embedded_world(checkpoint, tmp_path):
    fields = {"checkpoint": str(checkpoint), "output": str(tmp_path / "out"), "scenes": 12, "heldout_scenes": 8}
    fields |= {"steps": 3, "batch": 8, "compilation_cache": "", "plots": False}
    assert probe_lib.probe(config_lib.load(f"{CONFIG}:world_objects", fields)) == 0
    content = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert content["data"]["train"]["images"] == 12
    assert content["data"]["validation"]["split"] == "heldout"
    assert len(content["heads"]) == 13
    assert content["published"] is None


PROGRAM = """
import mesh_cases, sys, json
mesh_cases.compile_quickly()
import jax
from pathlib import Path
import numpy as np
from probe_cases import imagenet_config
from omnistream_jax import probe, sharding
from omnistream_jax.evals.probes.imagenet import ImageProbe
sharding.SMALLEST_SPLIT = 128
real = ImageProbe.evaluate
def evaluate(self, encode, variables, samples):
    kernel = np.asarray(variables["params"]["linear"]["kernel"])
    print(json.dumps({"kernel": kernel[:, ::8].tolist()}))
    return real(self, encode, variables, samples)
ImageProbe.evaluate = evaluate
checkpoint, data, output, fsdp, augment = sys.argv[1:]
config = imagenet_config(Path(checkpoint), Path(data), Path(output), mesh__fsdp=int(fsdp), encode_batch=4,
                         augment=augment == "True", steps=4)
probe.probe(config)
"""


@pytest.mark.parametrize(
    ("augment", "fsdp"),
    [(True, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 2), (False, 1), (False, 2)))],
)
def test_two_devices_are_one(checkpoint, data, tmp_path, augment, fsdp):
    """Batches are split over both; with fsdp the backbone is, too."""
    results = []
    for devices, share in ((1, 1), (2, fsdp)):
        output = tmp_path / str(devices)
        said = run_program(PROGRAM, devices, str(checkpoint), str(data), str(output), str(share), str(augment))
        kernel = json.loads(next(line for line in said.splitlines() if line.startswith('{"kernel"')))["kernel"]
        results.append((np.array(kernel), json.loads((output / "probe.json").read_text())))
    (kernel, content), (other, more) = results
    np.testing.assert_allclose(other, kernel, rtol=1e-3, atol=1e-5)
    for head, same in zip(content["heads"], more["heads"], strict=True):
        assert head["top1"] == pytest.approx(same["top1"], abs=1e-9)
    assert more["device"].startswith("2 x")
