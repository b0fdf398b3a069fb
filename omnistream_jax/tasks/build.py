"""From a config to the backbone and the tasks that train it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from omnistream_jax.config import ConfigError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.posed import PosedData
from omnistream_jax.data.registry import ENTRIES, open_dataset
from omnistream_jax.data.sources import embedded_source, image_source, video_source
from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.models.backbone import Backbone, default_dtype
from omnistream_jax.models.geometry import GeometryHeads, geometry_config
from omnistream_jax.models.heads import DinoHead
from omnistream_jax.models.presets import BackboneConfig, preset
from omnistream_jax.optim import Optimizer, TeacherSchedule
from omnistream_jax.tasks.geometry import GeometrySettings, GeometryTask
from omnistream_jax.tasks.self_supervision import SelfSupervisionSettings, SelfSupervisionTask
from omnistream_jax.tasks.task import Task

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
EMBEDDED = "embedded"
_KINDS = {"image": "images", "clip": "videos", "posed": "posed"}  # of a task -> of its sources
_EXPECTED = {
    "image": "folders or .txt lists of photographs",
    "clip": "folders or .txt lists of videos",
    "posed": "data sets as NAME:DIR, the names being those of data/registry.py",
}


def build_backbone(config: ConfigDict) -> Backbone:
    """The student's backbone from `config.model`."""
    model = config.model
    changes = {} if model.patch_size == 0 else {"patch_size": model.patch_size}
    for field in ("layer_scale", "kernel_std"):
        _require(model[field] > 0, f"model.{field}", model[field], "a positive number")
        changes[field] = float(model[field])
    sizes = preset(model.preset, rope=model.rope, time_unit=float(model.time_unit), **changes)
    if model.dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"model.dtype: expected auto, {' or '.join(_DTYPES)}, got {model.dtype!r}")
    dtype = default_dtype() if model.dtype == "auto" else _DTYPES[model.dtype]
    return Backbone(sizes, dtype=dtype, remat=model.remat)


def build_tasks(config: ConfigDict, backbone: Backbone, gram: BackboneConfig | None) -> list[Task]:
    """The tasks of `config.tasks` whose weight is not 0.

    Args:
        config: of the run.
        backbone: the student's.
        gram: configuration of the Gram teacher's backbone; None if the term is off.
    """
    _check_self_supervision(config.self_supervision)
    _check_geometry(config.geometry)
    tasks = [
        _geometry(name, fields, config, backbone)
        if fields.kind == "posed"
        else _self_supervision(name, fields, config, backbone, gram)
        for name, fields in config.tasks.items()
        if fields.weight != 0
    ]
    if not tasks:
        raise ConfigError("tasks: every weight is 0, nothing would be trained")
    return tasks


def build_optimizer(config: ConfigDict) -> Optimizer:
    """The optimiser from `config.optimizer` and `config.steps`."""
    return Optimizer(steps=config.steps, **config.optimizer)


def gram_snapshots(config: ConfigDict) -> tuple[int, ...]:
    """After how many updates the Gram teacher becomes a copy of the EMA teacher; () with pre-trained weights."""
    gram = config.self_supervision.gram
    if gram.backbone or config.init.backbone:
        return ()
    if gram.snapshot_every == 0:
        return (gram.first_snapshot,)
    return tuple(range(gram.first_snapshot, max(config.steps, gram.first_snapshot + 1), gram.snapshot_every))


def teacher_schedule(config: ConfigDict) -> TeacherSchedule:
    """How the EMA and the Gram teacher follow the student."""
    return TeacherSchedule(tuple(config.self_supervision.teacher_momentum), gram_snapshots(config))


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {value!r}")


def _check_self_supervision(fields: ConfigDict) -> None:
    name = "self_supervision"
    for field in ("prototypes", "head_hidden", "head_bottleneck"):
        _require(fields[field] >= 1, f"{name}.{field}", fields[field], "1 or more")
    for field in ("prototype_std", "student_temperature", "rope_jitter"):
        _require(fields[field] > 0, f"{name}.{field}", fields[field], "a positive number")
    temperature, momentum = tuple(fields.teacher_temperature), tuple(fields.teacher_momentum)
    fits = len(temperature) == 2 and min(temperature) > 0
    _require(fits, f"{name}.teacher_temperature", temperature, "(first, last), both positive")
    fits = len(momentum) == 2 and 0 <= min(momentum) <= max(momentum) <= 1
    _require(fits, f"{name}.teacher_momentum", momentum, "(first, last), both 0 to 1")
    gram = fields.gram
    _require(gram.first_snapshot >= 1, f"{name}.gram.first_snapshot", gram.first_snapshot, "1 or more")
    _require(gram.snapshot_every >= 0, f"{name}.gram.snapshot_every", gram.snapshot_every, "0 or more")


def _self_supervision(
    name: str, fields: ConfigDict, config: ConfigDict, backbone: Backbone, gram: BackboneConfig | None
) -> SelfSupervisionTask:
    shared = config.self_supervision
    if fields.kind not in ("image", "clip"):
        raise ConfigError(f"tasks.{name}.kind: expected image, clip or posed, got {fields.kind!r}")
    # KoLeo needs a neighbour, and DINO compares local crops with global ones.
    _require(fields.batch_size >= 2, f"tasks.{name}.batch_size", fields.batch_size, "2 or more")
    _require(fields.local_crops >= 1, f"tasks.{name}.local_crops", fields.local_crops, "1 or more")
    _require_whole_batches(name, fields)
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
    return SelfSupervisionTask(
        name=name,
        weight=fields.weight,
        data=_data(name, fields, backbone.config.patch_size, shared.gram.size if with_gram else 0),
        kind=fields.kind,
        backbone=backbone,
        dino_head=head(),
        ibot_head=head(),
        settings=settings,
        gram_backbone=Backbone(gram, dtype=backbone.dtype) if with_gram else None,
    )


