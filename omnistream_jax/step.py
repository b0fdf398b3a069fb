"""The training step: a program per task that adds its gradient to a buffer, and one that updates.

Unlike tasks keep their unlike shapes, and peak memory is that of the largest task, not of their sum. Where the arrays
lie on a mesh, and what is sent, is told in sharding.py; without a mesh all is on one device.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from omnistream_jax.losses.means import add_means
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.optim import Optimizer, TeacherSchedule, cosine
from omnistream_jax.sharding import gathered, replicated, split_batch, split_micro_batches, state_shardings
from omnistream_jax.tasks.task import Params, Task, Teachers

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
        step: int32, updates made so far.
        params: {"backbone": ..., head name: ...}, float32.
        optimizer: optax's state.
        ema: the EMA teacher, of the same structure as `params`, float32: in bfloat16 a momentum above 0.996 would
            change nothing; {} if no task has a teacher.
        gram: the Gram teacher's backbone, float32, or None.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    ema: Params
    gram: Params | None


def fresh_params(backbone: Backbone, tasks: Sequence[Task], seed: int) -> Params:
    """Random parameters of the backbone and of every head; each depends on the seed and its own name only."""
    size = backbone.config.patch_size
    frames = jnp.zeros((1, 1, size, size, 3))
    initialisers: dict[str, Callable[[jax.Array], Params]] = {
        "backbone": lambda key: backbone.init(key, frames)["params"]
    }
    for task in tasks:
        initialisers |= task.heads
    key = jax.random.key(seed)
    return {name: init(_named_key(key, name)) for name, init in sorted(initialisers.items())}


def init_params(backbone: Backbone, tasks: Sequence[Task], seed: int, mesh: Mesh | None = None) -> Params:
    """`fresh_params`, compiled. On a mesh every device makes its own part, and the whole has the same numbers."""
    initialise = functools.partial(fresh_params, backbone, tasks, seed)
    # It runs once: better soon than fast. On a CPU a third of the time of compiling array by array.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    placed = None if mesh is None else state_shardings(mesh, jax.eval_shape(initialise))
    return jax.jit(initialise, out_shardings=placed, compiler_options=options)()


def init_state(
    params: Params, tasks: Sequence[Task], optimizer: Optimizer, gram: Params | None, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step, laid out on the mesh; the teachers start as copies of what is given."""
    has_teacher = any(task.has_teacher for task in tasks)

    def start(params: Params, gram: Params | None) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=optimizer.transform().init(params),
            ema=jax.tree.map(jnp.copy, params) if has_teacher else {},
            gram=jax.tree.map(jnp.copy, gram),
        )

    placed = None if mesh is None else state_shardings(mesh, jax.eval_shape(start, params, gram))
    return jax.jit(start, out_shardings=placed)(params, gram)


