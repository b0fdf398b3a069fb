"""The training step: a program per task that adds its gradient to a buffer, and one that updates.

Unlike tasks keep their unlike shapes, and peak memory is that of the largest task, not of their sum.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from omnistream_jax.models.backbone import Backbone
from omnistream_jax.optim import Optimizer, TeacherSchedule, cosine
from omnistream_jax.tasks.task import Params, Task, Teachers

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
        step: int32, updates made so far.
        params: {"backbone": ..., head name: ...}, float32.
        optimizer: optax's state.
        ema: the EMA teacher, of the same structure as `params`; {} if no task has a teacher.
        gram: the Gram teacher's backbone, or None.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    ema: Params
    gram: Params | None


def init_params(backbone: Backbone, tasks: Sequence[Task], seed: int) -> Params:
    """Fresh parameters of the backbone and of every head; each depends on the seed and its own name only."""
    size = backbone.config.patch_size
    frames = jnp.zeros((1, 1, size, size, 3))
    initialisers: dict[str, Callable[[jax.Array], Params]] = {
        "backbone": lambda key: backbone.init(key, frames)["params"]
    }
    for task in tasks:
        initialisers |= task.heads

    def initialise() -> Params:
        key = jax.random.key(seed)
        return {name: init(_named_key(key, name)) for name, init in sorted(initialisers.items())}

    # It runs once: better soon than fast. On a CPU a third of the time of compiling array by array.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(initialise, compiler_options=options)()


def init_state(params: Params, tasks: Sequence[Task], optimizer: Optimizer, gram: Params | None) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    has_teacher = any(task.has_teacher for task in tasks)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.transform().init(params),
        ema=jax.tree.map(jnp.copy, params) if has_teacher else {},
        gram=gram,
    )


def make_accumulate(task: Task, seed: int) -> Callable[..., tuple[Params, Metrics]]:
    """The program (state, gradients, batch) -> (gradients + weight * gradient of the task, its metrics)."""

    @functools.partial(jax.jit, donate_argnums=1)
    def accumulate(state: TrainState, gradients: Params, batch: Mapping[str, jax.Array]) -> tuple[Params, Metrics]:
        key = jax.random.fold_in(_named_key(jax.random.key(seed), task.name), state.step)
        teachers = Teachers(state.step, state.ema, state.gram)

        def weighted_loss(params: Params) -> tuple[jax.Array, Metrics]:
            loss, metrics = task.loss(params, teachers, batch, key)
            return task.weight * loss, {"loss": loss, **metrics}

        gradient, metrics = jax.grad(weighted_loss, has_aux=True)(state.params)
        return jax.tree.map(jnp.add, gradients, gradient), metrics

    return accumulate


def make_update(optimizer: Optimizer, teachers: TeacherSchedule) -> Callable[..., tuple[TrainState, Params, Metrics]]:
    """The program (state, gradients, losses) -> (state after the update, zeroed gradients, metrics).

    If one of the losses is not finite, the state comes back as it was.
    """
    transform = optimizer.transform()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
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

    return update


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


def _named_key(key: jax.Array, name: str) -> jax.Array:
    for letter in name.encode():
        key = jax.random.fold_in(key, letter)
    return key
