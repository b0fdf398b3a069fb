"""From a config to all that the steps need, with the state before the first one.

What a run starts from where it has no checkpoint of its own: the weights that `init.backbone`, `init.decoder` and
`init.weights` name, else random parameters.
"""

import dataclasses
import operator
from collections.abc import Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.convert import layouts
from omnistream_jax.convert.initialise import check_decoder, gram_config, initial_backbone
from omnistream_jax.convert.qwen3 import load_decoder
from omnistream_jax.data.embedded import heldout_clip
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.projector import DECODER
from omnistream_jax.models.qwen3 import Qwen3Config
from omnistream_jax.optim import Optimizer
from omnistream_jax.sharding import host_copy, make_mesh, put_on_mesh, state_shardings
from omnistream_jax.step import TrainState, init_params, init_state
from omnistream_jax.tasks.build import build_backbone, build_optimizer, build_tasks, trains, trains_gram
from omnistream_jax.tasks.build_fields import check_loader, require
from omnistream_jax.tasks.caption import CaptionTask
from omnistream_jax.tasks.task import Params, Task
from omnistream_jax.weights import find_checkpoint, restore_weights, taken_parts


@dataclasses.dataclass(frozen=True)
class Run:
    """What is built from a config before the first step.

    Attributes:
        backbone: the student's module.
        tasks: what it is trained on.
        optimizer: how it is updated.
        mesh: of the devices that it uses.
        initial: the backbone's parameters before the first step, in the host's memory.
        state: before the first step, laid out on the mesh.
    """

    backbone: Backbone
    tasks: Sequence[Task]
    optimizer: Optimizer
    mesh: Mesh
    initial: Params
    state: TrainState

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lies, before and after every step."""
        return state_shardings(self.mesh, self.state)


def build(config: ConfigDict) -> Run:
    """Everything that the steps need, with the state before the first one.

    Raises:
        ConfigError: a field does not fit.
        WeightsError: the pre-trained weights cannot be read or do not fit the model.
    """
    if config.init.weights:
        find_checkpoint(config.init.weights)  # what is missing is told before minutes are spent
    start = layouts.read(config.init.backbone) if config.init.backbone else None
    decoder = _read_decoder(config)
    gram_weights = _read_gram(config) or start
    try:
        _check(config)
        mesh = make_mesh(**config.mesh)
        backbone, optimizer = build_backbone(config), build_optimizer(config)
        gram = None
        if trains_gram(config):
            gram = backbone.config if gram_weights is None else gram_config(gram_weights)
        tasks = build_tasks(config, backbone, gram)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error

    try:
        params = init_params(backbone, tasks, config.seed, mesh)
        optimizer.check_factors(params)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error
    if taken := taken_parts(config, tuple(params)):
        params |= restore_weights(config.init.weights, {part: params[part] for part in taken}, config)
    if start is not None:
        params = {**params, "backbone": initial_backbone(start, backbone.config, params["backbone"])}
    if decoder is not None:
        params = {**params, DECODER: _initial_decoder(decoder, tasks)}
    params = put_on_mesh(params, state_shardings(mesh, params))
    gram_params = None
    if gram is not None:  # without pre-trained weights the Gram teacher holds a place until its first snapshot
        gram_params = params["backbone"] if gram_weights is None else gram_weights.params
        gram_params = put_on_mesh(gram_params, state_shardings(mesh, gram_params))
    initial = host_copy(params["backbone"])
    return Run(backbone, tasks, optimizer, mesh, initial, init_state(params, tasks, optimizer, gram_params, mesh))


def _read_decoder(config: ConfigDict) -> tuple[Qwen3Config, Params] | None:
    if not config.init.decoder:
        return None
    if not trains(config, "captioned"):
        raise config_lib.ConfigError("init.decoder: no task trains a decoder; expected none")
    return load_decoder(config.init.decoder)


def _read_gram(config: ConfigDict) -> layouts.Weights | None:
    path = config.self_supervision.gram.backbone
    if not path:
        return None
    if not trains_gram(config):
        raise config_lib.ConfigError(
            "self_supervision.gram.backbone: there is no Gram teacher (no task of images, or gram.weight 0); "
            "expected none"
        )
    return layouts.read(path)


def _initial_decoder(weights: tuple[Qwen3Config, Params], tasks: Sequence[Task]) -> Params:
    """The weights' parameters. Raises WeightsError where they are not of the size that is trained."""
    task = next(task for task in tasks if isinstance(task, CaptionTask))
    check_decoder(weights[0], task.decoder.config)
    return weights[1]


def _check(config: ConfigDict) -> None:
    """What would else fail only after hours of training, or start one that nobody meant."""
    require(not config.get("topology"), "topology", config.get("topology"), "none but with job=plan")
    least = {"seed": 0, "log_every": 1, "checkpoint.every": 1, "checkpoint.keep_last": 1, "checkpoint.keep_every": 0}
    least |= {"max_nonfinite_steps": 0, "loader.prefetch": 0, "loader.workers": 0, "loader.max_restarts": 0}
    least |= {"distributed.step_deadline_seconds": 0, "pictures_every": 0, "profile.start": 1, "profile.steps": 0}
    least |= {"evaluation.picture_frames": 1, "evaluation.geometry_scenes": 1, "evaluation.caption_records": 2}
    for field, smallest in least.items():
        value = operator.attrgetter(field)(config)
        require(value >= smallest, field, value, f"{smallest} or more")
    require(config.seed < 2**32, "seed", config.seed, f"0 to {2**32 - 1}")
    code = config.requeue_exit_code  # 1 and 2 mean errors (main.py), more than 125 a signal, and 256 would be 0
    require(3 <= code <= 125, "requeue_exit_code", code, "3 to 125")
    check_loader(config.loader)
    patch = build_backbone(config).config.patch_size
    for field in ("picture_size", "retrieval_size", "geometry_size"):
        side = config.evaluation[field]
        require(side >= patch and side % patch == 0, f"evaluation.{field}", side, f"a multiple of {patch}")
    heldout_clip(config.evaluation.picture_frames, patch, patch)
