"""From a config to the task of streaming geometry."""

import math

from ml_collections import ConfigDict

from omnistream_jax.config import ConfigError
from omnistream_jax.data.posed import PosedData
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.dpt import LEVELS
from omnistream_jax.models.geometry import GeometryHeads, geometry_config
from omnistream_jax.tasks.build_fields import (
    data_of_task,
    open_sources,
    require,
    require_numbers,
    require_stride,
    require_whole_batches,
)
from omnistream_jax.tasks.geometry import GeometrySettings, GeometryTask


def check_geometry(fields: ConfigDict) -> None:
    """Raises ConfigError for a value of `config.geometry` that cannot be."""
    name = "geometry"
    require(fields.alpha >= 0, f"{name}.alpha", fields.alpha, "0 or more")
    require(fields.gradient_scales >= 1, f"{name}.gradient_scales", fields.gradient_scales, "1 or more")
    require(fields.point_norm in ("l1", "l2"), f"{name}.point_norm", fields.point_norm, "l1 or l2")
    require(fields.rope_jitter > 0, f"{name}.rope_jitter", fields.rope_jitter, "a positive number")
    for term, weight in fields.weights.items():
        require(0 <= weight < math.inf, f"{name}.weights.{term}", weight, "0 or more")
    if fields.layers:
        expected = f"{LEVELS} blocks in their order, or () for the default"
        require_numbers(f"{name}.layers", fields.layers, expected, count=LEVELS, whole=True)
    expected = f"{LEVELS} multiples of 4"
    require_numbers(f"{name}.out_channels", fields.out_channels, expected, count=LEVELS, whole=True)


def build_geometry(name: str, fields: ConfigDict, config: ConfigDict, backbone: Backbone) -> GeometryTask:
    """The task `name` of `config.tasks`, of kind "posed"; arguments as of `build_self_supervision`."""
    shared, sizes = config.geometry, backbone.config
    require_whole_batches(name, fields, config.mesh)
    for side in ("height", "width"):
        fits = fields[side] >= sizes.patch_size and fields[side] % sizes.patch_size == 0
        require(fits, f"tasks.{name}.{side}", fields[side], f"a multiple of {sizes.patch_size}")
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
    sources, weights = open_sources(name, fields)
    expected = "(smallest, largest) within 0 to 1"
    crop_scale = require_numbers(f"tasks.{name}.crop_scale", fields.crop_scale, expected)
    strides = (require_stride(name, fields),) * len(sources) if fields.stride else None
    with data_of_task(name):
        data = PosedData(
            sources=sources,
            global_batch_size=fields.batch_size,
            weights=weights,
            frames=fields.frames,
            size=(fields.height, fields.width),
            strides=strides,
            crop_scale=crop_scale,
            colour=fields.colour,
        )
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
        remat=config.model.remat == "block",
        micro_batches=fields.micro_batches,
    )