def _require_whole_batches(name: str, fields: ConfigDict) -> None:
    devices = jax.device_count()
    whole = fields.batch_size >= 1 and fields.batch_size % devices == 0
    _require(whole, f"tasks.{name}.batch_size", fields.batch_size, f"a multiple of the {devices} devices")


def _check_geometry(fields: ConfigDict) -> None:
    name = "geometry"
    _require(fields.alpha >= 0, f"{name}.alpha", fields.alpha, "0 or more")
    _require(fields.gradient_scales >= 1, f"{name}.gradient_scales", fields.gradient_scales, "1 or more")
    _require(fields.point_norm in ("l1", "l2"), f"{name}.point_norm", fields.point_norm, "l1 or l2")
    _require(fields.rope_jitter > 0, f"{name}.rope_jitter", fields.rope_jitter, "a positive number")
    for term, weight in fields.weights.items():
        _require(weight >= 0, f"{name}.weights.{term}", weight, "0 or more")


def _geometry(name: str, fields: ConfigDict, config: ConfigDict, backbone: Backbone) -> GeometryTask:
    shared, sizes = config.geometry, backbone.config
    _require_whole_batches(name, fields)
    for side in ("height", "width"):
        fits = fields[side] >= sizes.patch_size and fields[side] % sizes.patch_size == 0
        _require(fits, f"tasks.{name}.{side}", fields[side], f"a multiple of {sizes.patch_size}")
    try:
        heads = geometry_config(
            sizes.depth,
            tuple(shared.layers),
            features=shared.features,
            out_channels=tuple(shared.out_channels),
            units=shared.units,
        )
    except ValueError as error:
        raise ConfigError(f"geometry.{error}") from error
    sources, weights = _sources(name, fields)
    try:
        data = PosedData(
            sources=sources,
            global_batch_size=fields.batch_size,
            weights=weights,
            frames=fields.frames,
            size=(fields.height, fields.width),
            strides=(tuple(fields.stride),) * len(sources) if fields.stride else None,
            crop_scale=tuple(fields.crop_scale),
            colour=fields.colour,
        )
    except DataError as error:
        raise ConfigError(f"tasks.{name}.{error}") from error
    return GeometryTask(
        name=name,
        weight=fields.weight,
        data=data,
        backbone=backbone,
        geometry_heads=GeometryHeads(heads, sizes.width, sizes.patch_size, backbone.dtype),
        settings=GeometrySettings(
            alpha=shared.alpha,
            gradient_scales=shared.gradient_scales,
            point_norm=shared.point_norm,
            ray_confidence=shared.ray_confidence,
            rope_jitter=shared.rope_jitter,
            **{f"{term}_weight": weight for term, weight in shared.weights.items()},
        ),
        remat=config.model.remat,
    )


def _sources(name: str, fields: ConfigDict) -> tuple[tuple[Any, ...], tuple[float, ...] | None]:
    """The sources of a task's paths and their shares."""
    sources = tuple(_source(name, fields, path.strip()) for path in fields.paths.split(",") if path.strip())
    if not sources:
        raise ConfigError(f"tasks.{name}.paths: give {_EXPECTED[fields.kind]}, separated by commas")
    weights = tuple(fields.path_weights)
    if weights and len(weights) != len(sources):
        raise ConfigError(f"tasks.{name}.path_weights: {len(weights)} are given for {len(sources)} paths")
    return sources, weights or None


def _data(name: str, fields: ConfigDict, patch_size: int, gram_size: int) -> SelfSupervisedData:
    sources, weights = _sources(name, fields)
    clip = {} if fields.kind == "image" else {"frames": fields.frames, "stride": tuple(fields.stride)}
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


def _source(name: str, fields: ConfigDict, path: str) -> Any:
    """What one entry of a task's paths names: EMBEDDED, DATASET:DIR of data/registry.py, or a folder, list or file."""
    kind = _KINDS[fields.kind]
    dataset, colon, root = path.partition(":")
    sampling = {}
    if kind == "videos":
        sampling = {"short_side": fields.short_side or None, "frame_rate": fields.frame_rate or None}
    try:
        if path == EMBEDDED and kind == "posed":  # rendered as large as it is needed
            return open_dataset("world", "train", size=max(fields.height, fields.width))
        if path == EMBEDDED:
            return embedded_source(kind, "train")
        if colon and dataset in ENTRIES:
            if ENTRIES[dataset].kind != kind:
                raise ConfigError(f"tasks.{name}.paths: {dataset} holds {ENTRIES[dataset].kind}, expected {kind}")
            source = open_dataset(dataset, root)
            return dataclasses.replace(source, **sampling) if sampling else source
        if kind == "posed":
            raise ConfigError(f"tasks.{name}.paths: {path!r}, expected {_EXPECTED[fields.kind]}")
        return image_source(path) if kind == "images" else video_source(path, **sampling)
    except DataError as error:
        raise ConfigError(f"tasks.{name}.paths: {error}") from error
