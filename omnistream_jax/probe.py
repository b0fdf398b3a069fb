"""Probes on a frozen backbone, from top to bottom: build, restore, step, save, evaluate, report.

Batches are determined by the step, so that a run that was stopped goes on as if it had not been. An evaluation that is
due follows the checkpoint of its step, and is done again where the run was stopped within it. Many processes train as
one, as in train.py; each evaluates its share of the samples on its own devices.
"""

import contextlib
import dataclasses
import json
import math
import operator
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.config import ConfigError, check_fields
from omnistream_jax.convert.files import WeightsError, fingerprint
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals import figures, paper_tables
from omnistream_jax.evals.probes import action, ade20k, imagenet, nyuv2
from omnistream_jax.evals.probes.base import EMBEDDED, Encode, Evaluation, Probe
from omnistream_jax.evals.probes.engine import ProbeState, Trainer, init_state, make_encode, read_share
from omnistream_jax.evals.probes.feature_cache import files_digest
from omnistream_jax.evals.probes.steps import FeatureSteps, FrameSteps
from omnistream_jax.evals.probes.sweep_plots import plot_sweep
from omnistream_jax.evals.probes.sweep_report import Report, best_of, from_json, sweep_table
from omnistream_jax.model import dtype_of, load
from omnistream_jax.sharding import batch_shards, copies_here, make_mesh, mesh_here
from omnistream_jax.tasks.build_fields import check_loader
from omnistream_jax.utils.agreement import from_first_process, lock_workdir, say
from omnistream_jax.utils.device_memory import full_device_told
from omnistream_jax.utils.files import write_json
from omnistream_jax.utils.metrics import MetricsWriter
from omnistream_jax.utils.versions import versions

PROTOCOLS = {"imagenet": imagenet, "nyuv2": nyuv2, "ade20k": ade20k, "action": action}
SUMMARY, EVALUATIONS, SETTINGS = "probe.json", "evaluations.json", "settings.json"
# A resumed run may differ in these; they do not change what is computed (mesh and encode_batch: but for its rounding).
_MAY_CHANGE = (
    *("log_every", "checkpoint_every", "loader", "mesh", "encode_batch", "heads_at_once", "evaluate_batch"),
    *("plots", "compilation_cache", "name", "output", "checkpoint"),  # of the last, the weights count
)
_PAPER_UNITS = {"top1": 100.0, "miou": 100.0, "rmse": 1.0}  # metric -> what ours is multiplied by for the paper's unit
_LEAST = {"steps": 1, "batch": 1, "evaluate_every": 0, "evaluate_batch": 1, "encode_batch": 0}
_LEAST |= {"heads_at_once": 0, "checkpoint_every": 1, "log_every": 1, "time_unit": 0, "learning_rate_batch": 0}
_LEAST |= {"loader.workers": 0, "loader.prefetch": 0, "loader.max_failed_fraction": 0, "loader.max_restarts": 0}
_SEEDS = ("seed", "world_seed", "validation_seed")  # of which a recipe has some; JAX's keys know 32 bits


class ProbeError(RuntimeError):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked configuration with what it names.

    Attributes:
        config: with its preset's values.
        settings: JSON values, all that the results depend on besides the data.
        probe: the protocol.
        mesh: of the devices that it uses.
        encode: the frozen backbone on it, where `config.augment` is True.
        encode_here: the same on this process's devices of the mesh.
    """

    config: ConfigDict
    settings: dict[str, Any]
    probe: Probe
    mesh: Mesh
    encode: Encode
    encode_here: Encode

    @property
    def output(self) -> Path:
        """Where all files lie."""
        return Path(self.config.output)


def probe(config: ConfigDict) -> int:
    """Train and score the heads as the config says; configs/evaluate_probes.py tells what is left in `config.output`.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: a field does not fit, or `config.output` holds results of other settings.
        DataError: the data set is not complete, or a file of it is damaged.
        WeightsError: the model cannot be read.
        WorkdirLockedError: another run works in `config.output`.
        CheckpointError: there are checkpoints but no whole one, or one cannot be saved.
        ProbeError: out of memory, stopped, or results that cannot be read or written.
    """
    job = build(config)
    with _explained(job), lock_workdir(job.output), jax.set_mesh(job.mesh):
        refusal = f"output: {job.output} holds results of other settings; use those, or another directory"
        remember = partial(config_lib.remember_settings, job.settings, job.output / SETTINGS, refusal)
        from_first_process(remember, errors=(ConfigError,))
        report = _train(job)
        if jax.process_index() != 0:
            return 0
        heads, best = job.probe.heads, report.best
        data = {"train": job.probe.train_settings(), "validation": job.probe.validation().settings()}
        complete = all(settings["complete"] for settings in data.values())
        content = {
            "config": config_lib.to_plain(job.config),
            "settings": job.settings,
            "versions": versions(),
            "device": f"{job.mesh.size} x {jax.devices()[0].device_kind}",
            "data": data,
            "score": job.probe.score,
            **report.content(heads),
            "published": _published(job.config.benchmark, complete),
        }
        write_json(job.output / SUMMARY, content)
        if job.config.plots:
            plot = plots_folder(job) / "learning_rates.png"
            plot_sweep(heads, report.scores, job.probe.score, best, plot)
        print(sweep_table(heads, report, job.probe.score), *_beside(job, report, complete), sep="\n", flush=True)
        print(job.output / SUMMARY, flush=True)
    return 0


def _beside(job: Job, report: Report, complete: bool) -> list[str]:
    """The paper's figures under ours, where it has any of this benchmark and the data are complete."""
    benchmark, best = job.config.benchmark, report.scores[report.best]
    if not benchmark:
        return []
    if not complete:
        return [f"{benchmark}: incomplete, not to be compared with published numbers"]
    ours = {name: factor * best[name] for name, factor in _PAPER_UNITS.items() if name in best}
    return [paper_tables.compare(benchmark, ours)]


