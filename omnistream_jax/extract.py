"""Features of many videos and image folders: decoded in worker processes, streamed through the model, one file each.

What makes a killed run harmless: a feature file is written aside and renamed, so what bears its name is whole; index
and list of failures are made anew from what is there; and no byte depends on timing, workers or other items.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax import model as model_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert import files
from omnistream_jax.data.decode_pool import Decoded, DecodePool
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.frames import FrameChunk, FrameOptions
from omnistream_jax.data.items import Item, list_items, printable, source_bytes
from omnistream_jax.model import Model
from omnistream_jax.models.backbone import BackboneOutput
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.lock import WorkdirLock
from omnistream_jax.utils.progress import Progress
from omnistream_jax.utils.tensor_file import TensorFileWriter, read_metadata

TOKENS = ("patches", "cls", "registers", "camera")
_DTYPES = ("float16", "bfloat16", "float32")
_SUFFIX = ".safetensors"


class ExtractionError(RuntimeError):
    """The run cannot go on; the message names the file and why."""


@dataclasses.dataclass(frozen=True)
class FeatureOptions:
    """What is computed and stored of each frame; the fields are those of configs/extract.py."""

    window: int
    sinks: int
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    final: bool
    dtype: str
    aspect_ratio: bool

    def open_stream(self, model: Model, frame: FrameOptions, source_size: tuple[int, int]) -> Any:
        """A stream of one video of `source_size` (height, width)."""
        return model.open_stream(
            1,
            frame.height,
            frame.width,
            window=self.window or None,
            sinks=self.sinks,
            layers=self.layers,
            camera_token="camera" in self.tokens,
            aspect_ratio=[source_size[0] / source_size[1]] if self.aspect_ratio else None,
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same for all items of a run."""

    models: tuple[Model, ...]  # the same, one a device
    frame: FrameOptions
    feature: FeatureOptions
    settings: Mapping[str, Any]
    output: Path
    scratch: Path  # of this process


def extract(config: ConfigDict, process_index: int | None = None, process_count: int | None = None) -> int:
    """Extract as the config says; configs/extract.py tells what is left in `config.output`.

    Args:
        config: of configs/extract.py.
        process_index, process_count: which share of the items is this process's; None takes the config's.

    Returns:
        The exit status: 0 if all of this process's items are finished, 1 if some failed.

    Raises:
        ConfigError: a field does not fit, or `config.output` holds features of other settings.
        DataError: there is nothing to do in `config.input`.
        WeightsError: the checkpoint cannot be read.
        WorkdirLockedError: another run works in `config.output`.
        ExtractionError: the features cannot be written.
    """
    index, count = _share(config, process_index, process_count)
    items = list_items(config.input)
    job = build(config, index)
    with WorkdirLock(job.scratch):
        refusal = f"output: {job.output} holds features made with other settings; use those, or another directory"
        config_lib.remember_settings(job.settings, job.output / "settings.json", refusal)
        mine = items[index::count]
        todo = [item for item in mine if not _is_finished(job, item)]
        _say(f"{len(mine)} items, {len(mine) - len(todo)} finished already, {len(todo)} to do")
        failures = _run(config, job, todo)
        with _index_lock(job.output):
            write_index(job.output)
            _merge_failures(job.output, count)
    finished = f"{len(mine) - len(failures)} of {len(mine)} items finished: {job.output / 'index.jsonl'}"
    failed = f"; {len(failures)} failed: {job.output / 'failed.jsonl'}" if failures else ""
    _say(finished + failed)
    return 1 if failures else 0


