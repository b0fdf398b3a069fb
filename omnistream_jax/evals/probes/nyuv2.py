"""Linear depth by DINOv3's protocol (its eval/depth; OmniStream's Table 10): NYU Depth v2, and the embedded world.

Batch normalisation and one linear layer on the last block's patches, after the final norm and without CLS, to weights
of depth bins; SigLoss; no alignment; the RMSE of each image, then their mean.
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

from omnistream_jax.data.probes.depth import DepthAugmentation, DepthData, DepthSource, DepthView
from omnistream_jax.data.probes.nyuv2 import open_nyuv2
from omnistream_jax.data.probes.world_depth import open_world_depth
from omnistream_jax.evals.image_depth_metrics import ImageDepthMetrics, image_depth_metrics, mean_of_images
from omnistream_jax.evals.probes.base import EMBEDDED, Encode, Evaluation, Variables, check_world, heads_of
from omnistream_jax.evals.probes.dense import (
    DenseProbe,
    all_heads,
    augmentation_of,
    patch_features,
    run_batched,
)
from omnistream_jax.evals.probes.dense_plots import DepthExample, plot_depth
from omnistream_jax.evals.probes.optimizers import AdamW
from omnistream_jax.evals.probes.schedules import OneCycleBeta, WarmupOneCycle
from omnistream_jax.evals.probes.sweep_report import best_of
from omnistream_jax.losses.sig import grouped_sig_loss
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.models.probes import LinearDepth, resize_bilinear
from omnistream_jax.utils.agreement import arrays_from_all

CROPS = ("eigen", "none")
FIELDS = (
    *("crop", "min_depth", "max_depth", "bins", "images_per_loss", "warmup_steps", "start_divisor", "end_divisor"),
    *("beta1", "beta2", "clip_norm", "variance_from", "flip", "size", "augmentation"),
)
_SHOWN = 4  # samples in the picture
_DIVERGED = dataclasses.astuple(ImageDepthMetrics(math.nan, math.nan, math.nan))


@dataclasses.dataclass(frozen=True)
class DepthProbe(DenseProbe):
    """Linear depth; see the module.

    Attributes:
        head: whose range of depth is also the one that is scored.
        train: batches for training.
        train_view: the same frames without anything random.
        view: what is scored.
        images_per_loss: samples over whose pixels one SigLoss is taken; the loss of a batch is the mean of them.
        variance_from: the first step at which SigLoss has its variance.
        crop: one of CROPS, of the scored pixels.
        flip: score the mean of the depth of each sample and of its mirror image; the scores without are told beside.
    """

    head: LinearDepth
    train: DepthData
    train_view: DepthView
    view: DepthView
    images_per_loss: int
    variance_from: int
    crop: str
    flip: bool
    score: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False

    def loss(
        self, variables: Variables, features: jax.Array, batch: Mapping[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """SigLoss of the depth at the size of the target "depth" [N, T, H, W], where that is above 0."""
        depth, statistics = self._trained(variables, features, key)
        target = batch["depth"]
        predicted = resize_bilinear(depth, *target.shape[-2:])
        loss = grouped_sig_loss(
            predicted, target, target > 0, self.images_per_loss, with_variance=step >= self.variance_from
        )
        return loss, statistics

    def train_data(self) -> DepthData:
        """As `Probe`."""
        return self.train

    def train_settings(self) -> dict[str, Any]:
        """As `Probe`."""
        return self.train_view.settings()

    def train_samples(self) -> DepthView:
        """As `Probe`."""
        return self.train_view

    def validation(self) -> DepthView:
        """As `Probe`."""
        return self.view

    def evaluate(self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]) -> Evaluation:
        """The mean over images of RMSE (metres), AbsRel and a1 of each head; pictures of the best head's depth.

        With `flip`, "rmse", "abs_rel" and "a1" are those of the mean of both views, which DINOv3 takes at the final
        test alone; "rmse_one_view" and so on are what it shows while it trains.
        """
        images, examples = [], []
        for sample, maps in self._predictions(encode, variables, samples):
            images += [self._score(maps[..., t, :, :], truth) for t, truth in enumerate(sample["depth"])]
            if len(examples) < _SHOWN:
                examples.append((sample, maps[0, :, 0]))
        views = 2 if self.flip else 1
        images = np.array([image for image in images if image is not None], np.float64)
        parts = arrays_from_all({"images": images.reshape(-1, views, len(self.heads), len(_DIVERGED))})
        images = np.concatenate([part["images"] for part in parts])
        scores = [self._means(images[:, 0, head], "") for head in range(len(self.heads))]
        if self.flip:
            for head, score in enumerate(scores):
                score |= self._means(images[:, 1, head], "_one_view")
        best = best_of(scores, self.score, self.higher_is_better)
        shown = [
            DepthExample(
                sample["frames"][0], sample["depth"][0], maps[best].clip(self.head.min_depth, self.head.max_depth)
            )
            for sample, maps in examples
        ]
        title = f"RMSE {scores[best]['rmse']:.3f} m, AbsRel {scores[best]['abs_rel']:.3f}, the first of them"
        return Evaluation(scores, {"depth": lambda path: plot_depth(shown, title, path)})

    def _predictions(
        self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Each sample with its depth, float32 [views, heads, T, H, W]."""
        run = partial(_predict, self.head, self.patch_size, self.flip, encode, variables)
        return run_batched(((sample, sample["frames"]) for sample in samples), self.evaluate_batch, run)

    def _score(self, maps: np.ndarray, truth: np.ndarray) -> list[list[tuple[float, ...]]] | None:
        """The metrics of one image, [views][heads][M], from maps [views, heads, H, W]; a head that diverged has NaN.

        None if no pixel is valid.
        """
        limits = {"min_depth": self.head.min_depth, "max_depth": self.head.max_depth, "crop": self.crop}
        if image_depth_metrics(np.ones_like(truth), truth, **limits) is None:
            return None

        def score(one: np.ndarray) -> tuple[float, ...]:
            if not np.isfinite(one).all():
                return _DIVERGED
            return dataclasses.astuple(image_depth_metrics(one, truth, **limits))

        return [[score(one) for one in view] for view in maps]

    @staticmethod
    def _means(images: np.ndarray, suffix: str) -> dict[str, float]:
        means = mean_of_images(ImageDepthMetrics(*image.tolist()) for image in images)
        return {f"{name}{suffix}": value for name, value in dataclasses.asdict(means).items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _predict(
    head: LinearDepth, patch_size: int, flip: bool, encode: Encode, variables: Variables, frames: jax.Array
) -> jax.Array:
    """float32 [N, views, heads, T, H, W]: the mean of both views, where asked, before the plain one."""

    def depth_of(view: jax.Array) -> jax.Array:
        return all_heads(head, variables, patch_features(encode, view, patch_size))  # [heads, N, T, h, w]

    views = [depth_of(frames)]
    if flip:
        mirrored = depth_of(frames[..., ::-1, :])[..., ::-1]
        views = [(views[0] + mirrored) / 2, views[0]]
    return jnp.moveaxis(resize_bilinear(jnp.stack(views), *frames.shape[-3:-1]), 2, 0)


def build(config: ConfigDict, backbone: BackboneConfig) -> DepthProbe:
    """The probe of a config: of NYU Depth v2 in its published layout, or of the embedded world.

    Raises:
        ValueError: a field does not fit.
        DataError: the data do not.
    """
    check_world(config, "world_depth", ":nyuv2")
    if config.crop not in CROPS:
        raise ValueError(f"crop: expected one of {', '.join(CROPS)}, got {config.crop!r}")
    if not 0 < config.min_depth < config.max_depth:
        raise ValueError(f"max_depth: expected above min_depth ({config.min_depth}), got {config.max_depth}")
    if config.bins < 2:
        raise ValueError(f"bins: expected 2 or more, got {config.bins}")
    if config.images_per_loss < 1 or config.batch % config.images_per_loss:
        raise ValueError(f"images_per_loss: expected a divisor of batch ({config.batch}), got {config.images_per_loss}")
    schedule = WarmupOneCycle(
        config.steps, config.warmup_steps, end_divisor=config.end_divisor, start_divisor=config.start_divisor
    )
    beta1 = OneCycleBeta(config.steps, config.warmup_steps, tuple(config.beta1))
    train, heldout = _sources(config)
    return DepthProbe(
        heads=heads_of(config),
        optimizer=AdamW(beta1, config.beta2, clip_norm=config.clip_norm),
        schedule=schedule,
        head=LinearDepth(config.bins, config.min_depth, config.max_depth),
        patch_size=backbone.patch_size,
        evaluate_batch=config.evaluate_batch,
        train=DepthData((train,), config.batch, augmentation=augmentation_of(config, DepthAugmentation)),
        train_view=DepthView(train),
        view=DepthView(heldout),
        images_per_loss=config.images_per_loss,
        variance_from=config.variance_from,
        crop=config.crop,
        flip=config.flip,
    )


def _sources(config: ConfigDict) -> tuple[DepthSource, DepthSource]:
    if config.data != EMBEDDED:
        options = {"size": tuple(config.size), "incomplete": config.allow_incomplete}
        return tuple(open_nyuv2(config.data, split, **options) for split in ("train", "test"))
    fields = {"frames": config.frames, "size": config.size, "seed": config.world_seed}
    train = open_world_depth("train", config.scenes, **fields)
    return train, open_world_depth("heldout", config.heldout_scenes, **fields)
