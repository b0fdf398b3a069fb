"""Pictures of what the probes of maps predict, beside the truth."""

import colorsys
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.evals.figures import new_figure, save_figure

_LARGEST_ERROR = 0.5  # of |p - g| / g, at the end of the colours
_UNKNOWN = 40  # grey level of pixels without a label


@dataclasses.dataclass(frozen=True)
class DepthExample:
    """One image.

    Attributes:
        frame: uint8 [H, W, 3].
        truth: float32 [H, W], metres, 0 where it is not known.
        prediction: float32 [H, W], metres.
    """

    frame: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


@dataclasses.dataclass(frozen=True)
class SegmentationExample:
    """One image.

    Attributes:
        frame: uint8 [h, w, 3].
        truth: uint8 [H, W], 255 where there is no label.
        prediction: uint8 [H, W].
    """

    frame: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def plot_depth(examples: Sequence[DepthExample], title: str, path: Path) -> None:
    """Writes a PNG: a row for each image with the frame, the truth, the prediction and its error.

    Args:
        examples: one or more.
        title: of the picture.
        path: written aside, then renamed; its folder exists.
    """
    figure, axes = _grid(examples, ("frame", "truth", "prediction", "|p - g| / g"))
    for row, example in zip(axes, examples, strict=True):
        known = example.truth > 0
        truth = np.where(known, example.truth, np.nan)
        low, high = np.percentile(example.truth[known], (2, 98)) if known.any() else (0.0, 1.0)
        row[0].imshow(example.frame)
        for column, depth in ((1, truth), (2, example.prediction)):
            shown = row[column].imshow(depth, vmin=low, vmax=high, cmap="turbo", interpolation="nearest")
        figure.colorbar(shown, ax=list(row[1:3]), shrink=0.8, label="metres")
        error = np.abs(example.prediction - truth) / truth
        shown = row[3].imshow(error, vmin=0, vmax=_LARGEST_ERROR, cmap="magma", interpolation="nearest")
        figure.colorbar(shown, ax=row[3], shrink=0.8, extend="max")
    figure.suptitle(title)
    save_figure(figure, path)


def plot_segmentation(examples: Sequence[SegmentationExample], classes: int, title: str, path: Path) -> None:
    """Writes a PNG: a row for each image with the frame, the truth and the prediction, a colour a class.

    Args:
        examples: one or more.
        classes: how many there are.
        title: of the picture.
        path: written aside, then renamed; its folder exists.
    """
    colours = class_colours(classes)
    figure, axes = _grid(examples, ("frame", "truth", "prediction"))
    for row, example in zip(axes, examples, strict=True):
        height, width = example.truth.shape
        row[0].imshow(example.frame, extent=(0, width, height, 0))
        row[1].imshow(colours[example.truth], interpolation="nearest")
        row[2].imshow(colours[example.prediction], interpolation="nearest")
    figure.suptitle(title)
    save_figure(figure, path)


def class_colours(classes: int) -> np.ndarray:
    """uint8 [256, 3]: a colour of each class, neighbours far apart on the circle; grey for all else."""
    table = np.full((256, 3), _UNKNOWN, np.uint8)
    for number in range(classes):
        hue = number * 0.618034 % 1  # the golden section: no two are close
        colour = colorsys.hsv_to_rgb(hue, (1.0, 0.6, 0.8)[number % 3], (1.0, 0.9, 0.65)[number // 3 % 3])
        table[number] = np.rint(255 * np.array(colour))
    return table


def _grid(examples: Sequence[Any], titles: Sequence[str]) -> tuple[Any, np.ndarray]:
    """A figure with a row for each image and a column for each title."""
    height, width = examples[0].truth.shape
    figure = new_figure((3.5 * len(titles), max(2.0, 3.2 * height / width) * len(examples) + 0.8))
    axes = figure.subplots(len(examples), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("lightgrey")  # where there is no truth
    return figure, axes