def _published(benchmark: str, complete: bool) -> list[dict[str, Any]] | None:
    """The paper's figures of a benchmark; None where there is none, or the numbers may not be compared."""
    if not benchmark or not complete:
        return None
    rows = paper_tables.published(benchmark)
    return [dataclasses.asdict(figure) for figures in rows.values() for figure in figures.values()]


# Building


def build(config: ConfigDict) -> Job:
    """Check the fields, count the data and load the model; nothing is written yet. Raises as `probe`."""
    config = with_preset(config)
    _check(config)
    try:
        if config.plots:
            figures.check_plotting()
        mesh = make_mesh(**config.mesh)
        shards = batch_shards(mesh)
        if config.batch % shards:
            raise ConfigError(f"batch: expected a multiple of the {shards} devices that share it, got {config.batch}")
        model = load(config.checkpoint, dtype=dtype_of(config.compute_dtype))
        protocol = PROTOCOLS[config.probe].build(config, model.config)
        if config.benchmark:
            paper_tables.published(config.benchmark)
            if config.data == EMBEDDED:
                raise ConfigError(f"benchmark: expected '', for nobody published the world's, got {config.benchmark!r}")
    except DataError as error:
        if config.data == EMBEDDED:  # nothing but fields can be wrong
            raise ConfigError(str(error)) from error
        raise
    except WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not config.augment and protocol.train_samples() is None:
        raise ConfigError(f"augment: {config.probe} trains on random views alone; expected True, got False")
    fewest = min(len(data) for data in (protocol.validation(), protocol.train_samples()) if data is not None)
    if fewest < jax.process_count():
        raise ConfigError(f"data: {fewest} samples are too few for {jax.process_count()} processes")
    options = {"time_unit": config.time_unit or None, "frames_alone": protocol.frames_alone}
    here, clips = mesh_here(mesh), math.ceil(config.encode_batch / jax.process_count())
    encode = encode_here = make_encode(model, here, clips=clips, **options)
    if config.augment and here is not mesh:
        encode = make_encode(model, mesh, clips=config.encode_batch, **options)
    plain = config_lib.to_plain(config)
    settings = {name: value for name, value in plain.items() if name not in (*_MAY_CHANGE, "presets", "job")}
    settings |= {
        "model": fingerprint(config.checkpoint),
        "time_unit": config.time_unit or model.config.time_unit,
        "compute_dtype": model.backbone.dtype.name,
    }
    return Job(config, settings, protocol, mesh, encode, encode_here)


def with_preset(config: ConfigDict) -> ConfigDict:
    """The config with its preset's values where it has none of its own. Raises ConfigError for an unknown preset."""
    filled = config.copy_and_resolve_references()
    known = tuple(filled.presets)
    if filled.preset not in (known or ("",)):
        names = ", ".join(known) if known else "none, for there are no presets here"
        raise ConfigError(f"preset: expected {names}, got {filled.preset!r}")
    chosen = filled.presets[filled.preset] if known else {}
    for name, value in chosen.items():
        if filled[name] is None:
            filled[name] = value
    for name, value in filled.items():
        if value is None:
            raise ConfigError(f"{name}: expected a value, got none")
    return filled


def _check(config: ConfigDict) -> None:
    for name in ("checkpoint", "output", "data"):
        if not config[name]:
            raise ConfigError(f"{name}: expected a directory, got none; give --config.{name}=DIR")
    if config.probe not in PROTOCOLS:
        raise ConfigError(f"probe: expected one of {', '.join(PROTOCOLS)}, got {config.probe!r}")
    check_fields(config, "probe", PROTOCOLS[config.probe].FIELDS)
    for name, smallest in _LEAST.items():
        value = operator.attrgetter(name)(config)
        if not smallest <= value < math.inf:
            raise ConfigError(f"{name}: expected {smallest} or more, got {value}")
    for name in _SEEDS:
        if name in config and not 0 <= config[name] < 2**32:
            raise ConfigError(f"{name}: expected 0 to 2**32 - 1, got {config[name]}")
    check_loader(config.loader)
    for name in ("learning_rates", "weight_decays"):
        values = config[name]
        if not values or not all(isinstance(value, (int, float)) for value in values):
            raise ConfigError(f"{name}: expected numbers, one or more, as (1e-3, 1e-2), got {values!r}")


