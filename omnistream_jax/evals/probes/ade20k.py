"""Linear segmentation of ADE20K by DINOv3's protocol (its eval/segmentation; OmniStream's Table 10).

Dropout of channels, batch normalisation and one linear layer on the last block's patches, after the final norm, to
classes; cross-entropy at the size of the crop; a window slides over the whole picture, the logits of all windows are
averaged where they overlap, resized to the size of the annotation, and the largest counts. One confusion matrix of all
pixels of the validation set; mIoU of it; the best evaluation during training is the result.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax.data.probes.ade20k import CLASSES, IGNORED, AdeAugmentation, AdeData, AdeView, open_ade20k
from omnistream_jax.evals.probes.base import Encode, Evaluation, Variables, heads_of
from omnistream_jax.evals.probes.dense import (
    DenseProbe,
    all_heads,
    augmentation_of,
    patch_features,
    run_batched,
)
from omnistream_jax.evals.probes.dense_plots import SegmentationExample, plot_segmentation
from omnistream_jax.evals.probes.optimizers import AdamW
from omnistream_jax.evals.probes.schedules import WarmupOneCycle
from omnistream_jax.evals.probes.sweep_report import best_of
from omnistream_jax.evals.probes.windows import Windows, plan_windows
from omnistream_jax.evals.segmentation_metrics import confusion_matrix, segmentation_metrics
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.models.probes import LinearSegmentation, bilinear_matrix
from omnistream_jax.utils.agreement import arrays_from_all

LOSS_MEANS = ("all", "labelled")
FIELDS = (
    *("loss_mean", "dropout", "size", "window", "stride", "augmentation", "warmup_steps", "warmup_ratio"),
    *("schedule_lag", "beta1", "beta2", "clip_norm", "best_evaluation"),
)
_SHOWN = 4  # samples in the picture
_LOSS_CHUNKS = 8  # parts of the rows, one after another: all logits of a batch of 16 are 2.5 GB a head
_ROWS, _COLUMNS = 128, 256  # labels come in blocks of so many rows, and widths are multiples: few programs


@dataclasses.dataclass(frozen=True)
class SegmentationProbe(DenseProbe):
    """Linear segmentation; see the module.

    Attributes:
        head: the module.
        train: batches for training.
        view: what is scored.
        window: side of the sliding window, in pixels.
        stride: from window to window, in pixels.
        loss_mean: "all": the sum over labelled pixels is divided by the number of all, as in DINOv3; "labelled".
        best_evaluation: as of `Probe`.
    """

    head: LinearSegmentation
    train: AdeData
    view: AdeView
    window: int
    stride: int
    loss_mean: str
    best_evaluation: bool = dataclasses.field()  # without it, the value of `Probe` would be its default
    score: ClassVar[str] = "miou"

    def loss(
        self, variables: Variables, features: jax.Array, batch: Mapping[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Cross-entropy at the size of "labels" [N, T, H, W]."""
        logits, statistics = self._trained(variables, features, key)
        return upsampled_cross_entropy(logits, batch["labels"], self.loss_mean), statistics

    def train_data(self) -> AdeData:
        """As `Probe`."""
        return self.train

    def train_settings(self) -> dict[str, Any]:
        """As `Probe`."""
        return self.train.sources[0].settings()

    def validation(self) -> AdeView:
        """As `Probe`."""
        return self.view

    def evaluate(self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]) -> Evaluation:
        """mIoU, pixel accuracy and mean accuracy of each head, shares of 0 to 1; pictures of the best head's labels."""
        classes = self.head.classes
        confusions = np.zeros((len(self.heads), classes, classes), np.int64)
        examples = []
        for sample, plan, logits in self._window_logits(encode, variables, samples):
            truth = sample["labels"]
            labels = predicted_labels(logits, plan, *truth.shape)
            for head, predicted in enumerate(labels):
                confusions[head] += confusion_matrix(predicted, truth, classes, IGNORED)
            if len(examples) < _SHOWN:
                examples.append((sample, labels))
        confusions = sum(part["confusions"] for part in arrays_from_all({"confusions": confusions}))
        metrics = [segmentation_metrics(confusion) for confusion in confusions]
        names = ("miou", "pixel_accuracy", "mean_accuracy")
        scores = [{name: getattr(metric, name) for name in names} for metric in metrics]
        best = best_of(scores, self.score, self.higher_is_better)
        shown = [SegmentationExample(one["frames"][0], one["labels"], labels[best]) for one, labels in examples]
        title = (
            f"mIoU {100 * scores[best]['miou']:.1f} %, pixels {100 * scores[best]['pixel_accuracy']:.1f} %, the first"
        )
        return Evaluation(scores, {"segmentation": lambda path: plot_segmentation(shown, classes, title, path)})

    def _window_logits(
        self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]
    ) -> Iterator[tuple[dict[str, np.ndarray], Windows, np.ndarray]]:
        """Each sample with its windows and their logits, float32 [windows, heads, h, w, classes]."""

        def windows() -> Iterator[tuple[Any, np.ndarray]]:
            for sample in samples:
                plan = plan_windows(*sample["frames"].shape[1:3], self.window, self.stride)
                for place in plan.places():
                    yield (sample, plan), sample["frames"][:, *place]

        run = partial(_head_logits, self.head, self.patch_size, encode, variables)
        found: list[np.ndarray] = []
        for (sample, plan), logits in run_batched(windows(), self.evaluate_batch, run):
            found.append(logits)
            if len(found) == plan.count:
                yield sample, plan, np.stack(found)
                found = []