def build(config: ConfigDict, process_index: int = 0) -> Job:
    """Check the fields and load the model; nothing is written yet. Raises ConfigError or WeightsError."""
    for name in ("output", "checkpoint"):
        if not config[name]:
            raise ConfigError(f"{name}: expected a directory, got none; give --config.{name}=DIR")
    for name in ("workers", "prefetch"):
        if config[name] < 1:
            raise ConfigError(f"{name}: expected at least 1, got {config[name]}")
    if not config.log_seconds > 0:
        raise ConfigError(f"log_seconds: expected a positive number of seconds, got {config.log_seconds}")
    feature = _feature_options(config)
    frame = FrameOptions(**{field.name: config[field.name] for field in dataclasses.fields(FrameOptions)})
    model = None
    try:
        frame.check()
        model = model_lib.load(config.checkpoint, dtype=model_lib.dtype_of(config.compute_dtype))
        if "camera" in feature.tokens and not model.config.camera:
            raise ConfigError("tokens: these weights have no camera token; leave camera out")
        feature.open_stream(model, frame, (frame.height, frame.width))
    except files.WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    settings = dataclasses.asdict(frame) | dataclasses.asdict(feature)
    del settings["chunk"]  # how the frames are cut does not change the features
    settings |= {"compute_dtype": model.backbone.dtype.name, "model": files.fingerprint(config.checkpoint)}
    output = Path(config.output)
    models = tuple(
        dataclasses.replace(model, params=jax.device_put(model.params, device)) for device in jax.local_devices()
    )
    return Job(models, frame, feature, settings, output, output / f".process-{process_index}")


def _share(config: ConfigDict, index: int | None, count: int | None) -> tuple[int, int]:
    if count is None:
        if config.process_count < 0:
            raise ConfigError(f"process_count: expected a number of processes, or 0, got {config.process_count}")
        automatic = config.process_count == 0
        if automatic and config.process_index:
            raise ConfigError("process_index: give process_count too")
        index = jax.process_index() if automatic else config.process_index
        count = jax.process_count() if automatic else config.process_count
    if not 0 <= index < count:
        raise ConfigError(f"process_index: expected 0 to process_count - 1 = {count - 1}, got {index}")
    return index, count


def _feature_options(config: ConfigDict) -> FeatureOptions:
    tokens = tuple(config.tokens)
    if unknown := [token for token in tokens if token not in TOKENS]:
        raise ConfigError(f"tokens: expected a choice of {', '.join(TOKENS)}, got {', '.join(map(str, unknown))}")
    if len(set(tokens)) != len(tokens) or len(set(config.layers)) != len(config.layers):
        raise ConfigError("tokens and layers: each may be named once")
    if not tokens or not (config.final or config.layers):
        raise ConfigError("tokens, final, layers: nothing would be stored")
    if config.aspect_ratio and "camera" not in tokens:
        raise ConfigError("aspect_ratio: only the camera token uses it; add camera to tokens")
    if config.dtype not in _DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(_DTYPES)}, got {config.dtype!r}")
    if config.window < 0:
        raise ConfigError(f"window: expected a number of frames, or 0 for all, got {config.window}")
    return FeatureOptions(
        **{field.name: config[field.name] for field in dataclasses.fields(FeatureOptions)}
        | {"tokens": tuple(token for token in TOKENS if token in tokens), "layers": tuple(config.layers)}
    )


# One item