def zero_gradients(state: TrainState) -> Params:
    """The buffer of gradients before the first task of a step, laid out as the parameters are."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    return jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=placed)(state.params)


def make_accumulate(
    task: Task, seed: int, shardings: TrainState | None = None
) -> Callable[[TrainState, Params, Mapping[str, jax.Array]], tuple[Params, Metrics]]:
    """The program (state, gradients, batch) -> (gradients + weight * gradient of the task, its metrics).

    A task of `micro_batches` > 1 visits as many parts of its batch one after the other; see `Task.means`.

    Args:
        task: the objective.
        seed: of the run.
        shardings: of the state, a `NamedSharding` a leaf (`sharding.state_shardings`): gradients lie as the parameters
            do and metrics are whole everywhere. None: one device.
    """

    def accumulate(state: TrainState, gradients: Params, batch: Mapping[str, jax.Array]) -> tuple[Params, Metrics]:
        key = jax.random.fold_in(_named_key(jax.random.key(seed), task.name), state.step)
        with _mesh_of(shardings):
            teachers = Teachers(state.step, gathered(state.ema), gathered(state.gram))
            if task.micro_batches > 1:
                return _accumulate_parts(task, state.params, teachers, batch, key, gradients)

            def weighted_loss(params: Params) -> tuple[jax.Array, Metrics]:
                loss, metrics = task.loss(gathered(params), teachers, batch, key)
                return task.weight * loss, {"loss": loss, **metrics}

            gradient, metrics = jax.grad(weighted_loss, has_aux=True)(state.params)
            return jax.tree.map(jnp.add, gradients, gradient), metrics

    placed = {}
    if shardings is not None:
        mesh = shardings.step.mesh
        placed["in_shardings"] = (shardings, shardings.params, split_batch(mesh))
        placed["out_shardings"] = (shardings.params, replicated(mesh))
    return jax.jit(accumulate, donate_argnums=1, **placed)


def _accumulate_parts(
    task: Task,
    params: Params,
    teachers: Teachers,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    gradients: Params,
) -> tuple[Params, Metrics]:
    """`gradients` + weight * gradient of the whole batch's loss, and its metrics, one micro-batch at a time.

    A loss of means has one gradient however its batch is cut, if each sum is divided by the whole batch's count.
    Counts depend on the data alone: they are added up first, without running the networks.
    """
    parts = split_micro_batches(batch, task.micro_batches)

    def counts_of(part: Mapping[str, jax.Array]) -> Any:
        means = task.means(params, teachers, part, key)
        return {name: [mean.count for mean in terms] for name, terms in means.items()}

    counts = jax.tree.map(lambda count: count.sum(0), jax.lax.map(counts_of, parts))

    def add_part(gradients: Params, part: Mapping[str, jax.Array]) -> tuple[Params, Metrics]:
        def weighted_loss(params: Params) -> tuple[jax.Array, Metrics]:
            means = task.means(gathered(params), teachers, part, key)
            shares = {name: add_means(terms, counts[name]) for name, terms in means.items()}
            return task.weight * shares["loss"], shares

        gradient, shares = jax.grad(weighted_loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, gradients, gradient), shares

    gradients, shares = jax.lax.scan(add_part, gradients, parts)
    return gradients, jax.tree.map(lambda share: share.sum(0), shares)


def make_update(
    optimizer: Optimizer, teachers: TeacherSchedule, shardings: TrainState | None = None
) -> Callable[..., tuple[TrainState, Params, Metrics]]:
    """The program (state, gradients, losses) -> (state after the update, zeroed gradients, metrics).

    If one of the losses is not finite, the state comes back as it was. `shardings` as of `make_accumulate`: the state
    and the buffer lie alike before and after, and nothing but the norms (and Muon's products) is summed over devices.
    """
    transform = optimizer.transform()

    def update(state: TrainState, gradients: Params, losses: Sequence[jax.Array]) -> tuple[TrainState, Params, Metrics]:
        norm = optax.global_norm(gradients)
        changes, optimizer_state = transform.update(optimizer.clipped(gradients), state.optimizer, state.params)
        params = optax.apply_updates(state.params, optimizer.scaled(changes, state.step))
        step = state.step + 1
        momentum = cosine(*teachers.momentum, state.step, optimizer.steps)
        ema = state.ema
        if ema:
            ema = jax.tree.map(lambda old, new: momentum * old + (1.0 - momentum) * new, ema, params)
        gram = state.gram
        if gram is not None and teachers.gram_snapshot_steps:
            due = jnp.isin(step, jnp.array(teachers.gram_snapshot_steps))
            gram = jax.tree.map(lambda old, new: jnp.where(due, new, old), gram, ema["backbone"])
        new_state = TrainState(step, params, optimizer_state, ema, gram)
        finite = jnp.isfinite(norm) & jnp.isfinite(jnp.stack(losses)).all()
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        metrics = {
            "gradient_norm": norm,
            "learning_rate": optimizer.learning_rate(state.step),
            "teacher_momentum": momentum,
        }
        return new_state, jax.tree.map(jnp.zeros_like, gradients), metrics

    placed = {}
    if shardings is not None:
        whole = replicated(shardings.step.mesh)
        placed["in_shardings"] = (shardings, shardings.params, whole)
        placed["out_shardings"] = (shardings, shardings.params, whole)
    return jax.jit(update, donate_argnums=(0, 1), **placed)


def merge_metrics(tasks: Sequence[Task], metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of all tasks in one dict: `loss` is the weighted sum, `loss_<task>` each, shared names are averaged."""
    merged: dict[str, list[float]] = {}
    total = 0.0
    for task in tasks:
        for name, value in metrics[task.name].items():
            name = f"loss_{task.name}" if name == "loss" else name
            merged.setdefault(name, []).append(float(value))
        total += task.weight * float(metrics[task.name]["loss"])
    return {"loss": total} | {name: sum(values) / len(values) for name, values in merged.items()}


def _mesh_of(shardings: TrainState | None) -> contextlib.AbstractContextManager:
    """The context in which `sharding.gathered` and the losses know the mesh, while a program is traced."""
    if shardings is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(shardings.step.mesh.abstract_mesh)


def _named_key(key: jax.Array, name: str) -> jax.Array:
    for letter in name.encode():
        key = jax.random.fold_in(key, letter)
    return key
