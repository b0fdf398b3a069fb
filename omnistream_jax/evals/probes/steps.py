"""What a step of training is made of: frames that pass the backbone in it, or features that passed it once before."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from omnistream_jax.data.pipeline import TaskData, build_pipeline
from omnistream_jax.evals.probes.base import Encode
from omnistream_jax.evals.probes.engine import FRAMES, ProbeState, Trainer, batched, read_share
from omnistream_jax.evals.probes.feature_cache import FeatureBatches, cached_arrays
from omnistream_jax.sharding import batch_shards, global_batch, mesh_here
from omnistream_jax.utils.agreement import own_rows

_FEATURE, _TARGET = "features/", "targets/"  # begin the names of arrays in a file of features


class FrameSteps:
    """Steps on random views: a context manager, which holds the data's workers.

    Args:
        trainer: of the heads.
        encode: the frozen backbone.
        data: batches with "frames".
        loader: `workers`, `prefetch`, `max_failed_fraction` and `max_restarts` of `data.pipeline.build_pipeline`.
        start: the first step, from 0.
    """

    def __init__(self, trainer: Trainer, encode: Encode, data: TaskData, loader: Mapping[str, Any], start: int):
        self._trainer, self._encode = trainer, encode
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._pipeline = build_pipeline({"probe": data}, seed=trainer.seed, start_step=start, **processes, **loader)
        try:
            self._next = self._batch()  # its shapes are asked for before the first step
        except BaseException:
            self._pipeline.close()
            raise

    @property
    def shapes(self) -> Any:
        """Of the features of a batch."""
        return self._trainer.feature_shapes(self._encode, self._next[FRAMES])

    def __call__(self, state: ProbeState, step: int) -> tuple[ProbeState, jax.Array]:
        """The state after a step and the losses [H]; steps are asked for in their order."""
        batch = self._batch() if self._next is None else self._next
        self._next = None
        return self._trainer.step(self._encode, state, batch)

    def _batch(self) -> dict[str, jax.Array]:
        batch = next(self._pipeline)["probe"]
        return global_batch({name: array for name, array in batch.items() if name != "record"}, self._trainer.mesh)

    def __enter__(self) -> "FrameSteps":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        for source, reasons in self._pipeline.skipped.items():
            counts = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(reasons.items()))
            who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            print(f"{who}skipped of {source}: {counts}", flush=True)
        self._pipeline.close()


class FeatureSteps:
    """Steps on features of views without anything random, which are encoded once and kept in a file.

    Args:
        trainer: of the heads, whose probe has `train_samples`.
        encode: the frozen backbone, on this process's devices alone: each process encodes its share.
        size: samples of a batch.
        path: of the file.
        made_of: JSON values, all that the features depend on.
        threads: that read samples.
    """

    def __init__(
        self, trainer: Trainer, encode: Encode, size: int, path: Path, made_of: Mapping[str, Any], threads: int
    ):
        self._trainer, self._encode, self._size, self._threads = trainer, encode, size, threads
        self._samples = trainer.probe.train_samples()
        arrays = cached_arrays(path, made_of, self._compute)
        self._batches = FeatureBatches(arrays, size, trainer.seed)
        with jax.set_mesh(mesh_here(trainer.mesh)):
            frames = np.stack([self._samples.sample(0)[FRAMES]] * batch_shards())
            self._tree = jax.tree.structure(trainer.feature_shapes(encode, frames))

    @property
    def shapes(self) -> Any:
        """Of the features of a batch."""
        return self._split(self._batches.batch(0))[0]

    def __call__(self, state: ProbeState, step: int) -> tuple[ProbeState, jax.Array]:
        """The state after a step, from 0, and the losses [H]."""
        mine = own_rows(self._size)
        batch = {name: array[mine] for name, array in self._batches.batch(step).items()}
        batch = global_batch(batch, self._trainer.mesh)
        return self._trainer.step_on_features(state, *self._split(batch))

    def _split(self, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        leaves = [batch[f"{_FEATURE}{number}"] for number in range(self._tree.num_leaves)]
        targets = {name.removeprefix(_TARGET): array for name, array in batch.items() if name.startswith(_TARGET)}
        return jax.tree.unflatten(self._tree, leaves), targets

    def _compute(self) -> dict[str, np.ndarray]:
        """Features, floats of them as float32, and targets of this process's samples."""
        rows: dict[str, list[np.ndarray]] = {}
        with jax.set_mesh(mesh_here(self._trainer.mesh)):
            self._encode_share(rows)
        return {name: np.concatenate(parts) for name, parts in rows.items()}

    def _encode_share(self, rows: dict[str, list[np.ndarray]]) -> None:
        for batch, real in batched(read_share(self._samples, self._threads), self._size):
            features = jax.tree.leaves(self._trainer.features(self._encode, batch.pop(FRAMES)))
            named = {f"{_FEATURE}{number}": leaf for number, leaf in enumerate(features)}
            named |= {f"{_TARGET}{name}": array for name, array in batch.items()}
            for name, array in named.items():
                array = np.asarray(array)[real]
                wide = name.startswith(_FEATURE) and jax.numpy.issubdtype(array.dtype, np.floating)
                rows.setdefault(name, []).append(array.astype(np.float32) if wide else array)

    def __enter__(self) -> "FeatureSteps":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        """Nothing is held."""
