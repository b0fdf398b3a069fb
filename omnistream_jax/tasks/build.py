"""From a config to the backbone, the tasks that train it and how it is updated."""

import math

import jax.numpy as jnp
from ml_collections import ConfigDict

from omnistream_jax.config import ConfigError
from omnistream_jax.models.backbone import Backbone, default_dtype
from omnistream_jax.models.block import REMAT
from omnistream_jax.models.presets import BackboneConfig, preset
from omnistream_jax.optim import Optimizer, TeacherSchedule
from omnistream_jax.tasks.build_caption import build_caption, check_language
from omnistream_jax.tasks.build_fields import KINDS, require
from omnistream_jax.tasks.build_geometry import build_geometry, check_geometry
from omnistream_jax.tasks.build_self_supervision import (
    build_self_supervision,
    check_self_supervision,
    gram_snapshots,
)
from omnistream_jax.tasks.task import Task

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_backbone(config: ConfigDict) -> Backbone:
    """The student's backbone from `config.model`."""
    model = config.model
    changes = {} if model.patch_size == 0 else {"patch_size": model.patch_size}
    for field in ("layer_scale", "kernel_std"):
        require(model[field] > 0, f"model.{field}", model[field], "a positive number")
        changes[field] = float(model[field])
    try:
        sizes = preset(model.preset, rope=model.rope, time_unit=float(model.time_unit), **changes)
    except ValueError as error:
        raise ConfigError(f"model.{str(error).removeprefix('model.')}") from error
    if model.dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"model.dtype: expected auto, {' or '.join(_DTYPES)}, got {model.dtype!r}")
    require(model.remat in REMAT, "model.remat", model.remat, " or ".join(REMAT))
    dtype = default_dtype() if model.dtype == "auto" else _DTYPES[model.dtype]
    return Backbone(sizes, dtype=dtype, remat=model.remat)


def trains(config: ConfigDict, kind: str) -> bool:
    """Whether a task of the kind, one of `build_fields.KINDS`, is trained."""
    return any(fields.kind == kind and fields.weight != 0 for fields in config.tasks.values())


def trains_gram(config: ConfigDict) -> bool:
    """Whether there is a Gram teacher: its term is one of self-supervision on images."""
    return config.self_supervision.gram.weight != 0 and trains(config, "image")


def build_tasks(config: ConfigDict, backbone: Backbone, gram: BackboneConfig | None) -> list[Task]:
    """The tasks of `config.tasks` whose weight is not 0.

    Args:
        config: of the run.
        backbone: the student's.
        gram: configuration of the Gram teacher's backbone; None if the term is off.
    """
    check_self_supervision(config.self_supervision)
    check_geometry(config.geometry)
    check_language(config.language)
    tasks = [_task(name, fields, config, backbone, gram) for name, fields in config.tasks.items() if fields.weight != 0]
    if not tasks:
        raise ConfigError("tasks: every weight is 0, nothing would be trained")
    return tasks


def _task(name: str, fields: ConfigDict, config: ConfigDict, backbone: Backbone, gram: BackboneConfig | None) -> Task:
    *others, last = KINDS
    require(fields.kind in KINDS, f"tasks.{name}.kind", fields.kind, f"{', '.join(others)} or {last}")
    require(0 <= fields.weight < math.inf, f"tasks.{name}.weight", fields.weight, "0 or more")
    if fields.kind == "posed":
        return build_geometry(name, fields, config, backbone)
    if fields.kind == "captioned":
        return build_caption(name, fields, config, backbone)
    return build_self_supervision(name, fields, config, backbone, gram)


def build_optimizer(config: ConfigDict) -> Optimizer:
    """The optimiser from `config.optimizer` and `config.steps`."""
    return Optimizer(steps=config.steps, **config.optimizer)


def teacher_schedule(config: ConfigDict) -> TeacherSchedule:
    """How the EMA and the Gram teacher follow the student."""
    return TeacherSchedule(tuple(config.self_supervision.teacher_momentum), gram_snapshots(config))
