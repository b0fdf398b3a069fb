"""Means over a batch whose number of valid items is known only when it comes, so that they can be taken in parts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A sum over what counts, times a weight, and how much counts; float32 scalars.

    Attributes:
        total: the weighted sum.
        count: of the items, 0 or more.
    """

    total: jax.Array
    count: jax.Array

    def times(self, factor: float | jax.Array) -> "Mean":
        """The mean times a factor."""
        return Mean(factor * self.total, self.count)


def mean_of(values: jax.Array, valid: jax.Array) -> Mean:
    """Of values [...], finite everywhere, where valid [...]."""
    return Mean(jnp.sum(jnp.where(valid, values, 0.0)), jnp.sum(valid).astype(jnp.float32))


def add_means(means: Sequence[Mean], counts: Sequence[jax.Array] | None = None) -> jax.Array:
    """The sum of means, each 0 where nothing counts.

    Args:
        means: of a batch, or of a part of it.
        counts: of the whole batch, to divide the part's sums by: the parts' results then add up to the whole's.
    """
    counts = [mean.count for mean in means] if counts is None else counts
    return sum(mean.total / jnp.maximum(count, 1) for mean, count in zip(means, counts, strict=True))
