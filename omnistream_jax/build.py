"""From a config to all that the steps need, with the state before the first one.

What a run starts from where it has no checkpoint of its own: the weights that `init.backbone` and `init.decoder` name,
else random parameters.
"""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.convert import layouts
from omnistream_jax.convert.initialise import check_decoder, gram_config, initial_backbone
from omnistream_jax.convert.qwen3 import load_decoder
from omnistream_jax.data.embedded import heldout_clip
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.qwen3 import Qwen3Config
from omnistream_jax.optim import Optimizer
from omnistream_jax.sharding import make_mesh, replicated
from omnistream_jax.step import TrainState, init_params, init_state
from omnistream_jax.tasks.build import build_backbone, build_optimizer, build_tasks
from omnistream_jax.tasks.caption import DECODER, CaptionTask
from omnistream_jax.tasks.task import Params, Task


@dataclasses.dataclass(frozen=True)
class Run:
    """What is built from a config before the first step."""

    backbone: Backbone
    tasks: Sequence[Task]
    optimizer: Optimizer
    initial: Params
    state: TrainState


def build(config: ConfigDict) -> Run:
    """Everything that the steps need, with the state before the first one.

    Raises:
        ConfigError: a field does not fit.
        WeightsError: the pre-trained weights cannot be read or do not fit the model.
    """
    start = layouts.read(config.init.backbone) if config.init.backbone else None
    decoder = _read_decoder(config)
    gram_path = config.self_supervision.gram.backbone
    gram_weights = layouts.read(gram_path) if gram_path else start
    try:
        _check(config)
        backbone, optimizer = build_backbone(config), build_optimizer(config)
        gram = None
        if config.self_supervision.gram.weight != 0:
            gram = backbone.config if gram_weights is None else gram_config(gram_weights)
        tasks = build_tasks(config, backbone, gram)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error

    params = init_params(backbone, tasks, config.seed)
    try:
        optimizer.check_factors(params)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error
    if start is not None:
        params = {**params, "backbone": initial_backbone(start, backbone.config, params["backbone"])}
    if decoder is not None:
        params = {**params, DECODER: _initial_decoder(decoder, tasks)}
    whole = replicated(make_mesh())
    params = jax.device_put(params, whole)
    # Without pre-trained weights the Gram teacher holds a place until its first snapshot.
    gram_params = params["backbone"] if gram_weights is None else gram_weights.params
    state = init_state(params, tasks, optimizer, None if gram is None else jax.tree.map(jnp.copy, gram_params))
    return Run(backbone, tasks, optimizer, jax.device_get(params["backbone"]), jax.device_put(state, whole))


def _read_decoder(config: ConfigDict) -> tuple[Qwen3Config, Params] | None:
    """What `init.decoder` names, if a task trains a decoder."""
    trained = any(fields.kind == "captioned" and fields.weight != 0 for fields in config.tasks.values())
    return load_decoder(config.init.decoder) if config.init.decoder and trained else None


def _initial_decoder(weights: tuple[Qwen3Config, Params], tasks: Sequence[Task]) -> Params:
    """The weights' parameters. Raises WeightsError where they are not of the size that is trained."""
    task = next(task for task in tasks if isinstance(task, CaptionTask))
    check_decoder(weights[0], task.decoder.config)
    return weights[1]


def _check(config: ConfigDict) -> None:
    """What would else fail only after hours of training."""
    least = {"seed": 0, "log_every": 1, "checkpoint.every": 1, "checkpoint.keep_last": 1, "checkpoint.keep_every": 0}
    least |= {"evaluation.picture_frames": 1, "evaluation.geometry_scenes": 1, "evaluation.caption_records": 2}
    for field, smallest in least.items():
        value = operator.attrgetter(field)(config)
        if value < smallest:
            raise config_lib.ConfigError(f"{field}: expected {smallest} or more, got {value}")
    patch = build_backbone(config).config.patch_size
    for field in ("picture_size", "retrieval_size", "geometry_size"):
        side = config.evaluation[field]
        if side < patch or side % patch:
            raise config_lib.ConfigError(f"evaluation.{field}: expected a multiple of {patch}, got {side}")
    heldout_clip(config.evaluation.picture_frames, patch, patch)