# Training


def _train(job: Job) -> Report:
    """All steps that are left, and the evaluations that are due."""
    config, protocol = job.config, job.probe
    trainer = Trainer(protocol, config.seed, job.mesh, config.heads_at_once)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(job.output / "checkpoints", keep_last=2))
        start = max(checkpoints.steps(), default=0)
        steps = stack.enter_context(_steps(job, trainer, start))
        state = init_state(protocol, steps.shapes, config.seed, job.mesh)
        state, restored = _restore(checkpoints, state)
        if restored != start:  # the newest was damaged
            steps = stack.enter_context(_steps(job, trainer, restored))
            start = restored
        report = _read_report(job, start)
        if _due(config, start) and not report.has(start):
            _evaluate(job, state, start, report)
        metrics = None
        if jax.process_index() == 0:
            metrics = stack.enter_context(MetricsWriter(job.output, config.steps, restored_step=start))
        for step in range(start + 1, config.steps + 1):
            state, losses = steps(state, step - 1)
            if metrics is not None and (step % config.log_every == 0 or step in (start + 1, config.steps)):
                losses = np.asarray(losses)
                # a head that diverged does not hide the others
                least, largest = float(np.fmin.reduce(losses)), float(losses.max())
                metrics.write(step, {"loss": least, "loss_largest": largest})
            due = _due(config, step)
            if due or step % config.checkpoint_every == 0:
                checkpoints.save(step, state, {"settings": job.settings, "versions": versions()})
            if due:
                _evaluate(job, state, step, report)
        return report


def _steps(job: Job, trainer: Trainer, start: int) -> contextlib.AbstractContextManager[FrameSteps | FeatureSteps]:
    """What makes a step: of frames that are encoded in it, or of features that are encoded once."""
    config = job.config
    if config.augment:
        return FrameSteps(trainer, job.encode, job.probe.train_data(), config.loader, start)
    path = job.output / "features" / "train.safetensors"
    samples = job.probe.train_samples()
    made_of = {"settings": job.settings, "data": samples.settings(), "files": files_digest(samples.source)}
    return FeatureSteps(trainer, job.encode_here, config.batch, path, made_of, config.loader.workers)


def _restore(checkpoints: Checkpoints, state: ProbeState) -> tuple[ProbeState, int]:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored = checkpoints.restore_latest(abstract)
    if restored is None:
        return state, 0
    step, state, _ = restored
    say(f"going on from step {step}")
    return state, step


def _due(config: ConfigDict, step: int) -> bool:
    return step == config.steps or bool(step and config.evaluate_every and step % config.evaluate_every == 0)


# Evaluation


def _evaluate(job: Job, state: ProbeState, step: int, report: Report) -> None:
    """Score all heads at a step, keep the scores, and draw what belongs to the ones that are reported so far."""
    protocol, here = job.probe, mesh_here(job.mesh)
    samples = read_share(protocol.validation(), job.config.loader.workers)
    variables = state.variables
    if here is not job.mesh:
        variables = copies_here(variables, here)
    with jax.set_mesh(here):
        evaluation = protocol.evaluate(job.encode_here, variables, samples)
    report.add(step, evaluation.scores)
    if jax.process_index() != 0:
        return
    if job.config.plots and report.step == step:
        _draw(job, evaluation)
    write_json(job.output / EVALUATIONS, {"evaluations": report.rows()})
    best = best_of(evaluation.scores, protocol.score, protocol.higher_is_better)
    value, rate = evaluation.scores[best][protocol.score], protocol.heads.learning_rates[best]
    print(f"step {step}: {protocol.score} {value:.4f}, of the head of learning rate {rate:.4g}", flush=True)


def _draw(job: Job, evaluation: Evaluation) -> None:
    for name, draw in evaluation.plots.items():
        draw(plots_folder(job) / f"{name}.png")


def plots_folder(job: Job) -> Path:
    """Where pictures lie; it is made."""
    folder = job.output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_report(job: Job, start: int) -> Report:
    """What was evaluated up to the step from which the run goes on."""
    protocol, path = job.probe, job.output / EVALUATIONS
    report = Report(protocol.score, protocol.higher_is_better, protocol.best_evaluation)
    if not start or not path.exists():
        return report
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["evaluations"]:
            if row["step"] <= start:
                report.add(row["step"], from_json(row["scores"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProbeError(f"{path} cannot be read as the evaluations of an earlier run ({error})") from error
    return report


@contextlib.contextmanager
def _explained(job: Job) -> Iterator[None]:
    """What can go wrong outside the program as a ProbeError."""
    try:
        with full_device_told(ProbeError, "a smaller encode_batch, evaluate_batch or heads_at_once"):
            yield
    except KeyboardInterrupt:
        raise ProbeError("stopped; the same command goes on from the last checkpoint") from None
    except OSError as error:
        raise ProbeError(f"{job.output}: the run cannot go on ({error})") from error
