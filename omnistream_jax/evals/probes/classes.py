"""Scores of heads that tell classes."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from omnistream_jax.evals.probes.base import Evaluation
from omnistream_jax.evals.probes.sweep_plots import plot_confusion
from omnistream_jax.evals.segmentation_metrics import confusion_matrix
from omnistream_jax.utils.agreement import arrays_from_all

TOP = 5
"""How many classes a head ranks, where there are more."""


def class_evaluation(ranked: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Evaluation:
    """Top-1 accuracy of each head, and top-5 where there are more than 5 classes; a plot of the best head's confusion.

    Args:
        ranked: [H, N, K], classes by falling score, of each head and sample of this process; K is at least 5 where
            there are more than 5 classes.
        labels: [N], exact: no padding.
        names: of all classes.
    """
    parts = arrays_from_all({"ranked": ranked, "labels": labels})
    ranked = np.concatenate([part["ranked"] for part in parts], axis=1)
    labels = np.concatenate([part["labels"] for part in parts])
    hits = ranked == labels[:, None]
    scores = [{"top1": float(head[:, 0].mean())} for head in hits]
    if len(names) > TOP:
        scores = [row | {f"top{TOP}": float(head.any(1).mean())} for row, head in zip(scores, hits, strict=True)]
    best = int(np.argmax([row["top1"] for row in scores]))
    confusion = confusion_matrix(ranked[best, :, 0], labels, len(names), ignored=-1)
    return Evaluation(scores, {"confusion": partial(plot_confusion, confusion, names)})
