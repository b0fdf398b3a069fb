"""Pictures of a sweep: the score of each head over its learning rate; and the confusion of classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from omnistream_jax.evals.figures import new_figure, save_figure
from omnistream_jax.evals.probes.base import Heads

_NAMED = 40  # classes whose names are written


def plot_sweep(heads: Heads, scores: Sequence[Mapping[str, float]], score: str, best: int, path: Path) -> None:
    """Writes a PNG: the score over the learning rate, a line for each weight decay.

    Args:
        heads: in the order of `scores`.
        scores: {metric: value} of each head.
        score: the metric.
        best: the head that is reported.
        path: written aside, then renamed; its folder exists.
    """
    figure = new_figure((8, 5))
    axis = figure.subplots()
    rates, values = np.array(heads.learning_rates), np.array([row[score] for row in scores], float)
    for decay in dict.fromkeys(heads.weight_decays):
        some = np.flatnonzero(np.array(heads.weight_decays) == decay)
        some = some[np.argsort(rates[some], kind="stable")]
        axis.plot(rates[some], values[some], marker=".", label=f"weight decay {decay:g}")
    axis.plot(rates[best], values[best], marker="o", color="black", fillstyle="none", markersize=12)
    if (rates > 0).all() and len(set(rates)) > 1:
        axis.set_xscale("log")
    axis.set(xlabel="learning rate", ylabel=score, title=f"best: {values[best]:.4f} at {rates[best]:.3g}")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Writes a PNG: the share of each class (row) that was taken for each (column).

    Args:
        matrix: [C, C] of `segmentation_metrics.confusion_matrix`.
        names: of the C classes; written where they are few.
        path: written aside, then renamed; its folder exists.
    """
    classes = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = float(np.clip(0.5 * classes + 3, 5, 12))
    figure = new_figure((side + 1, side))
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    if classes <= _NAMED:
        axis.set_xticks(range(classes), names, rotation=90)
        axis.set_yticks(range(classes), names)
    if classes <= _NAMED // 4:
        for row, column in np.ndindex(classes, classes):
            colour = "white" if shares[row, column] < 0.5 else "black"
            axis.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=colour)
    axis.set(xlabel="prediction", ylabel="class", title=f"{np.trace(matrix) / max(matrix.sum(), 1):.2%} are right")
    figure.colorbar(image, ax=axis, label="share of the class")
    save_figure(figure, path)
