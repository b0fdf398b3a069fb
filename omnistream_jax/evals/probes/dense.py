"""What the probes of maps have in common: one linear head on the patches of the last block, after the final norm."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.probes.base import Encode, HeadOptimizer, Heads, Probe, Variables
from omnistream_jax.evals.probes.engine import batched
from omnistream_jax.evals.probes.schedules import WarmupOneCycle
from omnistream_jax.models.probes import pad_to_patches
from omnistream_jax.ops.images import normalize_frames

AugmentationT = TypeVar("AugmentationT")


@dataclasses.dataclass(frozen=True)
class DenseProbe(Probe):
    """A probe whose head is called as head(patches [N, T, h, w, D], train).

    Frames that are no multiple of the patch are padded centrally with the mean colour, as in DINOv3; what the head
    makes of the padded frames is stretched over the whole target.

    Attributes:
        heads: learning rates and weight decays.
        optimizer: of a head.
        schedule: of the learning rate.
        head: the Linen module.
        patch_size: of the backbone, in pixels.
        evaluate_batch: frames or windows that are evaluated at once.
    """

    heads: Heads
    optimizer: HeadOptimizer
    schedule: WarmupOneCycle
    head: nn.Module
    patch_size: int
    evaluate_batch: int

    def learning_rate_factor(self, step: jax.Array) -> jax.Array:
        """As `Probe` says."""
        return self.schedule(step)

    def features(self, encode: Encode, frames: jax.Array) -> jax.Array:
        """Patches [N, T, h, w, D] of frames [N, T, H, W, 3]."""
        return patch_features(encode, frames, self.patch_size)

    def init(self, key: jax.Array, features: Any) -> Variables:
        """As `Probe` says."""
        return self.head.init(key, jnp.zeros((1, *features.shape[1:]), jnp.float32), False)

    def _trained(self, variables: Variables, features: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """The head's maps in training, and its new "batch_stats"."""
        maps, updated = self.head.apply(variables, features, True, rngs={"dropout": key}, mutable=["batch_stats"])
        return maps, updated["batch_stats"]


def patch_features(encode: Encode, frames: jax.Array, patch_size: int) -> jax.Array:
    """Patches [N, T, h, w, D] after the final norm of frames [N, T, H, W, 3], normalised or uint8."""
    return encode(pad_to_patches(normalize_frames(frames), patch_size)).patches


def all_heads(head: nn.Module, variables: Variables, patches: jax.Array) -> jax.Array:
    """The maps of all heads in evaluation, [heads, N, T, h, w, ...]; variables are stacked [heads, ...]."""
    return jax.vmap(lambda one: head.apply(one, patches, False))(variables)


def run_batched(
    items: Iterable[tuple[Any, np.ndarray]], size: int, run: Callable[[jax.Array], jax.Array]
) -> Iterator[tuple[Any, np.ndarray]]:
    """Runs a function on frames in batches of one size.

    Args:
        items: (anything, frames [T, H, W, 3]), all frames of one shape.
        size: frames at once.
        run: maps frames [N, T, H, W, 3] on the devices to [N, ...].

    Yields:
        (the same thing, its row of the result), in order.
    """
    things: collections.deque[Any] = collections.deque()

    def samples() -> Iterator[dict[str, np.ndarray]]:
        for thing, frames in items:
            things.append(thing)
            yield {"frames": frames}

    for batch, real in batched(samples(), size):
        for row in np.asarray(run(batch["frames"]))[real]:
            yield things.popleft(), row


def augmentation_of(config: ConfigDict, kind: type[AugmentationT]) -> AugmentationT:
    """What `config.augmentation` says, lists as tuples. Raises ValueError that names a field that does not fit."""
    fields = config.augmentation.items()
    fields = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in fields}
    try:
        return kind(**fields)
    except DataError as error:
        raise ValueError(f"augmentation.{error}") from error