@partial(jax.jit, static_argnums=(0, 1))
def _head_logits(
    head: LinearSegmentation, patch_size: int, encode: Encode, variables: Variables, frames: jax.Array
) -> jax.Array:
    """float32 [N, heads, h, w, classes] of windows [N, 1, H, W, 3]."""
    logits = all_heads(head, variables, patch_features(encode, frames, patch_size))
    return jnp.moveaxis(logits[:, :, 0], 1, 0)


def upsampled_cross_entropy(logits: jax.Array, labels: jax.Array, mean: str) -> jax.Array:
    """The cross-entropy of logits that are resized bilinearly to the labels' size, a part of the rows at a time.

    Args:
        logits: [N, T, h, w, C].
        labels: integers [N, T, H, W]; 255 does not count.
        mean: one of LOSS_MEANS: what the sum over labelled pixels is divided by.

    Returns:
        float32 scalar; 0 where nothing is labelled.
    """
    height, width = labels.shape[-2:]
    chunks = max(n for n in range(1, _LOSS_CHUNKS + 1) if height % n == 0)
    rows = bilinear_matrix(logits.shape[-3], height).reshape(chunks, height // chunks, -1)
    columns = bilinear_matrix(logits.shape[-2], width)
    parts = jnp.moveaxis(labels.reshape(*labels.shape[:2], chunks, height // chunks, width), 2, 0)

    @jax.checkpoint  # the backward pass makes each part's logits anew
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        matrix, truth = part
        pixels = jnp.einsum("yh,xw,nthwc->ntyxc", matrix, columns, logits, precision=jax.lax.Precision.HIGHEST)
        labelled = truth != IGNORED
        index = jnp.where(labelled, truth, 0).astype(jnp.int32)[..., None]
        losses = jax.nn.logsumexp(pixels, -1) - jnp.take_along_axis(pixels, index, -1)[..., 0]
        return total + jnp.sum(jnp.where(labelled, losses, 0.0)), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (rows, parts))
    count = labels.size if mean == "all" else jnp.maximum(jnp.sum(labels != IGNORED), 1)
    return total / count


def predicted_labels(logits: np.ndarray, plan: Windows, height: int, width: int) -> np.ndarray:
    """The classes of a picture from the logits of its windows.

    Every step from a window's patches to the annotation's pixels is linear and acts on rows and columns apart:
    upsampling, adding where windows overlap, dividing by their number, resizing. So all of it is one matrix of the
    rows and one of the columns, and no logits of the whole picture are ever kept.

    Args:
        logits: float32 [windows, heads, h, w, classes], the windows row by row.
        plan: where they lie.
        height: of the annotation.
        width: likewise.

    Returns:
        uint8 [heads, height, width].
    """
    heads, h, w, classes = logits.shape[1:]
    grid = logits.reshape(len(plan.rows), len(plan.columns), heads, h, w, classes)
    grid = grid.transpose(2, 0, 3, 1, 4, 5).reshape(heads, len(plan.rows) * h, len(plan.columns) * w, classes)
    rows, columns = plan.row_matrix(h, height), plan.column_matrix(w, width)
    columns = np.pad(columns, ((0, -width % _COLUMNS), (0, 0)))
    blocks = []
    for first in range(0, height, _ROWS):
        block = rows[first : first + _ROWS]
        block = np.pad(block, ((0, _ROWS - len(block)), (0, 0)))
        blocks.append(np.asarray(_largest(block, columns, grid)))
    return np.concatenate(blocks, axis=1)[:, :height, :width]


@jax.jit
def _largest(rows: jax.Array, columns: jax.Array, logits: jax.Array) -> jax.Array:
    """uint8 [heads, Y, X]: the largest of the logits [heads, h, w, C] spread by rows [Y, h] and columns [X, w]."""

    def one(head: jax.Array) -> jax.Array:
        spread = jnp.einsum("yh,xw,hwc->yxc", rows, columns, head, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(spread, axis=-1).astype(jnp.uint8)

    return jax.lax.map(one, logits)


def build(config: ConfigDict, backbone: BackboneConfig) -> SegmentationProbe:
    """The probe of a config, of ADE20K in its published layout.

    Raises:
        ValueError: a field does not fit.
        DataError: the data do not.
    """
    if config.loss_mean not in LOSS_MEANS:
        raise ValueError(f"loss_mean: expected one of {', '.join(LOSS_MEANS)}, got {config.loss_mean!r}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout: expected a share, 0 or more and below 1, got {config.dropout}")
    for name, side in (("window", config.window), ("augmentation.crop", config.augmentation.crop)):
        if side < 1 or side % backbone.patch_size:
            raise ValueError(f"{name}: expected a multiple of the patch, {backbone.patch_size} pixels, got {side}")
    if not config.window <= config.size:
        raise ValueError(f"window: expected at most the short side, {config.size} pixels, got {config.window}")
    if not 1 <= config.stride <= config.window:
        raise ValueError(f"stride: expected 1 to {config.window} pixels, the window, got {config.stride}")
    train, heldout = (open_ade20k(config.data, split, incomplete=config.allow_incomplete) for split in ("train", "val"))
    return SegmentationProbe(
        heads=heads_of(config),
        optimizer=AdamW(config.beta1, config.beta2, clip_norm=config.clip_norm),
        schedule=WarmupOneCycle(
            config.steps,
            config.warmup_steps,
            end_divisor=math.inf,
            warmup_ratio=config.warmup_ratio,
            lag=config.schedule_lag,
        ),
        head=LinearSegmentation(CLASSES, config.dropout),
        patch_size=backbone.patch_size,
        evaluate_batch=config.evaluate_batch,
        train=AdeData((train,), config.batch, augmentation=augmentation_of(config, AdeAugmentation)),
        view=AdeView(heldout, config.size),
        window=config.window,
        stride=config.stride,
        loss_mean=config.loss_mean,
        best_evaluation=config.best_evaluation,
    )
