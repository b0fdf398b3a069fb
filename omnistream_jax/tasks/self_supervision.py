"""Self-supervision of images and clips, L_ssl = L_DINO + L_iBOT + 0.1 L_KoLeo + L_gram (OmniStream eq. 5, 11-15).

An image is a clip of one frame: both tasks are this class, with other data, masks and, for images, the Gram term.
Letters: B samples, G = 2 global and L local crops, T frames, N = h * w patches, K prototypes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.losses.dino import dino_loss, teacher_entropy
from omnistream_jax.losses.gram import gram_loss, resize_patches
from omnistream_jax.losses.ibot import ibot_loss
from omnistream_jax.losses.koleo import koleo_loss
from omnistream_jax.losses.sinkhorn import sinkhorn_knopp
from omnistream_jax.models.backbone import Backbone, BackboneOutput
from omnistream_jax.models.heads import DinoHead
from omnistream_jax.ops.rope import random_scale
from omnistream_jax.optim import linear
from omnistream_jax.tasks.task import Params, Teachers


@dataclasses.dataclass(frozen=True)
class SelfSupervisionSettings:
    """Constants of L_ssl; the defaults are OmniStream's (eq. 5, 11-15).

    Attributes:
        student_temperature: of the student's softmax.
        teacher_temperature: (first, last) of the teacher's, along a line over `teacher_warmup_steps`.
        teacher_warmup_steps: length of that warm-up.
        local_weight: weight of the local crops' DINO term.
        koleo_weight: weight of KoLeo, once per global crop.
        gram_weight: weight of the Gram term.
        gram_from_step: the Gram term is on from this step, and reads the Gram teacher.
        rope_jitter: the coordinates of the student's rotary positions are scaled by factors log-uniform in
            [1 / rope_jitter, rope_jitter], one for time and one for space; 1 for none.
    """

    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_warmup_steps: int = 37_500
    local_weight: float = 0.5
    koleo_weight: float = 0.1
    gram_weight: float = 1.0
    gram_from_step: int = 0
    rope_jitter: float = 2.0


@dataclasses.dataclass(frozen=True)
class SelfSupervisionTask:
    """A `Task`; see `tasks/task.py`.

    Attributes:
        name, weight, data: as of every task.
        kind: "image" or "clip": how the iBOT metric is called, and whether there is a Gram term (images).
        backbone: the student's and the EMA teacher's module.
        dino_head, ibot_head: the projection heads, shared by both kinds.
        settings: constants of the losses.
        gram_backbone: the Gram teacher's module; None leaves the term out.
    """

    name: str
    weight: float
    data: SelfSupervisedData
    kind: str
    backbone: Backbone
    dino_head: DinoHead
    ibot_head: DinoHead
    settings: SelfSupervisionSettings
    gram_backbone: Backbone | None = None
    has_teacher: bool = True
    micro_batches: ClassVar[int] = 1  # Sinkhorn-Knopp and KoLeo compare the samples of the whole batch

    @property
    def heads(self) -> Mapping[str, Callable[[jax.Array], Params]]:
        """The DINO and the iBOT head."""
        return {
            "dino_head": functools.partial(_init_head, self.dino_head, self.backbone.config.width),
            "ibot_head": functools.partial(_init_head, self.ibot_head, self.backbone.config.width),
        }

    def loss(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted sum of the terms, and each term; see `Task.loss` and `SelfSupervisedBatch`."""
        settings = self.settings
        samples, views = batch["global_crops"].shape[:2]
        temperature = linear(*settings.teacher_temperature, teachers.step, settings.teacher_warmup_steps)
        masks = _merged(batch["masks"])  # [B * G, T, h, w]
        rows = _MaskedRows.of(masks, self.data.max_masked)

        teacher = self._targets(teachers.ema, batch, rows, temperature)
        global_key, local_key = jax.random.split(key)
        student = self._student(params["backbone"], batch["global_crops"], global_key, masks)
        student_local = self._student(params["backbone"], batch["local_crops"], local_key, None)

        def dino_logits(out: BackboneOutput) -> jax.Array:  # [crops, B, K]
            return _by_crop(self.dino_head.apply({"params": params["dino_head"]}, _clip_token(out)), samples)

        compare = functools.partial(dino_loss, teacher_probs=teacher.cls_probs)
        temperature_s = settings.student_temperature
        dino_global = compare(dino_logits(student), student_temperature=temperature_s, ignore_diagonal=True)
        dino_local = compare(dino_logits(student_local), student_temperature=temperature_s)
        pairs_global, pairs_local = views * (views - 1), views * batch["local_crops"].shape[1]
        share = pairs_global / (pairs_global + pairs_local)
        dino = share * dino_global + (1 - share) * settings.local_weight * dino_local

        patch_logits = self.ibot_head.apply({"params": params["ibot_head"]}, rows.gather(student.patches))
        ibot = ibot_loss(patch_logits, teacher.patch_probs, rows.weight, masks.shape[0], temperature_s)

        koleo = sum(koleo_loss(view) for view in _by_crop(_clip_token(student), samples)) / views

        metrics = {
            "dino_global": dino_global,
            "dino_local": dino_local,
            f"ibot_{self.kind}": ibot,
            "koleo": koleo,
            "teacher_entropy": teacher.entropy,
            f"teacher_entropy_{self.kind}": teacher.entropy,
            "target_entropy": teacher.target_entropy,
        }
        total = dino + ibot + settings.koleo_weight * views * koleo
        if self.gram_backbone is not None:
            metrics["gram"] = self._gram(student, teachers, batch)
            total += settings.gram_weight * metrics["gram"]
        return total, metrics

    def _student(self, params: Params, crops: jax.Array, key: jax.Array, masks: jax.Array | None) -> BackboneOutput:
        """Features of crops [B, C, T, H, W, 3]: [B * C, T, ...]."""
        scale = random_scale(key, self.settings.rope_jitter)
        return self.backbone.apply({"params": params}, _merged(crops), masks=masks, rope_scale=scale, layers=())

    def _targets(
        self, ema: Params, batch: Mapping[str, jax.Array], rows: "_MaskedRows", temperature: jax.Array
    ) -> "_Targets":
        """The EMA teacher's centred probabilities on the unmasked global crops."""
        out = self.backbone.apply({"params": ema["backbone"]}, _merged(batch["global_crops"]), layers=())
        samples = batch["global_crops"].shape[0]
        cls_logits = self.dino_head.apply({"params": ema["dino_head"]}, _clip_token(out))  # [B * G, K]
        patch_logits = self.ibot_head.apply({"params": ema["ibot_head"]}, rows.gather(out.patches))
        cls_probs = sinkhorn_knopp(cls_logits, temperature)
        entropy = teacher_entropy(cls_logits, cls_probs, temperature)
        return _Targets(
            cls_probs=_by_crop(cls_probs, samples),
            patch_probs=sinkhorn_knopp(patch_logits, temperature, row_mask=rows.real),
            entropy=entropy.batch_mean,
            target_entropy=entropy.targets,
        )

    def _gram(self, student: BackboneOutput, teachers: Teachers, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The Gram term of the global crops of images; 0 until the Gram teacher stands."""
        crops = _merged(batch.get("gram_crops", batch["global_crops"]))
        student_patches = student.patches[:, 0]  # [B * G, h, w, d]

        def encode() -> jax.Array:
            return self.gram_backbone.apply({"params": teachers.gram}, crops, layers=()).patches[:, 0]

        # Nothing but its features leaves the condition: what is kept in it for the backward pass, such as similarities,
        # XLA would gather on every device.
        stands = teachers.step >= self.settings.gram_from_step
        nothing = jax.eval_shape(encode)
        target = jax.lax.cond(stands, encode, lambda: jnp.zeros(nothing.shape, nothing.dtype))
        target = resize_patches(jax.lax.stop_gradient(target), *student_patches.shape[1:3])
        rows = (student_patches.shape[0], -1)  # the teacher's width may be another
        loss = gram_loss(
            student_patches.reshape(*rows, student_patches.shape[-1]), target.reshape(*rows, target.shape[-1])
        )
        return jnp.where(stands, loss, 0.0)


@dataclasses.dataclass(frozen=True)
class _Targets:
    cls_probs: jax.Array  # [G, B, K]
    patch_probs: jax.Array  # [M, K]
    entropy: jax.Array
    target_entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class _MaskedRows:
    """The masked patches of each crop, gathered into a static number R of rows a crop; rows left over are padding.

    Rows stay with their crop, so that a batch that is split over devices stays split.
    """

    index: jax.Array  # [B * G, R] into the T * N patches of a crop
    real: jax.Array  # bool [B * G * R]
    weight: jax.Array  # [B * G * R], 1 / masked patches of the row's crop, 0 for padding

    @classmethod
    def of(cls, masks: jax.Array, count: int) -> "_MaskedRows":
        """The rows of masks [B * G, T, h, w], at most `count` of them set in a crop."""
        flat = masks.reshape(masks.shape[0], -1)
        index = jnp.argsort(~flat, axis=1, stable=True)[:, :count]
        real = jnp.take_along_axis(flat, index, axis=1)
        weight = real / jnp.maximum(flat.sum(1, keepdims=True), 1)
        return cls(index, real.reshape(-1), weight.reshape(-1))

    def gather(self, patches: jax.Array) -> jax.Array:
        """Patches [B * G, T, h, w, d] at the rows: [B * G * R, d]."""
        width = patches.shape[-1]
        rows = jnp.take_along_axis(patches.reshape(len(self.index), -1, width), self.index[..., None], axis=1)
        return rows.reshape(-1, width)


def _merged(crops: jax.Array) -> jax.Array:
    """[B, C, ...] to [B * C, ...]: samples outermost, the axis that is split over devices."""
    return crops.reshape(-1, *crops.shape[2:])


def _by_crop(rows: jax.Array, samples: int) -> jax.Array:
    """[B * C, K] to [C, B, K]."""
    return rows.reshape(samples, -1, rows.shape[-1]).swapaxes(0, 1)


def _clip_token(out: BackboneOutput) -> jax.Array:
    """The mean over time of the CLS tokens, float32 [B * C, d]."""
    return out.cls.astype(jnp.float32).mean(axis=1)


def _init_head(head: DinoHead, width: int, key: jax.Array) -> Params:
    return head.init(key, jnp.zeros((1, width)))["params"]
