"""Every number of every preset, typed from ../shared/EVAL_PROTOCOLS.md, sections 3 to 5, beside config and probe.

PROTOCOL is written apart from the package; what stands there in no section was read in the originals' source.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from backbone_cases import random_model
from dense_probe_cases import recipe, write_ade, write_nyu
from probe_cases import write_images
from protocol_formulas import ade20k_rate, imagenet_rate, nyuv2_beta1, nyuv2_rate, vjepa2_rate
from vos_cases import world_sequences, write_davis

from omnistream_jax import config as config_lib
from omnistream_jax import propagate
from omnistream_jax.evals.probes import action, ade20k, imagenet, nyuv2
from omnistream_jax.models.presets import BackboneConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

BACKBONE = BackboneConfig(width=64, depth=1, heads=2, mlp_width=64)
VOS_CONFIG = config_lib.__file__.replace("omnistream_jax/config.py", "configs/evaluate_vos.py")

IMAGENET = {  # 3a
    "learning_rates": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    "weight_decays": (0.0,),
    "learning_rate_batch": 256,
    "batch": 8 * 128,
    "steps": 10 * 1_250,
    "warmup_steps": 0,
    "momentum": 0.9,
    "features": "cls+mean",
    "size": 224,
    "resize": 256,
    "classes": 1_000,
}
NYUV2 = {  # 3b
    "weight_decays": (1e-4,),
    "learning_rate_batch": 0,
    "batch": 2 * 8,
    "steps": 38_400,
    "warmup_steps": 12_800,
    "start_divisor": 1_000.0,
    "end_divisor": 25_000.0,
    "beta1": (0.85, 0.95),
    "beta2": 0.99,
    "clip_norm": 35.0,
    "images_per_loss": 2,
    "variance_from": 100,
    "bins": 256,
    "min_depth": 0.001,
    "max_depth": 10.0,
    "crop": "eigen",
    "flip": True,
    "size": (480, 640),
    "augmentation.fixed_crop": (43, 45, 608, 472),
    "augmentation.rotation": 2.5,
    "augmentation.rotation_probability": 0.5,
    "augmentation.flip_probability": 0.5,
    "augmentation.crop": (416, 544),
    "augmentation.colour_probability": 0.5,
    "augmentation.gamma": (0.9, 1.1),
    "augmentation.gamma_scale": 255.0,
    "augmentation.brightness": (0.75, 1.25),
    "augmentation.colour": (0.9, 1.1),
}
ADE20K = {  # 3c
    "learning_rates": (1e-3,),
    "weight_decays": (1e-3,),
    "learning_rate_batch": 0,
    "batch": 16,
    "steps": 40_000,
    "warmup_steps": 1_500,
    "warmup_ratio": 1e-6,
    "schedule_lag": 1,
    "beta1": 0.9,
    "beta2": 0.999,
    "clip_norm": 0.0,
    "loss_mean": "all",
    "dropout": 0.1,
    "size": 512,
    "window": 512,
    "stride": 341,
    "best_evaluation": True,
    "compute_dtype": "float32",
    "evaluate_every": 5_000,
    "augmentation.short_side": 512,
    "augmentation.scale": (0.5, 2.0),
    "augmentation.crop": 512,
    "augmentation.category_ratio": 0.75,
    "augmentation.flip_probability": 0.5,
    "augmentation.distortion": True,
}
ACTION = {  # 4
    "learning_rates": (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
    "weight_decays": (0.01, 0.1, 0.4, 0.8),
    "learning_rate_batch": 0,
    "batch": 4 * 64,
    "warmup_steps": 0,
    "size": 256,
    "frames": 16,
    "stride": 4,
    "views": 3,
    "short_side": 0,
    "validation_window": "random",
    "best_evaluation": False,
    "features": "clip",
    "shuffle_frames": False,
    "probe_heads": 16,
    "probe_depth": 3 + 1,
    "rand_augment": "rand-m7-n4-mstd0.5-inc1",
    "crop_scale": (0.08, 1.0),
    "flip_probability": 0.0,
    "erase_probability": 0.25,
}
K400 = {"segments": 8, "classes": 400, "steps": 20 * math.ceil(246_534 / 256), "evaluate_every": 964}
SSV2 = {"segments": 2, "classes": 174, "steps": 20 * math.ceil(168_913 / 256), "evaluate_every": 660}

PROTOCOL = {
    ("imagenet", "paper"): IMAGENET,
    ("imagenet", "dinov3"): IMAGENET,
    ("nyuv2", "paper"): NYUV2 | {"learning_rates": (1e-3,)},
    ("nyuv2", "dinov3"): NYUV2 | {"learning_rates": (3e-4,)},
    ("ade20k", "paper"): ADE20K,
    ("ade20k", "dinov3"): ADE20K,
    ("k400", "paper"): ACTION | K400 | {"learning_rates": (1e-4, 3e-4)},
    ("k400", "vjepa2"): ACTION | K400,
    ("ssv2", "paper"): ACTION | SSV2 | {"learning_rates": (3e-4,)},
    ("ssv2", "vjepa2"): ACTION | SSV2,
}
OF_THE_JOB = {"learning_rate_batch", "evaluate_every", "compute_dtype"}  # what no probe holds

VOS = {  # 5; the paper leaves open all but 480 pixels and one stream
    "dino": {
        "features": "frame",
        "short_side": 480,
        "rounding": "down",
        "multiple": 64,
        "interpolation": "bilinear",
        "deviation": "dino",
        "context": 7,
        "radius": 12,
        "neighbourhood": "square",
        "top": 5,
        "temperature": 0.1,
        "upsampling": "bilinear",
        "flat_channel": "wins",
    },
    "dinov3": {
        "features": "frame",
        "short_side": 960,
        "rounding": "up",
        "multiple": 0,
        "interpolation": "bicubic",
        "deviation": "imagenet",
        "context": 7,
        "radius": 12,
        "neighbourhood": "circle",
        "top": 5,
        "temperature": 0.2,
        "upsampling": "nearest",
        "flat_channel": "loses",
    },
}
VOS["paper"] = VOS["dinov3"] | {"features": "stream", "short_side": 480}


def value_of(config, name):
    for part in name.split("."):
        config = config[part]
    return tuple(config) if isinstance(config, list) else config


@pytest.mark.parametrize(("name", "preset"), PROTOCOL)
def test_the_config_has_the_protocols_numbers(name, preset):
    config, protocol = recipe(name, preset=preset), PROTOCOL[name, preset]
    assert {field: value_of(config, field) for field in protocol} == protocol
    nested = [f"augmentation.{field}" for field in config.get("augmentation", ())]
    assert {*config.presets[preset], *nested} <= set(protocol)  # none is left unpinned


def test_there_is_a_protocol_of_every_preset_and_the_papers_is_the_first():
    for name in ("imagenet", "nyuv2", "ade20k", "k400", "ssv2"):
        config = recipe(name)
        assert config.preset == "paper"
        assert {(name, preset) for preset in config.presets} == {known for known in PROTOCOL if known[0] == name}


# What is made of them


def of_imagenet(probe):
    names = ("batch", "size", "resize")
    return {name: getattr(probe, name) for name in names} | {
        "steps": probe.schedule.steps,
        "warmup_steps": probe.schedule.warmup_steps,
        "momentum": probe.optimizer.momentum,
        "features": probe.feature_kind,
    }


def of_dense(probe):
    changes = dataclasses.asdict(probe.train.augmentation)
    return {f"augmentation.{name}": value for name, value in changes.items()} | {
        "batch": probe.train.global_batch_size,
        "steps": probe.schedule.steps,
        "warmup_steps": probe.schedule.warmup_steps,
        "beta2": probe.optimizer.beta2,
        "clip_norm": probe.optimizer.clip_norm,
    }


def of_nyuv2(probe):
    names = ("images_per_loss", "variance_from", "crop", "flip")
    named = {name: getattr(probe, name) for name in names}
    named |= {name: getattr(probe.head, name) for name in ("bins", "min_depth", "max_depth")}
    named |= {name: getattr(probe.schedule, name) for name in ("start_divisor", "end_divisor")}
    return of_dense(probe) | named | {"beta1": probe.optimizer.beta1.beta1, "size": probe.view.source.size}


def of_ade20k(probe):
    named = {name: getattr(probe, name) for name in ("window", "stride", "loss_mean", "best_evaluation")}
    named |= {"warmup_ratio": probe.schedule.warmup_ratio, "schedule_lag": probe.schedule.lag}
    named |= {"dropout": probe.head.dropout, "size": probe.view.short_side, "beta1": probe.optimizer.beta1}
    return of_dense(probe) | named


def of_action(probe):
    training, heldout, sampling = probe.train_data(), probe.validation(), probe.validation().sampling
    assert training.sampling == sampling
    assert (training.view.rand_augment.magnitude, training.view.rand_augment.operations) == (7.0, 4)
    assert training.view.rand_augment.deviation == 0.5
    assert training.view.size == heldout.views.size
    assert (probe.optimizer.beta1, probe.optimizer.beta2, probe.optimizer.clip_norm) == (0.9, 0.999, 0.0)
    assert not probe.frames_alone
    return {
        "batch": training.global_batch_size,
        "steps": probe.schedule.steps,
        "warmup_steps": probe.schedule.warmup_steps,
        **{name: getattr(sampling, name) for name in ("segments", "frames", "stride")},
        "validation_window": sampling.window,
        **{name: getattr(heldout.views, name) for name in ("size", "views", "short_side")},
        "best_evaluation": probe.best_evaluation,
        "shuffle_frames": training.shuffle_frames,
        "classes": probe.head.classes,
        "probe_heads": probe.head.heads,
        "probe_depth": probe.head.depth,
        "crop_scale": training.view.scale,
        **{name: getattr(training.view, name) for name in ("flip_probability", "erase_probability")},
    }


def write_lists(root):
    """Lists of videos, which nobody opens before the first step."""
    root.mkdir()
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("a.mp4 0\nb.mp4 1\n")
    return root


KINDS = {  # recipe -> its data, its module, what its probe holds, what is told beside
    "imagenet": (write_images, imagenet, of_imagenet, {"classes"}),
    "nyuv2": (write_nyu, nyuv2, of_nyuv2, set()),
    "ade20k": (write_ade, ade20k, of_ade20k, set()),
    "k400": (write_lists, action, of_action, {"features", "rand_augment"}),
    "ssv2": (write_lists, action, of_action, {"features", "rand_augment"}),
}


def built(tmp_path, name, preset="paper"):
    write, module, _, _ = KINDS[name]
    return module.build(recipe(name, preset=preset, data=str(write(tmp_path / "data"))), BACKBONE)


@pytest.mark.parametrize(("name", "preset"), PROTOCOL)
def test_the_probe_has_the_protocols_numbers(tmp_path, name, preset):
    protocol, (_, _, read, beside) = PROTOCOL[name, preset], KINDS[name]
    probe = built(tmp_path, name, preset)
    found = read(probe)
    assert found == {field: protocol[field] for field in found}
    assert set(protocol) - set(found) == OF_THE_JOB & set(protocol) | beside | {"learning_rates", "weight_decays"}
    scale = 4 if name == "imagenet" else 1  # the batch of 1,024 over 256
    pairs = {(scale * rate, decay) for rate in protocol["learning_rates"] for decay in protocol["weight_decays"]}
    assert set(zip(probe.heads.learning_rates, probe.heads.weight_decays, strict=True)) == pairs
    assert len(probe.heads) == len(pairs)


FORMULAS = {
    "imagenet": (imagenet_rate, 12_500, 0),
    "nyuv2": (nyuv2_rate, 38_400, 12_800),
    "ade20k": (ade20k_rate, 40_000, 1_500),
    "k400": (vjepa2_rate, 19_280, 0),
    "ssv2": (lambda step: vjepa2_rate(step, 13_200), 13_200, 0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_probes_learning_rate_is_the_protocols_formula(tmp_path, name):
    probe, (formula, steps, turn) = built(tmp_path, name), FORMULAS[name]
    places = [0, 1, 2, 7, turn // 2, turn, turn + 1, turn + 2, steps // 2, steps - 100, steps - 1]
    found = jax.jit(jax.vmap(probe.learning_rate_factor))(np.array(places))
    np.testing.assert_allclose(found, [formula(place) for place in places], rtol=2e-6, atol=2e-7)
    if name == "nyuv2":
        betas = [float(probe.optimizer.beta1(place)) for place in places]
        np.testing.assert_allclose(betas, [nyuv2_beta1(place) for place in places], rtol=1e-6)


# Video object segmentation


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """Directories of a model of patches of 16 pixels and of two sequences in DAVIS's layout."""
    root = tmp_path_factory.mktemp("vos")
    random_model(patch_size=16).save(root / "model")
    return {"checkpoint": str(root / "model"), "data": str(write_davis(root / "davis", world_sequences(2, 3, 64)))}


def test_the_paper_and_both_originals_have_a_preset_of_segmentation():
    config = config_lib.load(VOS_CONFIG)
    assert (config.preset, set(config.presets)) == ("paper", set(VOS))
    assert (config.window, config.time_unit, config.void) == (0, 0.0, "background")


@pytest.mark.parametrize("preset", VOS)
def test_the_segmenter_has_the_protocols_numbers(segmented, tmp_path, preset):
    fields = segmented | {"output": str(tmp_path / "out"), "allow_incomplete": True, "preset": preset}
    job = propagate.build(config_lib.load(VOS_CONFIG, fields))
    segmenter = job.segmenter
    found = {"features": segmenter.reader.features}
    found |= dataclasses.asdict(segmenter.rule) | dataclasses.asdict(segmenter.propagation)
    assert found == VOS[preset]
    assert {name: job.files.settings[name] for name in VOS[preset]} == VOS[preset]
    sizes = {"dino": (480, 832), "dinov3": (960, 1712), "paper": (480, 864)}  # of a frame of 854 x 480
    assert segmenter.rule.size(480, 854, 16) == sizes[preset]
