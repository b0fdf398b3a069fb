"""What a pre-training task is: a name, a weight, a loss and its data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import struct

from omnistream_jax.data.pipeline import TaskData
from omnistream_jax.losses.means import Mean

Params = Mapping[str, Any]


@struct.dataclass
class Teachers:
    """What a loss may read besides the parameters that it trains.

    Attributes:
        step: int32 scalar, updates made so far.
        ema: the exponential moving average of the parameters, or {} if no task has a teacher.
        gram: parameters of the Gram teacher's backbone, or None.
    """

    step: jax.Array
    ema: Params
    gram: Params | None


class Task(Protocol):
    """One objective of a step. Its batches may be of any shape; its gradient is added to the others'.

    Attributes:
        name: unique among the tasks; metrics and errors use it.
        weight: factor on the loss.
        data: where its batches come from.
        heads: name -> initialiser (key -> parameters) of the modules that it trains beside the backbone; tasks that
            give the same name share that module.
        has_teacher: whether the loss reads `teachers.ema`.
        micro_batches: parts of a batch that are visited one after the other, for less memory; 1 for a loss that
            compares the samples of a batch with each other, which no sum of parts equals.
    """

    name: str
    weight: float
    data: TaskData
    heads: Mapping[str, Callable[[jax.Array], Params]]
    has_teacher: bool
    micro_batches: int

    def loss(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss before its weight, and metrics; metrics that tasks share by name are averaged.

        Args:
            params: {"backbone": ..., head name: ...}.
            teachers: what it may read besides.
            batch: the global batch of this step, the arrays of `data` without "record".
            key: randomness of this step and task.
        """

    def means(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> Mapping[str, Sequence[Mean]]:
        """The loss, as "loss", and the metrics of `loss`, each a sum of means over the batch.

        Counts depend on the batch alone. Called only where `micro_batches` is more than 1, with a micro-batch.
        """
