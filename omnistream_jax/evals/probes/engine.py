"""The train step of all heads of a probe at once, on features that are computed once a step; and what evaluation needs.

    features = stop_gradient(probe.features(encode, frames))              once
    vmap over heads: loss, gradient, update                               each with its learning rate and weight decay

Batches are split over the devices of the mesh; heads are whole copies on each. The loss of a head is a mean over the
global batch, and so is what its batch norms see.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from omnistream_jax.evals.probes.base import Encode, Probe, ValidationData
from omnistream_jax.model import Model
from omnistream_jax.models.backbone import Backbone, BackboneOutput
from omnistream_jax.sharding import (
    batch_shards,
    gathered,
    global_batch,
    put_on_mesh,
    replicated,
    split_micro_batches,
    state_shardings,
)
from omnistream_jax.utils.agreement import own_rows

FRAMES = "frames"
_READ_AHEAD = 16  # samples to be scored that are read before they are asked for


@struct.dataclass
class ProbeState:
    """All that training changes.

    Attributes:
        step: int32, how many steps are done.
        variables: of all heads, each leaf [H, ...].
        optimizer: the states of their optimisers, each leaf [H, ...].
    """

    step: jax.Array
    variables: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class _Encoder:
    backbone: Backbone
    time_unit: float | None
    clips: int
    frames_alone: bool

    def __call__(self, params: Any, frames: jax.Array) -> BackboneOutput:
        params = gathered(params)

        def encode(some: jax.Array) -> BackboneOutput:
            return self.backbone.apply({"params": params}, some, layers=(), time_unit=self.time_unit)

        def run(some: jax.Array) -> BackboneOutput:
            if not self.frames_alone:
                return encode(some)
            out = encode(some.reshape(-1, 1, *some.shape[2:]))
            return jax.tree.map(lambda leaf: leaf.reshape(*some.shape[:2], *leaf.shape[2:]), out)

        count = _pieces(frames.shape[0], self.clips, batch_shards())
        if count == 1:
            return run(frames)
        out = jax.lax.map(run, split_micro_batches(frames, count))
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), out)


def make_encode(
    model: Model, mesh: Mesh, *, time_unit: float | None = None, clips: int = 0, frames_alone: bool = False
) -> Encode:
    """The frozen backbone on a mesh; see `base.Encode`.

    Args:
        model: its weights are laid out on the mesh, split where the mesh has "fsdp".
        mesh: of `sharding.make_mesh`; what `encode` is a part of runs under `jax.set_mesh(mesh)`.
        time_unit: frames per unit of time; None takes the model's own.
        clips: that pass the backbone at once, over all devices, where they divide what comes in (else the next smaller
            number that does); 0: all of them.
        frames_alone: each frame of a clip is encoded as a clip of its own, as an image model does; so many clips at
            once all the same.
    """
    params = put_on_mesh(model.params, state_shardings(mesh, model.params))
    return jax.tree_util.Partial(_Encoder(model.backbone, time_unit, clips, frames_alone), params)


def _pieces(rows: int, at_once: int, shards: int) -> int:
    """In how many equal parts rows are taken, each a multiple of the shards."""
    if not at_once or rows <= at_once or rows % shards:
        return 1
    sizes = [size for size in range(shards, rows + 1, shards) if rows % size == 0]
    return rows // max([size for size in sizes if size <= at_once], default=sizes[0])


# Training


def init_state(probe: Probe, features: Any, seed: int, mesh: Mesh) -> ProbeState:
    """The heads before the first step, each drawn on its own, on the mesh.

    Args:
        probe: whose heads they are.
        features: [N, ...] of a batch, arrays or their shapes.
        seed: 0 or more.
        mesh: as of `make_encode`.
    """

    def start() -> ProbeState:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), features)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), len(probe.heads))
        variables = jax.vmap(lambda key: probe.init(key, shapes))(keys)
        optimizer = jax.vmap(probe.optimizer.init)(variables["params"])
        return ProbeState(jnp.zeros((), jnp.int32), variables, optimizer)

    return jax.jit(start, out_shardings=replicated(mesh))()


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The steps of a probe; see the module.

    Attributes:
        probe: what is trained.
        seed: of what the loss draws.
        mesh: as of `make_encode`.
        heads_at_once: heads whose losses and gradients are computed side by side; 0: all. Fewer take less memory.
    """

    probe: Probe
    seed: int
    mesh: Mesh
    heads_at_once: int = 0

    def feature_shapes(self, encode: Encode, frames: Any) -> Any:
        """The shapes of `features` of a batch of frames."""
        return jax.eval_shape(self.probe.features, encode, frames)

    @functools.cached_property
    def features(self) -> Any:
        """Features of frames, jitted: (encode, frames [N, T, H, W, 3]) -> pytree [N, ...]."""
        return jax.jit(lambda encode, frames: jax.lax.stop_gradient(self.probe.features(encode, frames)))

    @functools.cached_property
    def step(self) -> Any:
        """(encode, state, batch with "frames") -> (state, losses [H]); the state is donated."""

        def run(encode: Encode, state: ProbeState, batch: Mapping[str, jax.Array]) -> tuple[ProbeState, jax.Array]:
            targets = {name: array for name, array in batch.items() if name != FRAMES}
            features = jax.lax.stop_gradient(self.probe.features(encode, batch[FRAMES]))
            return self._update(state, features, targets)

        return jax.jit(run, donate_argnums=1, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def step_on_features(self) -> Any:
        """(state, features, targets) -> (state, losses [H]); the state is donated."""
        return jax.jit(self._update, donate_argnums=0, out_shardings=replicated(self.mesh))

    def _update(
        self, state: ProbeState, features: Any, targets: Mapping[str, jax.Array]
    ) -> tuple[ProbeState, jax.Array]:
        probe, step = self.probe, state.step
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 1), step)
        rates = probe.learning_rate_factor(step) * jnp.asarray(probe.heads.learning_rates, jnp.float32)
        decays = jnp.asarray(probe.heads.weight_decays, jnp.float32)

        def train_head(head: tuple[Any, Any, jax.Array, jax.Array]) -> tuple[Any, Any, jax.Array]:
            variables, optimizer, rate, decay = head

            def loss_of(params: Any) -> tuple[jax.Array, Any]:
                return probe.loss({**variables, "params": params}, features, targets, step, key)

            (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
            params, optimizer = probe.optimizer.update(gradients, optimizer, variables["params"], step, rate, decay)
            variables = {**variables, "params": params}
            return variables if statistics is None else {**variables, "batch_stats": statistics}, optimizer, loss

        heads = (dict(state.variables), state.optimizer, rates, decays)
        if 0 < self.heads_at_once < len(probe.heads):
            variables, optimizer, losses = jax.lax.map(train_head, heads, batch_size=self.heads_at_once)
        else:
            variables, optimizer, losses = jax.vmap(train_head)(heads)
        return ProbeState(step + 1, variables, optimizer), losses


# Evaluation


def batched(samples: Iterable[Mapping[str, np.ndarray]], size: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Batches of equal size on the devices: arrays [size, ...], split over the present mesh of this process's devices.

    Args:
        samples: whose arrays have the same names and shapes.
        size: of a batch of all processes, of which this one's is its share; made a multiple of its devices.

    Yields:
        A batch, and bool [size], which of its rows are samples: the last batch is filled up with copies of its last.
    """
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        shards = batch_shards(mesh)
        size = math.ceil(size / (jax.process_count() * shards)) * shards
    samples = iter(samples)
    while some := list(itertools.islice(samples, size)):
        real = np.arange(size) < len(some)
        some += [some[-1]] * (size - len(some))
        batch = {name: np.stack([sample[name] for sample in some]) for name in some[0]}
        yield (jax.tree.map(jnp.asarray, batch) if mesh.empty else global_batch(batch, mesh)), real


def read_share(data: ValidationData, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's samples in order, read ahead by so many threads, at least one. Raises DataError as `sample`."""
    options = grain.ReadOptions(num_threads=max(threads, 1), prefetch_buffer_size=max(threads, _READ_AHEAD))
    return iter(grain.MapDataset.source(_Samples(data))[own_rows(len(data))].to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _Samples:
    data: ValidationData

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.data.sample(int(index))
