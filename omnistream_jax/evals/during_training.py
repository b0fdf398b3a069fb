"""The evaluators of a run: what `config.evaluators` of configs/pretrain.py says, made."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from omnistream_jax.data.probes.labelled import (
    LabelledImages,
    LabelledViews,
    WorldObjects,
    check_same_classes,
    image_folder,
)
from omnistream_jax.evals.evaluators import KnnEvaluator, LabelledSets, LinearEvaluator
from omnistream_jax.model import Model

WORLD = "world"
NAMES = ("knn", "linear")
_RESIZE = 256 / 224  # short side of a photograph to the side of its central crop, as in ImageNet's validation
_CLASSES = 1_000_000  # more than any folder has


class RunEvaluators:
    """k-NN and linear accuracy of a backbone's features. All pictures are read and decoded here, once.

    Args:
        fields: of `config.evaluators`.
        patch_size: of the backbone.

    Raises:
        ValueError: a field does not fit; the message names it.
        DataError: the pictures are not there, or cannot be read.
    """

    def __init__(self, fields: Mapping[str, Any], patch_size: int):
        _check(fields, patch_size)
        sets = LabelledSets(*(_world(fields) if fields["paths"] == WORLD else _folder(fields)))
        made = {
            "knn": lambda: KnnEvaluator(
                sets, tuple(fields["neighbours"]), fields["temperature"], fields["knn_features"]
            ),
            "linear": lambda: LinearEvaluator(sets, tuple(fields["learning_rates"]), fields["linear_steps"]),
        }
        try:
            self._evaluators = [made[name]() for name in fields["names"]]
        except ValueError as error:
            raise ValueError(f"evaluators.{error}") from error
        sets.read()  # what is damaged is told before hours of training

    def run(self, model: Model) -> Iterator[tuple[str, float]]:
        """What each evaluator yields, and at last ("evaluators_seconds", what they took together)."""
        started = time.monotonic()
        for evaluator in self._evaluators:
            yield from evaluator.run(model)
        yield "evaluators_seconds", time.monotonic() - started


def _check(fields: Mapping[str, Any], patch_size: int) -> None:
    for name in ("train_images", "test_images"):
        if fields[name] < 1:
            raise ValueError(f"evaluators.{name}: expected 1 or more, got {fields[name]}")
    if fields["size"] < patch_size or fields["size"] % patch_size:
        raise ValueError(f"evaluators.size: expected a multiple of {patch_size}, got {fields['size']}")
    names = tuple(fields["names"])
    if not names or not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise ValueError(f"evaluators.names: expected some of {', '.join(NAMES)}, each once, got {names}")
    if not fields["paths"]:
        raise ValueError(f"evaluators.paths: expected {WORLD}, or a folder with train/CLASS/ and val/CLASS/")


def _world(fields: Mapping[str, Any]) -> tuple[LabelledViews, LabelledViews]:
    """Things of the rendered world, which fill their crops."""
    size = fields["size"]
    train, test = WorldObjects("train", fields["train_images"]), WorldObjects("heldout", fields["test_images"])
    return LabelledViews(train, size, size), LabelledViews(test, size, size)


def _folder(fields: Mapping[str, Any]) -> tuple[LabelledViews, LabelledViews]:
    """Photographs in folders, at most so many of each split."""
    counts = {"train": fields["train_images"], "val": fields["test_images"]}
    train, test = (_some(image_folder(fields["paths"], split, _CLASSES, None), counts[split]) for split in counts)
    check_same_classes(train, test)
    resize = round(_RESIZE * fields["size"])
    return LabelledViews(train, resize, fields["size"]), LabelledViews(test, resize, fields["size"])


def _some(images: LabelledImages, count: int) -> LabelledImages:
    """A random selection, the same in every run: classes are there in about their shares, rare ones perhaps not."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
    paths, labels = ([of[place] for place in chosen] for of in (images.paths, images.labels))
    return dataclasses.replace(images, paths=tuple(paths), labels=tuple(labels))