class _OpenItem:
    """An item on its way: its stream on a device, and its features so far on disk."""

    def __init__(self, job: Job, item: Item, slot: int):
        self._job, self._item = job, item
        self._model = job.models[slot % len(job.models)]
        self._device = jax.tree.leaves(self._model.params)[0].device
        self._writer = TensorFileWriter(job.scratch / f"item-{slot}")
        self._stream, self._source_size = None, (0, 0)
        self._times: list[np.ndarray] = []
        self._pending: tuple[int, Any] | None = None  # frames, and their features that the device may still compute

    def feed(self, chunk: FrameChunk) -> None:
        """Start the next frames on the device, and store the features of those before."""
        if self._stream is None:
            self._source_size = chunk.source_size
            with jax.default_device(self._device):
                self._stream = self._job.feature.open_stream(self._model, self._job.frame, chunk.source_size)
        frames, count = chunk.frames[None], len(chunk.times)
        if count < self._job.frame.chunk:  # the last: filled up, so that no other length must be compiled
            frames = np.pad(frames, [(0, 0), (0, self._job.frame.chunk - count)] + [(0, 0)] * 3, mode="edge")
        out, self._stream = self._model.step(self._stream, frames)
        feature = self._job.feature
        selected = select_features(out, feature.layers, feature.tokens, feature.final, feature.dtype)
        self._store()
        self._pending = count, selected
        self._times.append(chunk.times)

    def finish(self) -> None:
        """Write the file."""
        self._store()
        times = np.concatenate(self._times)
        self._writer.append("times", times)
        metadata = {
            "item": self._item.name,
            "source": printable(self._item.path),
            "kind": self._item.kind,
            "source_bytes": source_bytes(self._item),
            "source_size": list(self._source_size),
            "frames": len(times),
            "seconds": float(times[-1] - times[0]),
            "settings": self._job.settings,
        }
        texts = {name: value if isinstance(value, str) else _json(value) for name, value in metadata.items()}
        self._writer.finish(_feature_path(self._job.output, self._item), texts)

    def discard(self) -> None:
        """Leave nothing of it."""
        self._writer.discard()

    def _store(self) -> None:
        if self._pending is None:
            return
        count, (features, finite) = self._pending
        self._pending = None
        features, finite = jax.device_get((features, finite))
        if not finite[:count].all():
            # The frames of self._times are those stored before and these `count`.
            first = sum(map(len, self._times)) - count + int(np.argmin(finite[:count]))
            raise DataError(
                f"{self._item.path}: the features of frame {first} are not finite in {self._job.feature.dtype}; "
                "bfloat16 and float32 reach further than float16"
            )
        for name, values in features.items():
            self._writer.append(name, values[:count])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def select_features(
    out: BackboneOutput, layers: tuple[int, ...], tokens: tuple[str, ...], final: bool, dtype: str
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The chosen tokens of one video by name, each [n, ...] in `dtype`, and which of the n frames are finite in it."""
    parts = {}
    if final:
        parts |= {name: getattr(out, name)[0] for name in tokens}
    registers = out.registers.shape[2]
    specials = 1 + (out.camera is not None) + registers
    for layer, hidden in zip(layers, out.hidden, strict=True):  # [1, n, P, D], P: CLS, (CAM), registers, patches
        split = {
            "cls": hidden[0, :, 0],
            "camera": hidden[0, :, 1],
            "registers": hidden[0, :, specials - registers : specials],
            "patches": hidden[0, :, specials:].reshape(out.patches.shape[1:]),
        }
        parts |= {f"layer_{layer}.{name}": split[name] for name in tokens}
    features = {name: values.astype(dtype) for name, values in parts.items()}
    finite = [jnp.isfinite(values).reshape(len(values), -1).all(1) for values in features.values()]
    return features, jnp.stack(finite).all(0)


# All items


def _run(config: ConfigDict, job: Job, todo: Sequence[Item]) -> dict[str, str]:
    """Extract the items; the reasons of those that failed, by name."""
    failed_path = job.scratch / "failed.jsonl"
    failed_path.unlink(missing_ok=True)
    for leftover in job.scratch.glob("item-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    progress = Progress({item.name: source_bytes(item) for item in todo}, config.log_seconds)
    failures: dict[str, str] = {}
    waited = 0.0
    for item, reason, seconds in _extract_each(job, todo, config.workers, config.prefetch, progress):
        waited += seconds
        progress.end(item.name, failed=reason is not None)
        if reason is not None:
            failures[item.name] = reason
            _say(f"failed: {reason}")
            with failed_path.open("a", encoding="utf-8") as file:
                file.write(_json({"item": item.name, "reason": reason}) + "\n")
    if todo:
        progress.tell()
        share = waited / max(progress.seconds, 1e-9)
        _say(f"{progress.seconds:.1f} s, {share:.0%} of it waiting for {config.workers} decoding worker(s)")
    return failures


def _extract_each(
    job: Job, todo: Sequence[Item], workers: int, prefetch: int, progress: Progress
) -> Iterator[tuple[Item, str | None, float]]:
    """Items as they end, why they failed (None: they did not), and the seconds waited for decoding since the last."""
    opened = _OpenItems(job, workers)
    waited, asked = 0.0, time.monotonic()
    try:
        with DecodePool(todo, job.frame, workers, prefetch) as pool:
            for decoded in pool:
                waited += time.monotonic() - asked
                opened.take(decoded)
                if decoded.chunk is not None:
                    progress.advance(decoded.item.name, len(decoded.chunk.times), decoded.chunk.progress)
                else:
                    yield decoded.item, opened.end(decoded.item), waited
                    waited = 0.0
                asked = time.monotonic()
    except OSError as error:
        raise ExtractionError(f"{job.output}: the features cannot be written ({error})") from error


class _OpenItems:
    """The items on their way, at most one for each decoding worker."""

    def __init__(self, job: Job, workers: int):
        self._job, self._slots = job, set(range(workers))
        self._open: dict[str, tuple[int, _OpenItem]] = {}
        self._reasons: dict[str, str] = {}  # of items that failed and have not ended: their frames are passed over

    def take(self, decoded: Decoded) -> None:
        """Go on with an item by what the decoder gives."""
        item = decoded.item
        if item.name in self._reasons:
            return
        try:
            if decoded.failure is not None:
                raise DataError(decoded.failure)
            if item.name not in self._open:
                slot = min(self._slots)
                self._open[item.name] = slot, _OpenItem(self._job, item, slot)
                self._slots.discard(slot)
            if decoded.chunk is not None:
                self._open[item.name][1].feed(decoded.chunk)
            else:
                self._open[item.name][1].finish()
        except (DataError, jax.errors.JaxRuntimeError) as error:
            self._reasons[item.name] = _reason(self._job, item, error)
            self._close(item)
            _feature_path(self._job.output, item).unlink(missing_ok=True)  # of another state of the source

    def end(self, item: Item) -> str | None:
        """Why the item failed, or None."""
        self._close(item)
        return self._reasons.pop(item.name, None)

    def _close(self, item: Item) -> None:
        if item.name in self._open:
            slot, opened = self._open.pop(item.name)
            opened.discard()
            self._slots.add(slot)


def _reason(job: Job, item: Item, error: Exception) -> str:
    if isinstance(error, DataError):
        return printable(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    hint = "a smaller window, chunk or number of workers" if job.feature.window else "a window"
    return f"{item.path}: the device ran out of memory; set {hint}"


# What is in the output directory


def _feature_path(output: Path, item: Item) -> Path:
    return output / (safe_name(item.name) + _SUFFIX)


def safe_name(name: str) -> str:
    """A relative path for any name: plain names stay as they are, others are cleaned and marked with their hash."""
    parts = [re.sub(r"[^\w.+=@ -]", "_", part)[:100] for part in name.split("/") if part not in ("", ".", "..")]
    cleaned = "/".join("_" + part[1:] if part.startswith(".") else part for part in parts)
    if cleaned == name:
        return name
    return f"{cleaned or 'item'}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:10]}"


def _is_finished(job: Job, item: Item) -> bool:
    metadata = read_metadata(_feature_path(job.output, item)) or {}
    expected = {"item": item.name, "settings": _json(job.settings), "source_bytes": _json(source_bytes(item))}
    return expected.items() <= metadata.items()


def write_index(output: Path) -> None:
    """Make index.jsonl anew from the headers of the finished files, sorted by item."""
    rows = []
    for path in output.rglob(f"*{_SUFFIX}"):
        metadata = read_metadata(path)
        if metadata is None or "settings" not in metadata or path.relative_to(output).parts[0].startswith("."):
            continue
        rows.append(
            {
                "item": metadata["item"],
                "file": path.relative_to(output).as_posix(),
                "frames": int(metadata["frames"]),
                "size": json.loads(metadata["source_size"]),
                "seconds": json.loads(metadata["seconds"]),
                "bytes": path.stat().st_size,
            }
        )
    _write_rows(output / "index.jsonl", rows)


def _merge_failures(output: Path, process_count: int) -> None:
    """Join the processes' records of failure, each of its latest run."""
    rows = []
    for index in range(process_count):
        with contextlib.suppress(FileNotFoundError):
            lines = (output / f".process-{index}" / "failed.jsonl").read_text(encoding="utf-8").splitlines()
            rows += [json.loads(line) for line in lines]
    if rows:
        _write_rows(output / "failed.jsonl", rows)
    else:
        (output / "failed.jsonl").unlink(missing_ok=True)


def _write_rows(path: Path, rows: list[dict]) -> None:
    text = "".join(_json(row) + "\n" for row in sorted(rows, key=lambda row: row["item"]))
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _index_lock(output: Path) -> Iterator[None]:
    """One process at a time: the last to end sees the files of all, so its index is the whole one."""
    with (output / ".index.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _json(value: Any) -> str:
    return json.dumps(value)


def _say(line: str) -> None:
    print(line, flush=True)
