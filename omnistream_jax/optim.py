"""Schedules and the optimiser: Adam with warm-up and cosine decay, no weight decay (OmniStream, Sec. 4); or Muon."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omnistream_jax.muon import muon
from omnistream_jax.utils.trees import leaf_name, named_leaves

PROTOTYPES = "last_layer"  # the name of the prototypes in the parameters of a DinoHead


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update of one training run.

    Attributes:
        peak: learning rate after warm-up.
        warmup_steps: steps of linear warm-up from 0.
        steps: all steps; the learning rate falls to `final` by then along a cosine. 0: none is made.
        final: last learning rate.
        beta1, beta2: Adam's decay rates.
        clip_norm: the norm of each module's gradient (backbone, each head) is clipped to this, as DINOv3 does; 0 does
            not clip.
        freeze_prototypes_steps: the heads' last layers stay as they are for the first steps, as in DINO: else they
            learn to answer alike for all samples while the samples still look alike.
        factors: pairs (part of the parameters, as "geometry" or "geometry/camera"; factor of its learning rate). The
            longest name that fits holds.
        kind: "adam", as the paper; or "muon", for the matrices of the transformers (muon.py) and Adam for the rest.
    """

    peak: float
    warmup_steps: int
    steps: int
    final: float
    beta1: float
    beta2: float
    clip_norm: float
    freeze_prototypes_steps: int
    factors: tuple[tuple[str, float], ...] = ()
    kind: str = "adam"

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps: expected 0 or more, got {self.steps}")
        if self.steps and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"optimizer.warmup_steps: expected 0 to {self.steps}, got {self.warmup_steps}")
        _require(0 < self.peak < math.inf, "peak", self.peak, "a positive number")
        for field in ("final", "clip_norm", "freeze_prototypes_steps"):
            value = getattr(self, field)
            _require(0 <= value < math.inf, field, value, "0 or more")
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            _require(0 <= value < 1, field, value, "0 or more, and less than 1")
        _require(self.kind in ("adam", "muon"), "kind", self.kind, "adam or muon")
        for pair in self.factors:
            _require(_is_factor(pair), "factors", pair, "pairs (name, 0 or more)")

    def check_factors(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError for a name in `factors` that is no part of the parameters."""
        for part, _ in self.factors:
            if not any(_is_in(name, part) for name in named_leaves(params)):
                raise ValueError(f"optimizer.factors: no parameters are named {part!r}, there are {sorted(params)}")

    def learning_rate(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of the update that follows `step` earlier ones."""
        warmup = self.peak * (step + 1) / max(self.warmup_steps, 1)
        decay = cosine(self.peak, self.final, step - self.warmup_steps, self.steps - self.warmup_steps)
        return jnp.where(step < self.warmup_steps, warmup, decay)

    def transform(self) -> optax.GradientTransformation:
        """Adam or Muon with its schedule; the state counts the steps."""
        if self.kind == "muon":
            return muon(self.learning_rate, self.beta1, self.beta2)
        return optax.adam(self.learning_rate, b1=self.beta1, b2=self.beta2)

    def clipped(self, gradients: Mapping[str, Any]) -> dict[str, Any]:
        """The gradients {module name: tree}, each module's norm at most `clip_norm`."""
        if self.clip_norm == 0:
            return dict(gradients)

        def clip(tree: Any) -> Any:
            factor = jnp.minimum(1.0, self.clip_norm / jnp.maximum(optax.global_norm(tree), 1e-12))
            return jax.tree.map(lambda leaf: factor * leaf, tree)

        return {name: clip(tree) for name, tree in gradients.items()}

    def scaled(self, changes: Any, step: jax.Array) -> Any:
        """The changes to all parameters as they are made: times their factor, and zero for what is frozen yet.

        The moments of what is frozen fill meanwhile.
        """

        def scale(path: tuple, change: jax.Array) -> jax.Array:
            name = leaf_name(path)
            change = self._factor(name) * change
            if PROTOTYPES not in name.split("/"):
                return change
            return jnp.where(step < self.freeze_prototypes_steps, 0.0, change)

        return jax.tree_util.tree_map_with_path(scale, changes)

    def _factor(self, name: str) -> float:
        fitting = [(len(part), factor) for part, factor in self.factors if _is_in(name, part)]
        return max(fitting)[1] if fitting else 1.0


@dataclasses.dataclass(frozen=True)
class TeacherSchedule:
    """How the teachers follow the student.

    Attributes:
        momentum: (first, last) of the EMA, along a cosine over all steps.
        gram_snapshot_steps: after these numbers of updates the Gram teacher becomes a copy of the EMA teacher.
    """

    momentum: tuple[float, float]
    gram_snapshot_steps: tuple[int, ...] = ()


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"optimizer.{field}: expected {expected}, got {value!r}")


def _is_factor(pair: object) -> bool:
    match pair:
        case (str(), int() | float() as factor):
            return 0 <= factor < math.inf
    return False


def _is_in(name: str, part: str) -> bool:
    return f"{name}/".startswith(f"{part}/")


def cosine(start: float, end: float, step: jax.Array | int, steps: int) -> jax.Array:
    """From `start` at step 0 to `end` at `steps` along half a cosine, constant outside."""
    progress = jnp.clip(step / max(steps, 1), 0.0, 1.0)
    return end + 0.5 * (start - end) * (1.0 + jnp.cos(jnp.pi * progress))


def linear(start: float, end: float, step: jax.Array | int, steps: int) -> jax.Array:
    """From `start` at step 0 to `end` at `steps` along a line, constant outside."""
    return start + (end - start) * jnp.clip(step / max(steps, 1), 0.0, 1.0)
