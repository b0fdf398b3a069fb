"""Checkpoints of the training state: saved whole, verified when restored.

Orbax writes and reads the arrays. It loads a flipped bit without a word, so each checkpoint carries a record
of our own: the step, every array's name, shape and type, a fingerprint of its bits
(`utils.trees.fingerprint`), the caller's metadata, and a digest over all of this. A checkpoint is whole when
the record agrees with its digest, its step with the directory's name, and the loaded arrays with their
fingerprints.

    DIR/100/  DIR/200/        whole ones, by step
    DIR/300.bad/              was found damaged at a restore and put aside; never read again
    DIR/400.orbax-...-tmp/    was being written when the process died; removed at the next save

A save that fails, as on a full disk, takes what it has written away with it and leaves the others as they were.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as orbax
from absl import logging
from jax.experimental import multihost_utils

from omnistream_jax.utils.agreement import from_first_process, shared_message, warn
from omnistream_jax.utils.failures import passing_failure, reason
from omnistream_jax.utils.trees import describe, fingerprint, named_leaves, nest

ocp = orbax.v1
_FORMAT = 1  # of the record
_ITEM = "state"  # the folder of the arrays in a step's directory
_COMMIT_FILE = "commit_success.txt"
_LAST_SAVE_SECONDS = 30.0  # for a save that is under way when a process fails
_Value = TypeVar("_Value")


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or restored; the message names the directory and the step."""


class SaveFailedError(CheckpointError):
    """The machine would not take a checkpoint: a full disk, most often. The ones before it stand."""


class CheckpointMismatchError(CheckpointError):
    """A whole checkpoint holds other arrays than the ones asked for; the message lists the differences."""


