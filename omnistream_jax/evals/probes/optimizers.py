"""SGD and AdamW of one head, to PyTorch's definitions, with the learning rate and the weight decay as arguments.

Pure and without branches, so that `jax.vmap` trains many heads at once. Weight decay acts on all parameters, biases and
norms included, as in the protocols.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omnistream_jax.evals.probes.base import State


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum (torch.optim.SGD, no dampening; weight decay is an L2 term).

    Attributes:
        momentum: of the sum of gradients.
    """

    momentum: float

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 to 1, got {self.momentum}")

    def init(self, params: Any) -> State:
        """The sums of gradients, zero."""
        return jax.tree.map(jnp.zeros_like, params)

    def update(
        self,
        gradients: Any,
        state: State,
        params: Any,
        step: jax.Array,
        learning_rate: jax.Array,
        weight_decay: jax.Array,
    ) -> tuple[Any, State]:
        """As `base.HeadOptimizer.update`."""
        del step
        decayed = jax.tree.map(lambda gradient, leaf: gradient + weight_decay * leaf, gradients, params)
        state = jax.tree.map(lambda total, gradient: self.momentum * total + gradient, state, decayed)
        return jax.tree.map(lambda leaf, total: leaf - learning_rate * total, params, state), state


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (torch.optim.AdamW; Loshchilov and Hutter 2019).

    Attributes:
        beta1: of the gradients' mean; a number, or a function of the step.
        beta2: of the squares' mean.
        epsilon: in the denominator.
        clip_norm: the norm of the head's gradient is clipped to it before (torch's clip_grad_norm_); 0: not.
    """

    beta1: float | Callable[[jax.Array], jax.Array] = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 0.0

    def __post_init__(self):
        if not callable(self.beta1) and not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1: expected 0 to 1, got {self.beta1}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2: expected 0 to 1, got {self.beta2}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: expected a positive number, got {self.epsilon}")
        if not self.clip_norm >= 0:
            raise ValueError(f"clip_norm: expected 0 or more, got {self.clip_norm}")

    def init(self, params: Any) -> State:
        """The means of the gradients and of their squares, zero."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"mean": zeros, "square": zeros}

    def update(
        self,
        gradients: Any,
        state: State,
        params: Any,
        step: jax.Array,
        learning_rate: jax.Array,
        weight_decay: jax.Array,
    ) -> tuple[Any, State]:
        """As `base.HeadOptimizer.update`. The means' correction takes the present beta1, as PyTorch does."""
        if self.clip_norm:
            factor = jnp.minimum(1.0, self.clip_norm / (optax.global_norm(gradients) + 1e-6))
            gradients = jax.tree.map(lambda gradient: factor * gradient, gradients)
        beta1 = self.beta1(step) if callable(self.beta1) else self.beta1
        count = jnp.asarray(step, jnp.float32) + 1
        mean = _moved(state["mean"], gradients, beta1)
        square = _moved(state["square"], jax.tree.map(jnp.square, gradients), self.beta2)
        mean_share, square_share = 1 - beta1**count, 1 - self.beta2**count

        def change(leaf: jax.Array, leaf_mean: jax.Array, leaf_square: jax.Array) -> jax.Array:
            direction = leaf_mean / mean_share / (jnp.sqrt(leaf_square / square_share) + self.epsilon)
            return leaf - learning_rate * (weight_decay * leaf + direction)

        return jax.tree.map(change, params, mean, square), {"mean": mean, "square": square}


def _moved(means: Any, values: Any, beta: float | jax.Array) -> Any:
    return jax.tree.map(lambda mean, value: beta * mean + (1 - beta) * value, means, values)
