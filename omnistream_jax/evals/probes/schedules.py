"""Learning rates, and AdamW's first beta, by step, as the evaluators of DINOv3 and V-JEPA 2 have them.

i: the step, from 0. T: all steps. W: those of the warm-up. Factors of the peak learning rate; float32, traceable.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up from 0, then half a cosine to 0.

        j = i + lead;  j < W: j / W;  else (1 + cos(pi (j - W) / (T - W))) / 2

    Attributes:
        steps: T.
        warmup_steps: W; 0 in both protocols.
        lead: 0, the scheduler moves on after each step, as DINOv3's linear evaluation (PyTorch's CosineAnnealingLR);
            1, before it, as V-JEPA 2's, whose last step has the learning rate 0.
    """

    steps: int
    warmup_steps: int = 0
    lead: int = 0

    def __post_init__(self):
        _check(self.steps, self.warmup_steps)
        if self.lead not in (0, 1):
            raise ValueError(f"lead: expected 0 or 1, got {self.lead}")

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The factor at a step."""
        place = jnp.asarray(step) + self.lead
        warmup = place / max(self.warmup_steps, 1)
        decay = _half_cosine(1.0, 0.0, place - self.warmup_steps, max(self.steps - self.warmup_steps, 1))
        return jnp.where(place < self.warmup_steps, warmup, decay)


@dataclasses.dataclass(frozen=True)
class WarmupOneCycle:
    """DINOv3's WarmupOneCycleLR, of its depth and segmentation heads.

        j = max(i - lag, 0)
        j < W: (1 + cos(pi j / T)) / 2 * j / W + 1 / start_divisor            where warmup_ratio is 0
               (1 - (1 - j / W) (1 - warmup_ratio)) (1 - j / T)               else
        else:  half a cosine from 1 to 1 / end_divisor, at (j + 1) / T: its phase counts from 0, not from W

    Attributes:
        steps: T.
        warmup_steps: W.
        end_divisor: the end is 1 / end_divisor; infinity for ADE20K.
        start_divisor: the warm-up begins at 1 / start_divisor; of the first form only.
        warmup_ratio: where the second form begins, as for ADE20K; 0 for NYUv2.
        lag: 1 where the scheduler does not move on after the very first step, as for ADE20K: its first two steps have
            the same learning rate.
    """

    steps: int
    warmup_steps: int
    end_divisor: float
    start_divisor: float = math.inf
    warmup_ratio: float = 0.0
    lag: int = 0

    def __post_init__(self):
        _check(self.steps, self.warmup_steps)
        for name in ("start_divisor", "end_divisor"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: expected 0 to 1, got {self.warmup_ratio}")
        if self.lag not in (0, 1):
            raise ValueError(f"lag: expected 0 or 1, got {self.lag}")

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The factor at a step."""
        place = jnp.maximum(jnp.asarray(step) - self.lag, 0)
        rising = place / max(self.warmup_steps, 1)
        if self.warmup_ratio:  # 1 - (1 - j / W) (1 - ratio), without its rounding
            warmup = (rising + self.warmup_ratio * (1 - rising)) * (self.steps - place) / self.steps
        else:
            warmup = _half_cosine(1.0, 0.0, place, self.steps) * rising + 1 / self.start_divisor
        decay = _half_cosine(1.0, 1 / self.end_divisor, place + 1, self.steps)
        return jnp.where(place < self.warmup_steps, warmup, decay)


@dataclasses.dataclass(frozen=True)
class OneCycleBeta:
    """AdamW's first beta beside DINOv3's WarmupOneCycleLR, of its depth heads: 0, then half a cosine.

    Attributes:
        steps: T.
        warmup_steps: W, during which it is 0.
        beta1: (from, to) after the warm-up.
    """

    steps: int
    warmup_steps: int
    beta1: tuple[float, float]

    def __post_init__(self):
        _check(self.steps, self.warmup_steps)
        if len(self.beta1) != 2 or not all(0 <= value < 1 for value in self.beta1):
            raise ValueError(f"beta1: expected two values of 0 to 1, got {self.beta1}")

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The beta at a step."""
        place = jnp.asarray(step)
        decay = _half_cosine(*self.beta1, place - self.warmup_steps, max(self.steps - self.warmup_steps, 1))
        return jnp.where(place < self.warmup_steps, 0.0, decay)


def _half_cosine(start: float, end: float, place: jax.Array, steps: int) -> jax.Array:
    """From start at 0 to end at `steps`; places are integers, so that what is left near the end is exact."""
    return end + (start - end) * jnp.square(jnp.sin(math.pi / 2 * ((steps - place) / steps)))


def _check(steps: int, warmup_steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps: expected 0 to {steps}, got {warmup_steps}")
