"""Classes of videos by an attentive probe, by V-JEPA 2's protocol (video_classification_frozen; OmniStream's Table 11).

Each segment of a video is a clip, encoded as a stream of its own, or frame by frame, as image models are; the probe
sees the patch tokens of all segments side by side, at training too, with no position added. Cross-entropy; a video's
score is the mean of the softmax over its spatial views. All videos are counted exactly: V-JEPA 2 averages over batches,
where a short last one weighs too much.

B: videos, S: segments, T: frames of a clip, V: views, C: classes, h x w: patches of a frame.
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

from omnistream_jax.convert.vjepa2_probe import load_attentive_probe
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.probes.action import (
    ActionData,
    ActionSource,
    ActionViews,
    check_same_names,
    open_action_videos,
)
from omnistream_jax.data.probes.clip_views import Sampling, SpatialViews, TrainingView
from omnistream_jax.data.probes.rand_augment import parse_rand_augment
from omnistream_jax.data.probes.world_motion import open_world_motion
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
from omnistream_jax.evals.probes.optimizers import AdamW
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.models.attentive_probe import AttentiveProbe
from omnistream_jax.models.backbone import default_dtype
from omnistream_jax.models.presets import BackboneConfig

# what clip_views.py calls a field -> what the config does
_FIELDS = {"window": "validation_window", "scale": "crop_scale"}
FEATURES = ("clip", "frame")
FIELDS = (
    *("size", "frames", "features", "probe_heads", "probe_depth", "initial_probe", "remat", "warmup_steps"),
    *("shuffle_frames", "validation_seed", "best_evaluation", "rand_augment", "crop_scale", "flip_probability"),
    "erase_probability",
)


def video_tokens(encode: Encode, frames: jax.Array, segments: int) -> jax.Array:
    """The patch tokens of all segments of videos.

    One segment of all videos is encoded at a time, so that the backbone's memory does not grow with their number.

    Args:
        encode: the frozen backbone.
        frames: [B, S T, H, W, 3].
        segments: S.

    Returns:
        [B, S T h w, D], after the final norm.
    """
    clips = frames.reshape(frames.shape[0], segments, -1, *frames.shape[2:])
    if segments == 1:
        patches = encode(clips[:, 0]).patches[:, None]
    else:
        patches = jnp.moveaxis(jax.lax.map(lambda clip: encode(clip).patches, jnp.moveaxis(clips, 1, 0)), 0, 1)
    return patches.reshape(frames.shape[0], -1, patches.shape[-1])


@dataclasses.dataclass(frozen=True)
class ActionProbe(Probe):
    """An attentive probe on videos; see the module.

    Attributes:
        heads: as of `Probe`.
        batch: videos a step, over all devices.
        schedule: of the learning rates.
        optimizer: of a head.
        head: the module of a head.
        start: params with which every head starts; None: V-JEPA 2's start, drawn for each head.
        train, heldout: the videos.
        sampling: which frames of a held-out video; of the others, with random windows.
        view: how a clip changes for training.
        views: how a held-out video is cut.
        shuffle_frames: whether the frames of each clip come in a random order, everywhere.
        validation_seed: draws the windows of held-out videos.
        evaluate_batch: videos scored at once.
        heads_at_once: heads that score side by side; 0: all.
        best_evaluation, frames_alone: as of `Probe`.
    """

    heads: Heads
    batch: int
    schedule: Cosine
    optimizer: AdamW
    head: AttentiveProbe
    start: Mapping[str, Any] | None
    train: ActionSource
    heldout: ActionSource
    sampling: Sampling
    view: TrainingView
    views: SpatialViews
    shuffle_frames: bool
    validation_seed: int
    evaluate_batch: int
    heads_at_once: int
    best_evaluation: bool = dataclasses.field()  # without it, the value of `Probe` would be its default
    frames_alone: bool = dataclasses.field()
    score: ClassVar[str] = "top1"

    def learning_rate_factor(self, step: jax.Array) -> jax.Array:
        """As `Probe`."""
        return self.schedule(step)

    def features(self, encode: Encode, frames: jax.Array) -> jax.Array:
        """[B, S T h w, D] of frames [B, S T, H, W, 3]."""
        return video_tokens(encode, frames, self.sampling.segments)

    def init(self, key: jax.Array, features: Any) -> Variables:
        """As `Probe`."""
        if self.start is not None:
            return {"params": jax.tree.map(jnp.asarray, self.start)}
        return self.head.init(key, jnp.zeros((1, 1, features.shape[-1]), jnp.float32))

    def loss(
        self, variables: Variables, features: jax.Array, batch: Mapping[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, None]:
        """The mean cross-entropy."""
        logits = self.head.apply(variables, features)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), None

    def train_data(self) -> ActionData:
        """As `Probe`."""
        sampling = dataclasses.replace(self.sampling, window="random")
        return ActionData(
            (self.train,), self.batch, sampling=sampling, view=self.view, shuffle_frames=self.shuffle_frames
        )

    def train_settings(self) -> dict[str, Any]:
        """As `Probe`."""
        return self.train.settings()

    def train_samples(self) -> ActionViews:
        """As `Probe`; of each video the central view alone."""
        centre = dataclasses.replace(self.views, views=1, short_side=self.views.resized_to)
        return ActionViews(self.train, self.sampling, centre, self.shuffle_frames, self.validation_seed)

    def validation(self) -> ActionViews:
        """As `Probe`."""
        return ActionViews(self.heldout, self.sampling, self.views, self.shuffle_frames, self.validation_seed)

    def evaluate(self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]) -> Evaluation:
        """As `class_evaluation`."""
        scorer = _Scorer(self.head, self.sampling.segments, self.views.views, self.heads_at_once)
        ranked, labels = [], []
        for batch, real in batched(samples, self.evaluate_batch):
            probabilities = np.asarray(_probabilities(scorer, encode, variables, batch["frames"]))[:, real]
            ranked.append(np.argsort(-probabilities, axis=-1, kind="stable")[..., :TOP])
            labels.append(np.asarray(batch["label"])[real])
        ranked, labels = np.concatenate(ranked, axis=1), np.concatenate(labels)
        return class_evaluation(ranked, labels, self.heldout.classes)


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """What the scoring program is compiled for."""

    head: AttentiveProbe
    segments: int
    views: int
    heads_at_once: int


@partial(jax.jit, static_argnums=0)
def _probabilities(scorer: _Scorer, encode: Encode, variables: Variables, frames: jax.Array) -> jax.Array:
    """Frames [B, V S T, H, W, 3] of videos -> float32 [heads, B, C], the mean of the softmax over the views."""

    def score_view(view: jax.Array) -> jax.Array:
        tokens = video_tokens(encode, view, scorer.segments)

        def score(head: Variables) -> jax.Array:
            return jax.nn.softmax(scorer.head.apply(head, tokens), axis=-1)

        if scorer.heads_at_once:
            return jax.lax.map(score, variables, batch_size=scorer.heads_at_once)
        return jax.vmap(score)(variables)

    split = frames.reshape(frames.shape[0], scorer.views, -1, *frames.shape[2:])
    return jax.lax.map(score_view, jnp.moveaxis(split, 1, 0)).mean(0)


# Building


def build(config: ConfigDict, backbone: BackboneConfig) -> ActionProbe:
    """The probe of a config: of Kinetics-400 or Something-Something v2, or of the embedded world's motions.

    Raises:
        ValueError: a field does not fit.
        DataError: the data do not.
        WeightsError: `initial_probe` cannot be read.
    """
    check_world(config, "world_motion", ":k400 or :ssv2")
    if config.size < backbone.patch_size or config.size % backbone.patch_size:
        raise ValueError(f"size: expected a multiple of the patch, {backbone.patch_size} pixels, got {config.size}")
    if config.probe_heads < 1 or backbone.width % config.probe_heads:
        raise ValueError(f"probe_heads: expected a divisor of the width {backbone.width}, got {config.probe_heads}")
    if config.probe_depth < 1:
        raise ValueError(f"probe_depth: expected 1 block or more, got {config.probe_depth}")
    if config.features not in FEATURES:
        raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {config.features!r}")
    if config.features == "frame" and config.time_unit:
        raise ValueError(f"time_unit: frames that are encoded alone have no time, got {config.time_unit}")
    try:
        sampling, views, view = _sampling(config), _views(config), _training_view(config)
    except DataError as error:  # nothing but fields can be wrong, which have longer names here
        name, _, problem = str(error).partition(":")
        raise ValueError(f"{_FIELDS.get(name, name)}:{problem}") from error
    train, heldout = _sources(config)
    head, start = _head(config, backbone, len(heldout.classes))
    return ActionProbe(
        heads=heads_of(config),
        batch=config.batch,
        schedule=Cosine(config.steps, config.warmup_steps, lead=1),
        optimizer=AdamW(),
        head=head,
        start=start,
        train=train,
        heldout=heldout,
        sampling=sampling,
        view=view,
        views=views,
        shuffle_frames=config.shuffle_frames,
        validation_seed=config.validation_seed,
        evaluate_batch=config.evaluate_batch,
        heads_at_once=config.heads_at_once,
        best_evaluation=config.best_evaluation,
        frames_alone=config.features == "frame",
    )


def _head(
    config: ConfigDict, backbone: BackboneConfig, classes: int
) -> tuple[AttentiveProbe, Mapping[str, Any] | None]:
    """The module of a head, and the parameters that `initial_probe` names."""
    dtype = default_dtype() if config.compute_dtype == "auto" else jnp.dtype(config.compute_dtype)
    if not config.initial_probe:
        return AttentiveProbe(classes, config.probe_heads, config.probe_depth, remat=config.remat, dtype=dtype), None
    head, params = load_attentive_probe(config.initial_probe, config.probe_heads)
    width = params["pooler"]["query"].shape[-1]
    found = {"width": width, "classes": head.classes, "probe_heads": head.heads, "probe_depth": head.depth}
    expected = {
        "width": backbone.width,
        "classes": classes,
        "probe_heads": config.probe_heads,
        "probe_depth": config.probe_depth,
    }
    wrong = [f"{name} {value}, not {found[name]}" for name, value in expected.items() if found[name] != value]
    if wrong:
        raise ValueError(f"initial_probe: {config.initial_probe}: expected a probe of {', '.join(wrong)}")
    return head.clone(remat=config.remat, dtype=dtype), params


def _sources(config: ConfigDict) -> tuple[ActionSource, ActionSource]:
    if config.data == EMBEDDED:
        shape = (config.frames, config.size, config.world_seed)
        return (
            open_world_motion("train", config.scenes, *shape),
            open_world_motion("heldout", config.heldout_scenes, *shape),
        )
    train, heldout = (
        open_action_videos(config.data, config.dataset, split, config.classes, config.allow_incomplete)
        for split in ("train", "val")
    )
    check_same_names(train, heldout)
    return train, heldout


def _sampling(config: ConfigDict) -> Sampling:
    if config.data == EMBEDDED:
        return Sampling(segments=1, frames=config.frames, stride=1, window="middle")
    return Sampling(config.segments, config.frames, config.stride, config.validation_window)


def _training_view(config: ConfigDict) -> TrainingView:
    return TrainingView(
        size=config.size,
        rand_augment=parse_rand_augment(config.rand_augment),
        scale=tuple(config.crop_scale),
        flip_probability=config.flip_probability,
        erase_probability=config.erase_probability,
    )


def _views(config: ConfigDict) -> SpatialViews:
    if config.data == EMBEDDED:  # rendered at the size that is asked for
        return SpatialViews(config.size, views=1, short_side=config.size)
    return SpatialViews(config.size, config.views, config.short_side)
