"""Schedules and the optimiser: Adam with warm-up and cosine decay, no weight decay (OmniStream, Sec. 4)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

PROTOTYPES = "last_layer"  # the name of the prototypes in the parameters of a DinoHead


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update of one training run.

    Attributes:
        peak: learning rate after warm-up.
        warmup_steps: steps of linear warm-up from 0.
        steps: all steps; the learning rate falls to `final` by then along a cosine.
        final: last learning rate.
        beta1, beta2: Adam's decay rates.
        clip_norm: the norm of each module's gradient (backbone, each head) is clipped to this, as DINOv3 does; 0 does
            not clip.
        freeze_prototypes_steps: the heads' last layers stay as they are for the first steps, as in DINO: else they
            learn to answer alike for all samples while the samples still look alike.
    """

    peak: float
    warmup_steps: int
    steps: int
    final: float
    beta1: float
    beta2: float
    clip_norm: float
    freeze_prototypes_steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"optimizer.warmup_steps: expected 0 to {self.steps}, got {self.warmup_steps}")
        if not self.peak > 0 or self.final < 0 or self.clip_norm < 0:
            raise ValueError("optimizer: expected peak > 0, final >= 0 and clip_norm >= 0")

    def learning_rate(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of the update that follows `step` earlier ones."""
        warmup = self.peak * (step + 1) / max(self.warmup_steps, 1)
        decay = cosine(self.peak, self.final, step - self.warmup_steps, self.steps - self.warmup_steps)
        return jnp.where(step < self.warmup_steps, warmup, decay)

    def transform(self) -> optax.GradientTransformation:
        """Adam with its schedule; the state counts the steps."""
        return optax.adam(self.learning_rate, b1=self.beta1, b2=self.beta2)

    def clipped(self, gradients: Mapping[str, Any]) -> dict[str, Any]:
        """The gradients {module name: tree}, each module's norm at most `clip_norm`."""
        if self.clip_norm == 0:
            return dict(gradients)

        def clip(tree: Any) -> Any:
            factor = jnp.minimum(1.0, self.clip_norm / jnp.maximum(optax.global_norm(tree), 1e-12))
            return jax.tree.map(lambda leaf: factor * leaf, tree)

        return {name: clip(tree) for name, tree in gradients.items()}

    def frozen(self, changes: Any, step: jax.Array) -> Any:
        """The changes to all parameters, zero for what is frozen at this step; Adam's moments fill meanwhile."""

        def keep(path: tuple, change: jax.Array) -> jax.Array:
            if PROTOTYPES not in [getattr(key, "key", None) for key in path]:
                return change
            return jnp.where(step < self.freeze_prototypes_steps, 0.0, change)

        return jax.tree_util.tree_map_with_path(keep, changes)


@dataclasses.dataclass(frozen=True)
class TeacherSchedule:
    """How the teachers follow the student.

    Attributes:
        momentum: (first, last) of the EMA, along a cosine over all steps.
        gram_snapshot_steps: after these numbers of updates the Gram teacher becomes a copy of the EMA teacher.
    """

    momentum: tuple[float, float]
    gram_snapshot_steps: tuple[int, ...] = ()


def cosine(start: float, end: float, step: jax.Array | int, steps: int) -> jax.Array:
    """From `start` at step 0 to `end` at `steps` along half a cosine, constant outside."""
    progress = jnp.clip(step / max(steps, 1), 0.0, 1.0)
    return end + 0.5 * (start - end) * (1.0 + jnp.cos(jnp.pi * progress))


def linear(start: float, end: float, step: jax.Array | int, steps: int) -> jax.Array:
    """From `start` at step 0 to `end` at `steps` along a line, constant outside."""
    return start + (end - start) * jnp.clip(step / max(steps, 1), 0.0, 1.0)
