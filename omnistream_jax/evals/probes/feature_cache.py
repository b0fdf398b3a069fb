"""Features of a small data set, encoded once and kept in a file.

The file is written aside and renamed, and bears two fingerprints: of what the features were made of (model, data and
settings), and of its own bits. One of other features, and one that is damaged, is told and made anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from omnistream_jax.convert.files import WeightsError, read_tensor_file
from omnistream_jax.utils.agreement import any_process, from_first_process, say, wait_for_all
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.tensor_file import read_metadata, write_tensors


class Source(Protocol):
    """What samples are read from."""

    def __len__(self) -> int:
        """How many there are."""

    def describe(self, index: int) -> str:
        """The path of a sample's file, or what else it is made from."""


def files_digest(source: Source) -> str:
    """sha256 of the samples' files, their paths and sizes: another where one is replaced, renamed or missing."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        path = Path(source.describe(index))
        digest.update(f"{path} {path.stat().st_size if path.is_file() else None}\n".encode())
    return digest.hexdigest()


def cached_arrays(
    path: Path,
    made_of: Mapping[str, Any],
    compute: Callable[[], dict[str, np.ndarray]],
    tell: Callable[[str], None] = say,
) -> dict[str, np.ndarray]:
    """The arrays of `path`, or of `compute`, which are then stored there. All processes call it together.

    Of many processes each computes and stores a part, which the first joins; all read the whole.

    Args:
        path: a safetensors file, which all processes see; its folder is made.
        made_of: JSON values, all that the arrays depend on.
        compute: arrays by name, of types that NumPy itself has: this process's rows of them.
        tell: is told what is read or made.
    """
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    arrays = _stored(path, key, tell)
    count = jax.process_count()
    if count == 1:
        return _store(path, key, compute()) if arrays is None else arrays
    if not any_process(arrays is None):
        return arrays
    parts = [path.with_name(f"{path.stem}-{index}-of-{count}{path.suffix}") for index in range(count)]
    mine = parts[jax.process_index()]
    if _stored(mine, key, tell) is None:
        _store(mine, key, compute())
    wait_for_all()

    def join() -> None:
        read = [read_tensor_file(part) for part in parts]
        _store(path, key, {name: np.concatenate([arrays[name] for arrays in read]) for name in read[0]})
        for part in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"):  # of runs that were stopped too
            part.unlink()

    from_first_process(join)
    return read_tensor_file(path)


def _stored(path: Path, key: str, tell: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    """The arrays of `path`; None where there is no file, or, which is told, one that cannot be used."""
    if not path.exists():
        return None
    arrays, problem = _read(path, key)
    tell(f"{path}: features of an earlier run" if arrays is not None else f"{path}: {problem}; they are made anew")
    return arrays


def _store(path: Path, key: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        write_tensors(aside, arrays, {"key": key, "digest": _digest(arrays)})
    return arrays


def _read(path: Path, key: str) -> tuple[dict[str, np.ndarray] | None, str]:
    """The arrays, or None and why not."""
    metadata = read_metadata(path)
    if metadata is None:
        return None, "no whole file of features"
    if metadata.get("key") != key:
        return None, "features of another model, other data or other settings"
    try:
        arrays = read_tensor_file(path)
    except WeightsError:
        return None, "no whole file of features"
    return (arrays, "") if _digest(arrays) == metadata.get("digest") else (None, "damaged features")


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
        digest.update(memoryview(array).cast("B") if array.size else b"")
    return digest.hexdigest()


class FeatureBatches:
    """Batches from arrays [N, ...] that determine (seed, step) alone: a new order in every pass over the N rows.

    Args:
        arrays: by name, all of N rows.
        size: of a batch.
        seed: 0 or more.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], size: int, seed: int):
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"arrays: expected the same number of rows in all, 1 or more, got {sorted(counts)}")
        self._arrays, self._size, self._seed, self._count = dict(arrays), size, seed, counts.pop()
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The rows of a step, from 0: a batch may end one pass and begin the next."""
        places = np.arange(step * self._size, (step + 1) * self._size)
        passes, within = np.divmod(places, self._count)
        rows = np.array([self._order(number)[place] for number, place in zip(passes.tolist(), within, strict=True)])
        self._orders = {number: order for number, order in self._orders.items() if number >= passes[0]}
        return {name: array[rows] for name, array in self._arrays.items()}

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            self._orders[number] = np.random.default_rng((self._seed, number)).permutation(self._count)
        return self._orders[number]
