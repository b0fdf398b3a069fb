"""What a probe is: the interface between the engine, which trains and scores it, and the protocols, one a module.

N: clips of a batch, T: frames, H x W: pixels, or H alone: heads. A probe's module has

    FIELDS: tuple[str, ...]       that `build` reads of every config, besides those of all probes
    build(config: ConfigDict, backbone: BackboneConfig) -> Probe

which checks the fields that it reads: ValueError("field: expected ..., got ...") where one does not fit, DataError
where the data do not. What the config leaves to its preset (configs/evaluate_probes.py) is filled in by then.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax.data.pipeline import TaskData
from omnistream_jax.models.backbone import BackboneOutput

State = Any
"""A pytree of an optimiser, of one head."""
Variables = Mapping[str, Any]
"""{"params": ..., and "batch_stats": ... where the head has them}, of one head; or of all, stacked [H, ...]."""
Encode = Callable[[jax.Array], BackboneOutput]
"""Frames [N, T, H, W, 3], uint8 or normalised floats, -> features after the final norm, without `hidden`.

The engine's is a pytree (jax.tree_util.Partial) whose leaves are the weights: hand it to a function under jit as an
argument, for what such a function closes over is compiled into its program.
"""


EMBEDDED = "embedded"
"""As `config.data`: the rendered world that comes with the package."""


def check_world(config: ConfigDict, world: str, published: str) -> None:
    """Raises ValueError where a recipe of the embedded world is given a folder, or another one the embedded world.

    The world is also always complete.

    Args:
        config: whose fields say which recipe it is of.
        world: the recipe of the embedded world.
        published: those of data sets.
    """
    embedded, of_world = config.data == EMBEDDED, "scenes" in config
    if embedded and not of_world:
        raise ValueError(f"data: the embedded world is the recipe {world}'s; expected a directory")
    if of_world and not embedded:
        raise ValueError(f"data: this recipe is the embedded world's; for a directory use {published}")
    if embedded and config.allow_incomplete:
        raise ValueError("allow_incomplete: nothing of the embedded world can be missing; expected False, got True")


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads that are trained at once, one entry a head.

    Attributes:
        learning_rates: peaks, after the protocol's scaling.
        weight_decays: of AdamW, or the L2 term of SGD.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]

    def __post_init__(self):
        if not self.learning_rates or len(self.learning_rates) != len(self.weight_decays):
            raise ValueError(
                f"heads: expected as many weight decays as learning rates, and one head or more, got "
                f"{len(self.weight_decays)} and {len(self.learning_rates)}"
            )
        for name, values in (("learning_rates", self.learning_rates), ("weight_decays", self.weight_decays)):
            for value in values:
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name}: expected 0 or more, got {value!r}")

    def __len__(self) -> int:
        return len(self.learning_rates)

    @classmethod
    def sweep(cls, learning_rates: Sequence[float], weight_decays: Sequence[float], scale: float = 1.0) -> "Heads":
        """Every learning rate, times `scale`, with every weight decay; the weight decays of one learning rate first."""
        pairs = [(scale * rate, decay) for rate in learning_rates for decay in weight_decays]
        return cls(tuple(rate for rate, _ in pairs), tuple(decay for _, decay in pairs))


def heads_of(config: ConfigDict) -> Heads:
    """Every learning rate of a config, scaled by its batch, with every weight decay."""
    scale = config.batch / config.learning_rate_batch if config.learning_rate_batch else 1.0
    return Heads.sweep(config.learning_rates, config.weight_decays, scale)


class HeadOptimizer(Protocol):
    """Of ONE head, and pure; optimizers.py has those of the protocols."""

    def init(self, params: Any) -> State:
        """The state before the first step."""

    def update(
        self,
        gradients: Any,
        state: State,
        params: Any,
        step: jax.Array,
        learning_rate: jax.Array,
        weight_decay: jax.Array,
    ) -> tuple[Any, State]:
        """The parameters and the state after a step.

        Args:
            step: from 0.
            learning_rate, weight_decay: scalars of this head, the first multiplied by the schedule at `step` already.
        """


class ValidationData(Protocol):
    """Samples to be scored, or deterministic ones to train on; random access, one by one.

    Attributes:
        source: what they are read from; `describe(index)` tells the file of each.
    """

    source: Any

    def __len__(self) -> int:
        """How many there are."""

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """One sample: "frames" [T, H, W, 3] and what is to be known of them.

        Raises:
            DataError: naming the file that cannot be used.
        """

    def settings(self) -> dict[str, Any]:
        """JSON values for the results: the folder, the counts, and all by which these samples may differ.

        "complete": whether these are as many samples as are published, so that scores may be compared.
        """


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: {metric: value} of each head, in the order of the heads.
        plots: file name, without its ending -> draws it into the file of the path that it is given.
    """

    scores: list[dict[str, float]]
    plots: Mapping[str, Callable[[Path], None]] = dataclasses.field(default_factory=dict)


class Probe(abc.ABC):
    """One protocol; small and immutable. As a dataclass with eq=False it can be a static argument of jit.

    Attributes:
        heads: all that are trained at once.
        score: the metric by which the best head is chosen.
        higher_is_better: whether that is the head of the highest score, or of the lowest.
        best_evaluation: whether the protocol also takes the best of the evaluations during training, not the last.
        frames_alone: whether the backbone sees each frame of a clip without those before it.
        optimizer: of a head.
    """

    heads: Heads
    score: str
    higher_is_better: bool = True
    best_evaluation: bool = False
    frames_alone: bool = False
    optimizer: HeadOptimizer

    @abc.abstractmethod
    def learning_rate_factor(self, step: jax.Array) -> jax.Array:
        """What the peak learning rates are multiplied by at a step, from 0: a float32 scalar, traceable."""

    @abc.abstractmethod
    def features(self, encode: Encode, frames: jax.Array) -> Any:
        """What a head sees of frames [N, T, H, W, 3]: a pytree of arrays [N, ...]. The engine stops the gradient."""

    @abc.abstractmethod
    def init(self, key: jax.Array, features: Any) -> Variables:
        """The variables of one head.

        Args:
            key: random.
            features: of `features`, arrays or their shapes.
        """

    @abc.abstractmethod
    def loss(
        self, variables: Variables, features: Any, batch: Mapping[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The loss of one head on one batch, and its new "batch_stats", None where it has none.

        Args:
            variables: of this head.
            features: [N, ...] of the batch.
            batch: what `train_data` gives, but for the frames: targets [N, ...].
            step: from 0.
            key: random, of this step; the same for all heads, so that they see the same dropout.
        """

    @abc.abstractmethod
    def train_data(self) -> TaskData:
        """Batches with "frames" [N, T, H, W, 3] and the targets [N, ...]."""

    @abc.abstractmethod
    def train_settings(self) -> dict[str, Any]:
        """JSON values for the results: where the training data come from, their counts, and whether they are complete.

        As `ValidationData.settings`.
        """

    def train_samples(self) -> ValidationData | None:
        """The training set in the view of the validation, to be encoded once where `config.augment` is False.

        None: this protocol has no such view.
        """
        return None

    @abc.abstractmethod
    def validation(self) -> ValidationData:
        """What is scored.

        Raises:
            DataError: other counts than the published ones, unless `config.allow_incomplete`.
        """

    @abc.abstractmethod
    def evaluate(self, encode: Encode, variables: Variables, samples: Iterable[dict[str, np.ndarray]]) -> Evaluation:
        """The scores of all heads.

        Args:
            encode: as `Encode` says.
            variables: of all heads, stacked [H, ...].
            samples: of `validation`, in order; `engine.batched` makes batches of them on the devices.
        """
