"""Small data sets in the published layouts, tiny backbones, configurations and views for the tests of probes."""

from pathlib import Path

import numpy as np
from backbone_cases import random_model
from PIL import Image

from omnistream_jax import config as config_lib
from omnistream_jax.data.probes.clip_views import Sampling, TrainingView
from omnistream_jax.data.probes.rand_augment import RandAugment

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "evaluate_probes.py")
CLASSES = ("n01440764", "n01443537", "n01484850")
RAND_AUGMENT = RandAugment(magnitude=7.0, operations=4, deviation=0.5)


def sampling_of(segments: int = 2, frames: int = 16, stride: int = 4, window: str = "random") -> Sampling:
    """Which frames of a video are taken."""
    return Sampling(segments, frames, stride, window)


def view_of(size: int, **changes) -> TrainingView:
    """The training view that is the whole frame as it is, but for these fields."""
    nothing = {"rand_augment": None, "scale": (1.0, 1.0), "flip_probability": 0.0, "erase_probability": 0.0}
    return TrainingView(size, **{**nothing, **changes})


def write_images(root: Path, train: int = 8, val: int = 4, seed: int = 0) -> Path:
    """ImageNet's layout: noise whose colour tells its class, of many sizes."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = generator.integers(24, 60, 2)
                pixels = generator.integers(0, 120, (height, width, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}_{split}_{index}.JPEG", quality=95)
    return root


def write_backbone(folder: Path, seed: int = 0) -> Path:
    """A tiny random model with patches of 8 pixels."""
    random_model(seed, patch_size=8).save(folder)
    return folder


def imagenet_config(checkpoint: Path, data: Path, output: Path, /, **changes):
    """The recipe imagenet, made small; `changes` spell dotted names with "__"."""
    fields = {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "output": str(output),
        "allow_incomplete": True,
        "classes": len(CLASSES),
        "size": 16,
        "resize": 20,
        "batch": 8,
        "steps": 8,
        "learning_rates": (1e-2, 1.0, 10.0),
        "evaluate_batch": 8,
        "loader.workers": 0,
        "compilation_cache": "",
        "plots": False,
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return config_lib.load(f"{CONFIG}:imagenet", fields)
