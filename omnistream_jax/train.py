"""Pre-training, from top to bottom: build, restore, step, log, save, evaluate.

What a run starts from, in this order: its own last whole checkpoint; else the weights that `init.backbone` and
`init.decoder` name; else random parameters. Batches are determined by the step, so that a run that was stopped goes on
as if it had not been.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.build import Run, build
from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.data.pipeline import Pipeline, build_pipeline
from omnistream_jax.report import Trained, report
from omnistream_jax.sharding import global_batch, make_mesh
from omnistream_jax.step import TrainState, make_accumulate, make_update, merge_metrics
from omnistream_jax.tasks.build import teacher_schedule
from omnistream_jax.tasks.task import Task
from omnistream_jax.utils.lock import WorkdirLock
from omnistream_jax.utils.metrics import MetricsWriter

# A resumed run may differ in these; they do not change what is computed.
_MAY_CHANGE = ("log_every", "checkpoint", "loader", "evaluation", "compilation_cache")
_TERMINAL = (
    *("loss", "dino_global", "dino_local", "ibot_image", "ibot_clip", "koleo", "gram", "teacher_entropy"),
    *("depth", "rays", "points", "camera", "depth_abs_rel", "caption", "token_accuracy"),
)


class TrainingError(RuntimeError):
    """The run cannot go on; the message names the step, the task and the batch."""


def train(config: ConfigDict, workdir: Path) -> None:
    """Train as the config says, and leave checkpoints, metrics, the model and a picture in `workdir`.

    Raises:
        ConfigError: the config does not fit, or is not the one that `workdir` was made with.
        TrainingError: a loss is not finite.
    """
    run = build(config)
    _print_counts(run)
    with WorkdirLock(workdir):
        keep_every = config.checkpoint.keep_every or None
        with Checkpoints(
            workdir / "checkpoints", keep_last=config.checkpoint.keep_last, keep_every=keep_every
        ) as checkpoints:
            if not checkpoints.steps():  # a run that saved nothing binds nobody
                (workdir / "config.json").unlink(missing_ok=True)
            config_lib.remember(config, workdir, may_change=_MAY_CHANGE)
            state, start = _restore(checkpoints, run.state)
            with MetricsWriter(workdir, config.steps, restored_step=start, terminal_names=_TERMINAL) as metrics:
                try:
                    state = _run_steps(config, run, state, start, checkpoints, metrics)
                except KeyboardInterrupt:
                    raise TrainingError("stopped; the same command goes on from the last checkpoint") from None
                params = state.ema or state.params
                trained = Trained(run.backbone, run.tasks, run.initial, params)
                report(config, trained, workdir, metrics, _say)


def _restore(checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, int]:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored = checkpoints.restore_latest(abstract)
    if restored is None:
        return state, 0
    step, state, _ = restored
    _say(f"going on from step {step}")
    return state, step


def _run_steps(
    config: ConfigDict,
    run: Run,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
) -> TrainState:
    mesh = make_mesh()
    accumulate = {task.name: make_accumulate(task, config.seed) for task in run.tasks}
    update = make_update(run.optimizer, teacher_schedule(config))
    gradients = jax.tree.map(jnp.zeros_like, state.params)
    with build_pipeline(
        {task.name: task.data for task in run.tasks},
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start_step=start,
        workers=config.loader.workers,
        prefetch=config.loader.prefetch,
        max_failed_fraction=config.loader.max_failed_fraction,
    ) as pipeline:
        told: dict[str, dict[str, int]] = {}
        for step in range(start + 1, config.steps + 1):
            batches = next(pipeline)
            values: dict[str, Any] = {}
            for task in run.tasks:
                arrays = {name: array for name, array in batches[task.name].items() if name != "record"}
                gradients, values[task.name] = accumulate[task.name](state, gradients, global_batch(arrays, mesh))
            losses = [values[task.name]["loss"] for task in run.tasks]
            state, gradients, update_values = update(state, gradients, losses)

            values, update_values = jax.device_get((values, update_values))
            _check_finite(step, run.tasks, values, update_values, pipeline, batches)
            if step % config.log_every == 0 or step in (start + 1, config.steps):
                metrics.write(step, merge_metrics(run.tasks, values) | update_values)
                told = _tell_skipped(pipeline.skipped, told)
            if step % config.checkpoint.every == 0 or step == config.steps:
                checkpoints.save(step, state)
    return state


def _tell_skipped(skipped: dict[str, dict[str, int]], told: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Say which samples this process has skipped so far, source by source, when there are more than were told."""
    for source, reasons in skipped.items():
        if reasons != told.get(source):
            counts = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(reasons.items()))
            _say(f"skipped of {source}: {counts}")
    return {source: dict(reasons) for source, reasons in skipped.items()}


def _check_finite(
    step: int,
    tasks: Sequence[Task],
    values: Mapping[str, Mapping[str, np.ndarray]],
    update_values: Mapping[str, np.ndarray],
    pipeline: Pipeline,
    batches: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    wrong = [task.name for task in tasks if not np.isfinite(values[task.name]["loss"])]
    if not wrong and np.isfinite(update_values["gradient_norm"]):
        return
    what = f"the loss of {' and '.join(wrong)}" if wrong else "the gradient"
    files = pipeline.describe({name: batches[name] for name in wrong or batches})
    lines = [f"  {name}: {', '.join(paths)}" for name, paths in files.items()]
    raise TrainingError(
        f"step {step}: {what} is not finite; the update was not made. The batch came from\n" + "\n".join(lines)
    )


def _print_counts(run: Run) -> None:
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in run.state.params.items()}
    for name, count in counts.items():
        _say(f"{name:12} {count:13,} parameters")
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    _say(f"{'together':12} {sum(counts.values()):13,} parameters, on {devices}")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