class _DamagedError(Exception):
    """A checkpoint is not whole; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint says of itself.

    Attributes:
        step: its step.
        leaves: name -> shape and type of each array, as in {"params/kernel": "float32[3,4]"}.
        metadata: what was given to `save`.
    """

    step: int
    leaves: dict[str, str]
    metadata: dict


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Args:
        directory: where the steps lie; made where it is missing, unless `read_only`.
        keep_last: how many of the newest are kept, at least 1. With 1, there is none to fall back on.
        keep_every: also keep the steps that are multiples of this; None keeps no others.
        read_only: for readers beside a run: saves nothing, puts nothing aside, and the directory must exist.

    Raises CheckpointError where the directory is missing (`read_only`) or cannot be used. All processes of a
    run call every method together.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last and keep_every must be 1 or more, got {keep_last} and {keep_every}")
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_every, self._read_only = keep_last, keep_every, read_only
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, ocp.AsyncResponse] | None = None
        _prepare_directory(self.directory, make=not read_only)

    def steps(self) -> list[int]:
        """Steps that have a directory, ascending; whole or not, the one still being written left out."""
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if _is_step(name))

    def damaged(self) -> list[str]:
        """Names of the directories of damaged steps that were put aside, sorted."""
        return sorted(path.name for path in self.directory.glob("*.bad*"))

    # Saving

    def save(self, step: int, state: object, metadata: dict | None = None) -> None:
        """Saves the state as it is now; the files are written in the background, one save at a time.

        Args:
            step: not yet among `steps()`.
            state: tree of `jax.Array` or `np.ndarray` leaves of at least one element; None is no leaf, PRNG
                keys are given as `jax.random.key_data`.
            metadata: JSON values, handed back by `restore_latest`.

        Raises CheckpointError for what is wrong with the state or the step, SaveFailedError where the disk has no room
        for it or the save cannot begin, or where the one before has failed in the background (see `wait`).
        """
        if self._read_only:
            raise CheckpointError(f"checkpoints in {self.directory} were opened for reading only")
        self.wait()
        if (self.directory / str(step)).exists():
            raise CheckpointError(f"step {step} is already saved in {self.directory}")
        leaves = named_leaves(state)
        _check_leaves(leaves)
        record = _sealed(
            {
                "format": _FORMAT,
                "step": step,
                "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
                "fingerprint": fingerprint(leaves),
                "metadata": metadata or {},
            }
        )
        with self._saving(step):
            if jax.process_index() == 0:
                _check_space(self.directory, sum(leaf.nbytes for leaf in leaves.values()))
        with self._saving(step):
            response = self._open().save_async(
                step, nest(leaves), checkpointable_name=_ITEM, force=True, custom_metadata=record
            )
        self._pending = (step, response)

    def wait(self) -> int | None:
        """Waits for the save in the background; the step that is now on the disk to stay, None if there was none.

        Raises SaveFailedError where it has failed.
        """
        if self._pending is None:
            return None
        (step, response), self._pending = self._pending, None
        with self._saving(step):
            response.result()
            if jax.process_index() == 0:
                _hand_to_disk(self.directory / str(step))
        return step

    def close(self) -> None:
        """Waits for the save in the background, as `wait` does, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, Exception) and jax.process_count() > 1:
            self._end_alone()
        else:
            self.close()

    def _end_alone(self) -> None:
        """What `close` does, without the other processes: they may be in a step that this one will never make.

        They write their parts of a save that was begun in the background, and so it is most often whole soon.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result(timeout=_LAST_SAVE_SECONDS)
            if jax.process_index() == 0:
                _hand_to_disk(self.directory / str(step))
        except Exception as error:
            who, where = jax.process_index(), self.directory
            logging.warning("Process %d: step %d, of which it wrote a part to %s: %s", who, step, where, reason(error))

    def _open(self) -> ocp.training.Checkpointer:
        """Orbax's own manager, which lists the directory when made: after damaged steps were put aside."""
        if self._checkpointer is None:
            policies = ocp.training.preservation_policies
            kept = [policies.LatestN(self._keep_last)]
            if self._keep_every is not None:
                kept.append(policies.EveryNSteps(self._keep_every))
            context = ocp.Context()
            context.async_options.create_directories_asynchronously = False  # a full disk is told at once
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """A part of a save, which fails in all processes if it does in one."""
        failure = None
        try:
            yield
        except Exception as error:  # Orbax wraps whatever went wrong
            failure = error
        told = shared_message(reason(failure) if failure else None)
        if told is not None:
            self._abandon(step)
            raise SaveFailedError(f"step {step} could not be saved in {self.directory}: {told}") from failure

    def _abandon(self, step: int) -> None:
        """Forgets Orbax's manager, which counts the failed step as saved, and removes what there is of the step."""
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            with contextlib.suppress(Exception):  # it tells the failure again
                checkpointer.close()
        if jax.process_index() == 0:
            for leftover in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    # Restoring

    def contents(self, step: int | None = None) -> Contents:
        """Of a step, or of the newest one whose record is whole; the arrays are not read.

        Raises CheckpointError where there is none.
        """
        damage = "there is none"
        for candidate in reversed(from_first_process(self.steps) if step is None else [step]):
            path = self.directory / str(candidate)
            try:
                record = _agreed(lambda path=path, step=candidate: _read_record(path, step))
                return Contents(candidate, record["leaves"], record["metadata"])
            except _DamagedError as error:
                damage = str(error)
                warn("Checkpoint %s is damaged: %s", path, damage)
        raise CheckpointError(f"no checkpoint in {self.directory} can be used: {damage}")

    def restore_latest(
        self, abstract_state: object, *, partial: bool = False, step: int | None = None
    ) -> tuple[int, object, dict] | None:
        """The newest whole checkpoint, or None where there has never been one.

        Args:
            abstract_state: the expected tree, of arrays or `jax.ShapeDtypeStruct`; a leaf's sharding says
                where the restored array lies, by default on the first device.
            partial: the checkpoint may hold more than is asked for.
            step: this one and no other.

        Returns:
            (step, state, metadata), the state of `jax.Array` leaves.

        A damaged checkpoint is put aside with a warning and the one before it is tried. Raises
        CheckpointMismatchError where a whole one holds other arrays, CheckpointError where there are
        checkpoints but none is whole, or where the machine failed (memory, permission): then nothing is put
        aside.
        """
        self.wait()
        steps = from_first_process(self.steps) if step is None else [step]
        for step in reversed(steps):
            try:
                state, metadata = self._restore(step, abstract_state, partial)
            except _DamagedError as error:
                self._put_aside(step, str(error))
            else:
                return step, state, metadata
        aside = from_first_process(self.damaged)
        if steps or aside:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole (damaged: {', '.join(aside) or steps}). "
                "To begin anew, remove that directory or choose another --workdir"
            )
        return None

    def _restore(self, step: int, abstract_state: object, partial: bool) -> tuple[object, dict]:
        """Raises _DamagedError in every process where one finds damage, CheckpointError likewise."""
        path = self.directory / str(step)
        wanted = {name: _with_sharding(leaf) for name, leaf in named_leaves(abstract_state).items()}
        record = _agreed(lambda: _fitting_record(path, step, wanted, partial))
        loaded = _agreed(lambda: _load(path, wanted, partial))
        _agreed(lambda: _check_bits(loaded, record["fingerprint"]))
        leaves = [loaded[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), record["metadata"]

    def _put_aside(self, step: int, damage: str) -> None:
        path = self.directory / str(step)
        if self._read_only:
            warn("Checkpoint %s is damaged: %s. Trying the one before it.", path, damage)
            return
        aside = _free_name(self.directory / f"{step}.bad")
        warn("Checkpoint %s is damaged: %s. Renamed to %s; trying the one before it.", path, damage, aside.name)
        if jax.process_index() == 0:
            path.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} put aside")
        if self._checkpointer is not None:
            self._checkpointer.reload()


def _prepare_directory(directory: Path, make: bool) -> None:
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        elif not directory.is_dir():
            raise CheckpointError(f"checkpoint directory {directory} does not exist")
        next(directory.iterdir(), None)
    except OSError as error:
        raise CheckpointError(f"checkpoint directory {directory} cannot be used: {error.strerror}") from error


