"""Linear classification of pictures, by DINOv3's protocol (its eval/linear.py; OmniStream's Table 10).

The last block's CLS token and the mean of its patch tokens, after the final norm and side by side, float32; one linear
layer a learning rate; cross-entropy; top-1 accuracy on the validation set, the best head of it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from omnistream_jax.data.probes.labelled import (
    IMAGENET_COUNTS,
    LabelledData,
    LabelledSource,
    LabelledViews,
    WorldObjects,
    check_same_classes,
    image_folder,
)
from omnistream_jax.evals.probes.base import (
    EMBEDDED,
    Encode,
    Evaluation,
    Heads,
    Probe,
    Variables,
    check_world,
    heads_of,
)
from omnistream_jax.evals.probes.classes import TOP, class_evaluation
from omnistream_jax.evals.probes.engine import batched
from omnistream_jax.evals.probes.optimizers import Sgd
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.models.backbone import BackboneOutput
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.models.probes import LinearClassifier

FEATURES = ("cls+mean", "cls", "mean")
FIELDS = ("features", "size", "resize", "warmup_steps", "momentum")


def pooled(out: BackboneOutput, kind: str) -> jax.Array:
    """What a linear classifier sees of clips of one frame: float32 [N, D], or [N, 2 D] for "cls+mean"."""
    parts = {"cls": out.cls[:, 0], "mean": out.patches[:, 0].astype(jnp.float32).mean((1, 2))}
    return jnp.concatenate([parts[name].astype(jnp.float32) for name in kind.split("+")], axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: it is an argument of functions under jit
class ImageProbe(Probe):
    """Linear classification of single pictures; see the module.

    Attributes:
        heads: as of `Probe`.
        batch: pictures a step, over all devices.
        schedule: of the learning rates.
        optimizer: of a head.
        feature_kind: one of FEATURES.
        train, heldout: the pictures.
        size: of what the backbone sees, in pixels.
        resize: short side of a validation picture before its central crop.
        evaluate_batch: pictures scored at once.
    """

    heads: Heads
    batch: int
    schedule: Cosine
    optimizer: Sgd
    feature_kind: str
    train: LabelledSource
    heldout: LabelledSource
    size: int
    resize: int
    evaluate_batch: int
    score: ClassVar[str] = "top1"

    @property
    def head(self) -> LinearClassifier:
        """The module of a head."""
        return LinearClassifier(len(self.heldout.classes))

    def learning_rate_factor(self, step: jax.Array) -> jax.Array:
        """As `Probe`."""
        return self.schedule(step)

    def features(self, encode: Encode, frames: jax.Array) -> jax.Array:
        """Float32 [N, D] or [N, 2 D]."""
        return pooled(encode(frames), self.feature_kind)

    def init(self, key: jax.Array, features: Any) -> Variables:
        """As `Probe`."""
        return self.head.init(key, jnp.zeros((1, features.shape[-1]), jnp.float32))

    def loss(
        self, variables: Variables, features: jax.Array, batch: Mapping[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, None]:
        """The mean cross-entropy."""
        logits = self.head.apply(variables, features)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), None

    def train_data(self) -> LabelledData:
        """As `Probe`."""
        return LabelledData((self.train,), self.batch, size=self.size)

    def train_settings(self) -> dict[str, Any]:
        """As `Probe`."""
        return self.train.settings()

    def train_samples(self) -> LabelledViews:
        """As `Probe`."""
        return LabelledViews(self.train, self.resize, self.size)

    def validation(self) -> LabelledViews:
        """As `Probe`."""
        return LabelledViews(self.heldout, self.resize, self.size)

    def evaluate(self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]) -> Evaluation:
        """As `class_evaluation`."""
        ranked, labels = [], []
        for batch, real in batched(samples, self.evaluate_batch):
            top = _ranked(self, encode, variables, batch["frames"])
            ranked.append(np.asarray(top)[:, real])
            labels.append(np.asarray(batch["label"])[real])
        ranked, labels = np.concatenate(ranked, axis=1), np.concatenate(labels)
        return class_evaluation(ranked, labels, self.heldout.classes)


@partial(jax.jit, static_argnums=0)
def _ranked(probe: ImageProbe, encode: Encode, variables: Variables, frames: jax.Array) -> jax.Array:
    """int32 [H, N, 5 or all]: each head's classes, the likeliest first; of equals the first."""
    features = probe.features(encode, frames)
    logits = jax.vmap(lambda head: probe.head.apply(head, features))(variables)
    return jax.lax.top_k(logits, min(TOP, logits.shape[-1]))[1]


def build(config: ConfigDict, backbone: BackboneConfig) -> ImageProbe:
    """The probe of a config: of a data set in ImageFolder's layout, or of the embedded world's things.

    Raises:
        ValueError: a field does not fit.
        DataError: the data do not.
    """
    check_world(config, "world_objects", ":imagenet")
    if config.features not in FEATURES:
        raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {config.features!r}")
    if config.size < backbone.patch_size or config.size % backbone.patch_size:
        raise ValueError(f"size: expected a multiple of the patch, {backbone.patch_size} pixels, got {config.size}")
    if config.resize < config.size:
        raise ValueError(f"resize: expected size ({config.size}) or more, got {config.resize}")
    train, heldout = _sources(config)
    return ImageProbe(
        heads=heads_of(config),
        batch=config.batch,
        schedule=Cosine(config.steps, config.warmup_steps),
        optimizer=Sgd(config.momentum),
        feature_kind=config.features,
        train=train,
        heldout=heldout,
        size=config.size,
        resize=config.resize,
        evaluate_batch=config.evaluate_batch,
    )


def _sources(config: ConfigDict) -> tuple[LabelledSource, LabelledSource]:
    if config.data == EMBEDDED:
        fields = {name: config[name] for name in ("render_size", "margin", "smallest")} | {"seed": config.world_seed}
        return WorldObjects("train", config.scenes, **fields), WorldObjects("heldout", config.heldout_scenes, **fields)
    train, heldout = (
        image_folder(config.data, split, config.classes, count, config.allow_incomplete)
        for split, count in IMAGENET_COUNTS.items()
    )
    check_same_classes(train, heldout)
    return train, heldout
