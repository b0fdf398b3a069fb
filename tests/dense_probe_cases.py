"""Small data sets in the layouts of NYU Depth v2 and ADE20K, an encoder that sees every pixel, augmentations."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from omnistream_jax.config import load
from omnistream_jax.data.probes.ade20k import AdeAugmentation
from omnistream_jax.data.probes.depth import DepthAugmentation
from omnistream_jax.ops.images import IMAGENET_MEAN, IMAGENET_STD
from omnistream_jax.probe import with_preset

RECIPES = f"{Path(__file__).parents[1]}/configs/evaluate_probes.py:"
PIXELS = SimpleNamespace(patch_size=1)
"""The part of a backbone's config that probes read, of `see_pixels`."""


@jax.tree_util.Partial
def see_pixels(frames):
    """An `Encode` whose patches are pixels: their values, 0 to 255, [N, T, H, W, 3]."""
    return SimpleNamespace(patches=(frames * IMAGENET_STD + IMAGENET_MEAN) * 255)


def write_nyu(root: Path, counts=(4, 3), size=(48, 64), seed=0) -> Path:
    """Pictures whose red is their depth in steps of 40 mm; a lower part of the depth is not known."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for name, count in zip(("train", "test"), counts, strict=True):
        lines = []
        for number in range(count):
            scene = root / f"kitchen_{name}"
            scene.mkdir(exist_ok=True)
            red = smooth(generator, size)
            picture = np.stack([red, np.full(size, 90), np.full(size, 200 - 20 * number)], -1).astype(np.uint8)
            depth = red.astype(np.uint16) * 40
            depth[-size[0] // 8 :, : size[1] // 4] = 0
            save_whole(picture, scene / f"rgb_{number:05d}.jpg")
            Image.fromarray(depth).save(scene / f"sync_depth_{number:05d}.png")
            slash = "/" if name == "train" else ""
            paths = (
                f"{slash}{scene.name}/{file}" for file in (f"rgb_{number:05d}.jpg", f"sync_depth_{number:05d}.png")
            )
            lines.append(f"{' '.join(paths)} 518.8579")
        (root / f"nyu_{name}.txt").write_text("\n".join(reversed(lines)) + "\n")
    return root


def smooth(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A slanted plane, 30 to 230."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    a, b = generator.uniform(-50, 50, 2)
    return np.rint(130 + a * rows + b * columns)


def save_whole(picture: np.ndarray, path: Path) -> None:
    """Without loss, whatever the name says: readers go by the content."""
    Image.fromarray(picture).save(path, format="PNG")


COLOURS = np.stack(np.unravel_index(np.arange(150), (6, 5, 5)), -1) * (50, 60, 60)
"""[150, 3], 0 to 255: the colour in which class k is painted."""


def write_ade(root: Path, counts=(4, 3), sizes=((32, 32), (32, 51), (45, 32)), classes=6, lists=True, seed=0) -> Path:
    """Pictures of blocks in the colours of their classes; a corner is not labelled."""
    generator = np.random.default_rng(seed)
    for name, folder, count in zip(("train", "val"), ("training", "validation"), counts, strict=True):
        for kind in ("images", "annotations"):
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
        names = []
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            blocks = generator.integers(0, classes, (-(-height // 8), -(-width // 8)))
            labels = np.kron(blocks, np.ones((8, 8), int))[:height, :width]
            save_whole(COLOURS[labels].astype(np.uint8), root / f"images/{folder}/ADE_{name}_{number:08d}.jpg")
            stored = (labels + 1).astype(np.uint8)
            stored[:4, :4] = 0
            Image.fromarray(stored).save(root / f"annotations/{folder}/ADE_{name}_{number:08d}.png")
            names.append(f"{folder}/ADE_{name}_{number:08d}.jpg")
        if lists:
            (root / f"ADE20K_object150_{name}.txt").write_text("\n".join(reversed(names)) + "\n")
    return root


def colour_head() -> dict:
    """The segmentation head that finds the class of the nearest of COLOURS."""
    scale = 1 / 128  # 2 c . c_k - |c_k|^2 is largest for the nearest c_k
    colours = COLOURS * scale
    linear = {
        "kernel": jnp.asarray(2 * colours.T * scale, jnp.float32),
        "bias": -jnp.asarray((colours**2).sum(1), jnp.float32),
    }
    return stacked({"linear": linear}, 3)


def stacked(params: dict, width: int) -> dict:
    """One head, with a batch norm that changes nothing but by its epsilon, as all heads."""
    norm = {"scale": jnp.full(width, np.sqrt(1 + 1e-5)), "bias": jnp.zeros(width)}
    statistics = {"mean": jnp.zeros(width), "variance": jnp.ones(width)}
    one = {"params": {**params, "norm": norm}, "batch_stats": {"norm": statistics}}
    return jax.tree.map(lambda leaf: leaf[None], one)


def depth_augmentation(**changes) -> DepthAugmentation:
    """The one that changes nothing, but for these fields."""
    nothing = dict.fromkeys(("rotation_probability", "flip_probability", "colour_probability"), 0.0)
    ranges = {"rotation": 2.5, "gamma": (0.9, 1.1), "brightness": (0.75, 1.25), "colour": (0.9, 1.1)}
    return DepthAugmentation(**{"fixed_crop": (), "crop": (), "gamma_scale": 255.0, **nothing, **ranges, **changes})


def ade_augmentation(**changes) -> AdeAugmentation:
    """The one that changes nothing of a picture of 32 x 32 pixels, but for these fields."""
    nothing = {"scale": (1.0, 1.0), "category_ratio": 1.0, "flip_probability": 0.0, "distortion": False}
    return AdeAugmentation(**{"short_side": 32, "crop": 32, **nothing, **changes})


def recipe(name: str, **fields) -> ConfigDict:
    """The config of a recipe with these fields, "a.b" as a__b, and its preset's values for what is left."""
    fields = {"allow_incomplete": not name.startswith("world_"), "plots": False, "loader.workers": 0, **fields}
    return with_preset(load(RECIPES + name, {field.replace("__", "."): value for field, value in fields.items()}))