def _check_space(directory: Path, needed: int) -> None:
    """Raises OSError where the disk cannot hold so many bytes more: a disk filled to the brim stops others too."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"the disk is full: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free")


def _hand_to_disk(step_directory: Path) -> None:
    """Makes a checkpoint outlast a power cut: TensorStore does so with arrays, nobody with records and folders."""
    for path in (*step_directory.rglob("*"), step_directory, step_directory.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{count}") for count in range(2, 1_000_000))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _check_leaves(leaves: dict[str, object]) -> None:
    for name, leaf in leaves.items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise CheckpointError(f"state leaf {name!r} must be an array, got {type(leaf).__name__}")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"state leaf {name!r} is a PRNG key: save jax.random.key_data of it")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype or leaf.dtype.kind == "c":
            raise CheckpointError(f"state leaf {name!r} has type {leaf.dtype}, which cannot be restored")
        if leaf.size == 0:
            raise CheckpointError(f"state leaf {name!r} of shape {leaf.shape} has no element to save")


# The record


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sealed(record: dict) -> dict:
    try:
        record = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint metadata must be JSON values: {error}") from error
    return {"record": record, "sha256": _digest(record)}


def _read_record(path: Path, step: int) -> dict:
    """The record of a checkpoint, after its digest and step have been checked."""
    try:
        found = ocp.metadata(path)
        record, digest = found.custom_metadata["record"], found.custom_metadata["sha256"]
        committed = found.commit_timestamp_nsecs is not None and _commit_file_stands(path)
    except Exception as error:
        _raise_unless_damage(error, path)
        raise _DamagedError(f"its metadata cannot be read: {reason(error)}") from error
    if not committed:
        raise _DamagedError("it was not committed")
    if _digest(record) != digest:
        raise _DamagedError("its metadata has changed")
    if record["format"] != _FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {record['format']}, expected {_FORMAT}")
    if record["step"] != step:
        raise _DamagedError(f"it holds step {record['step']}")
    return record


def _commit_file_stands(path: Path) -> bool:
    """Orbax from 0.12.8 on marks both the step and its arrays as committed, the ones before it neither of them."""
    return _COMMIT_FILE in os.listdir(path) or _COMMIT_FILE not in os.listdir(path / _ITEM)


def differences(stored: Mapping[str, str], wanted: Mapping[str, object], *, partial: bool = False) -> list[str]:
    """Lines on what is asked for and not stored, stored and not asked for, or of another shape or type.

    Args:
        stored: what arrays there are, as `Contents.leaves`.
        wanted: arrays or `jax.ShapeDtypeStruct` by the same names.
        partial: what is not asked for is no difference.
    """
    lines = []
    for name, leaf in wanted.items():
        if name not in stored:
            lines.append(f"{name}: expected {describe(leaf)}, not in it")
        elif stored[name] != describe(leaf):
            lines.append(f"{name}: expected {describe(leaf)}, it holds {stored[name]}")
    if not partial:
        lines += [f"{name}: {stored[name]} in it, not expected" for name in stored if name not in wanted]
    return lines


def _fitting_record(path: Path, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], partial: bool) -> dict:
    record = _read_record(path, step)
    unlike = differences(record["leaves"], wanted, partial=partial)
    if unlike:
        raise CheckpointMismatchError("\n  ".join([f"checkpoint {path} does not fit this run:", *unlike]))
    return record


# The arrays


def _load(path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], partial: bool) -> dict[str, jax.Array]:
    """This process's part of each array, by itself: at Orbax's barriers it would wait for one that finds damage."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"load_{here}"
    )
    context = ocp.Context(multiprocessing_options=alone)
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return named_leaves(ocp.load(path, nest(wanted), checkpointable_name=_ITEM))
    except Exception as error:
        _raise_unless_damage(error, path)
        raise _DamagedError(f"its arrays cannot be read: {reason(error)}") from error


def _check_bits(loaded: Mapping[str, jax.Array], expected: Mapping[str, int]) -> None:
    changed = [name for name, value in fingerprint(loaded).items() if value != expected[name]]
    if changed:
        raise _DamagedError(f"the bits have changed of {_some(changed)}")


def _with_sharding(leaf: object) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# Errors


def _agreed(function: Callable[[], _Value]) -> _Value:
    """What a function of all processes returns; CheckpointError or _DamagedError in all where one raises it."""
    failure = damage = None
    try:
        value = function()
    except CheckpointError as error:
        failure = error
    except _DamagedError as error:
        damage = error
    told = shared_message(str(failure) if failure else None)
    if told is not None:
        raise failure or CheckpointError(told)
    told = shared_message(str(damage) if damage else None)
    if told is not None:
        raise _DamagedError(told) from damage
    return value


def _raise_unless_damage(error: Exception, path: Path) -> None:
    """What the machine did wrong says nothing about the checkpoint, which must then stay where it is."""
    passing = passing_failure(error)
    if passing is not None:
        raise CheckpointError(f"checkpoint {path} could not be read: {reason(passing)}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
