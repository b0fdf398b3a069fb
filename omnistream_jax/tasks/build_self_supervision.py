"""From a config to a task of self-supervision, on images or on clips."""

import math

from ml_collections import ConfigDict

from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.heads import DinoHead
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.tasks.build_fields import (
    data_of_task,
    open_sources,
    require,
    require_numbers,
    require_stride,
    require_whole_batches,
)
from omnistream_jax.tasks.self_supervision import SelfSupervisionSettings, SelfSupervisionTask


def gram_snapshots(config: ConfigDict) -> tuple[int, ...]:
    """After how many updates the Gram teacher becomes a copy of the EMA teacher; () with pre-trained weights."""
    gram = config.self_supervision.gram
    init = config.init
    if gram.backbone or init.backbone or (init.weights and "backbone" in (init.parts or ("backbone",))):
        return ()
    if gram.snapshot_every == 0:
        return (gram.first_snapshot,)
    return tuple(range(gram.first_snapshot, max(config.steps, gram.first_snapshot + 1), gram.snapshot_every))


def check_self_supervision(fields: ConfigDict) -> None:
    """Raises ConfigError for a value of `config.self_supervision` that cannot be."""
    name = "self_supervision"
    for field in ("prototypes", "head_hidden", "head_bottleneck"):
        require(fields[field] >= 1, f"{name}.{field}", fields[field], "1 or more")
    for field in ("prototype_std", "student_temperature", "rope_jitter"):
        require(fields[field] > 0, f"{name}.{field}", fields[field], "a positive number")
    for field in ("teacher_warmup_steps", "local_weight", "koleo_weight"):
        require(0 <= fields[field] < math.inf, f"{name}.{field}", fields[field], "0 or more")
    field, expected = f"{name}.teacher_temperature", "(first, last), both positive"
    temperature = require_numbers(field, fields.teacher_temperature, expected)
    require(min(temperature) > 0, field, temperature, expected)
    field, expected = f"{name}.teacher_momentum", "(first, last), both 0 to 1"
    momentum = require_numbers(field, fields.teacher_momentum, expected)
    require(min(momentum) >= 0 and max(momentum) <= 1, field, momentum, expected)
    gram = fields.gram
    require(0 <= gram.weight < math.inf, f"{name}.gram.weight", gram.weight, "0 or more")
    require(gram.first_snapshot >= 1, f"{name}.gram.first_snapshot", gram.first_snapshot, "1 or more")
    require(gram.snapshot_every >= 0, f"{name}.gram.snapshot_every", gram.snapshot_every, "0 or more")


def build_self_supervision(
    name: str, fields: ConfigDict, config: ConfigDict, backbone: Backbone, gram: BackboneConfig | None
) -> SelfSupervisionTask:
    """The task `name` of `config.tasks`, of kind "image" or "clip".

    Args:
        name, fields: of the task.
        config: of the run.
        backbone: the student's.
        gram: configuration of the Gram teacher's backbone; None if the term is off.
    """
    shared = config.self_supervision
    # KoLeo needs a neighbour, and DINO compares local crops with global ones.
    require(fields.batch_size >= 2, f"tasks.{name}.batch_size", fields.batch_size, "2 or more")
    require(fields.local_crops >= 1, f"tasks.{name}.local_crops", fields.local_crops, "1 or more")
    one = "1, for this loss compares the samples of its whole batch"
    require(fields.micro_batches == 1, f"tasks.{name}.micro_batches", fields.micro_batches, one)
    require_whole_batches(name, fields, config.mesh)
    snapshots = gram_snapshots(config)
    settings = SelfSupervisionSettings(
        student_temperature=shared.student_temperature,
        teacher_temperature=tuple(shared.teacher_temperature),
        teacher_warmup_steps=shared.teacher_warmup_steps,
        local_weight=shared.local_weight,
        koleo_weight=shared.koleo_weight,
        gram_weight=shared.gram.weight,
        gram_from_step=snapshots[0] if snapshots else 0,
        rope_jitter=shared.rope_jitter,
    )

    def head() -> DinoHead:
        return DinoHead(
            prototypes=shared.prototypes,
            hidden=shared.head_hidden,
            bottleneck=shared.head_bottleneck,
            prototype_std=shared.prototype_std,
            dtype=backbone.dtype,
        )

    with_gram = fields.kind == "image" and gram is not None
    patch = backbone.config.patch_size
    if with_gram:
        size, expected = shared.gram.size, f"0, or a positive multiple of model.patch_size {patch}"
        require(size >= 0 and size % patch == 0, "self_supervision.gram.size", size, expected)
    return SelfSupervisionTask(
        name=name,
        weight=fields.weight,
        data=_data(name, fields, patch, shared.gram.size if with_gram else 0),
        kind=fields.kind,
        backbone=backbone,
        dino_head=head(),
        ibot_head=head(),
        settings=settings,
        gram_backbone=Backbone(gram, dtype=backbone.dtype) if with_gram else None,
    )


def _data(name: str, fields: ConfigDict, patch_size: int, gram_size: int) -> SelfSupervisedData:
    sources, weights = open_sources(name, fields)
    clip = {} if fields.kind == "image" else {"frames": fields.frames, "stride": require_stride(name, fields)}
    with data_of_task(name):
        return SelfSupervisedData(
            sources=sources,
            global_batch_size=fields.batch_size,
            weights=weights,
            global_size=fields.global_size,
            local_size=fields.local_size,
            local_crops=fields.local_crops,
            patch_size=patch_size,
            mask_scheme="blocks" if fields.kind == "image" else "tubes",
            gram_size=gram_size or None,
            **clip,
        )
