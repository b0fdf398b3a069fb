"""Pre-training, from top to bottom: build, restore, step, log, save, evaluate.

What a run starts from, in this order: its own last whole checkpoint; else the weights that `init.backbone`,
`init.decoder` and `init.weights` name; else random parameters. Batches are determined by the step, so that a run that
was stopped goes on as if it had not been.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.build import Run, build
from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import Pipeline, build_pipeline
from omnistream_jax.evals.during_training import RunEvaluators
from omnistream_jax.faults import Counters, FiniteGuard, NonFiniteError, Saver, disk_refused, unless_disk_full
from omnistream_jax.flops import task_flops
from omnistream_jax.model import build_model
from omnistream_jax.preemption import Preemption
from omnistream_jax.profiling import Profiler
from omnistream_jax.programs import Program, compile_step, table, write_programs
from omnistream_jax.report import Trained, pictures, report
from omnistream_jax.sharding import global_batch, host_copy
from omnistream_jax.step import TrainState, make_accumulate, make_update, merge_metrics, zero_gradients
from omnistream_jax.tasks.build import teacher_schedule
from omnistream_jax.utils.agreement import from_first_process, lock_workdir, say
from omnistream_jax.utils.device_memory import full_device_told
from omnistream_jax.utils.metrics import MetricsWriter
from omnistream_jax.utils.step_deadline import StepDeadline
from omnistream_jax.utils.versions import versions
from omnistream_jax.watch import Watch

# A resumed run may differ in these; they do not change what is computed (the mesh: but for its rounding).
_MAY_CHANGE = (
    *("log_every", "checkpoint", "loader", "evaluation", "compilation_cache", "mesh"),
    *("max_nonfinite_steps", "requeue_exit_code", "distributed", "pictures_every", "profile", "evaluators"),
)
_TERMINAL = (
    *("loss", "dino_global", "dino_local", "ibot_image", "ibot_clip", "koleo", "gram", "teacher_entropy"),
    *("depth", "rays", "points", "camera", "depth_abs_rel", "caption", "token_accuracy"),
    *("knn_top1", "linear_top1", "evaluators_seconds"),
)
_LESS_MEMORY = "smaller tasks.*.batch_size, more tasks.*.micro_batches, model.remat=block or a larger mesh.fsdp"


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why."""


def train(config: ConfigDict, workdir: Path) -> None:
    """Train as the config says, and leave checkpoints, metrics, the model and a picture in `workdir`.

    Raises:
        ConfigError: the config does not fit, or is not the one that `workdir` was made with.
        WorkdirLockedError: another run works in `workdir`.
        CheckpointError: there are checkpoints but no whole one; or three saves in a row have failed.
        TrainingError: too many steps in a row were not finite; a device ran out of memory; the end of the run could not
            be written.
        PreemptedError: SIGTERM; what has been trained is saved. It ends the program with `config.requeue_exit_code`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disk_told(workdir))
        stack.enter_context(full_device_told(TrainingError, _LESS_MEMORY))
        preemption = stack.enter_context(Preemption(config.requeue_exit_code))
        known = from_first_process(workdir.exists)
        if known:
            stack.enter_context(lock_workdir(workdir))
        run = build(config)
        _print_counts(run)
        evaluators = _open_evaluators(config, run)
        if not known:  # a config that cannot work has left no directory behind
            stack.enter_context(lock_workdir(workdir))
        keep_every = config.checkpoint.keep_every or None
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep_last=config.checkpoint.keep_last, keep_every=keep_every)
        )
        from_first_process(lambda: _remember(config, workdir, checkpoints), errors=(config_lib.ConfigError,))
        state, start, counters = _restore(checkpoints, run.state)
        with _open_metrics(config, workdir, start) as metrics:
            saver = Saver(checkpoints, counters, say, last_saved=start)
            guard = FiniteGuard(counters, config.max_nonfinite_steps, workdir)
            try:
                state = _run_steps(config, run, workdir, state, start, saver, guard, preemption, metrics, evaluators)
            except KeyboardInterrupt:
                raise TrainingError("stopped; the same command goes on from the last checkpoint") from None
            except NonFiniteError as error:
                raise TrainingError(str(error)) from error
            trained = _trained(run, state)  # every process gives its part; from then on each ends for itself
            preemption.nothing_to_save()
            report(config, trained, workdir, metrics, say)


@contextlib.contextmanager
def _disk_told(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not disk_refused(error):
            raise
        raise TrainingError(
            f"{workdir}: {error}. What is saved is whole; the same command goes on from there"
        ) from error


def _open_metrics(
    config: ConfigDict, workdir: Path, start: int
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """The writer in process 0, which writes for all; None in the others."""
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    return MetricsWriter(workdir, config.steps, restored_step=start, terminal_names=_TERMINAL)


def _remember(config: ConfigDict, workdir: Path, checkpoints: Checkpoints) -> None:
    if not (checkpoints.steps() or checkpoints.damaged()):  # a run that saved nothing binds nobody
        (workdir / "config.json").unlink(missing_ok=True)
    config_lib.remember(config, workdir, may_change=_MAY_CHANGE)


def _restore(checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, int, Counters]:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored = checkpoints.restore_latest(abstract)
    if restored is None:
        return state, 0, Counters()
    step, state, metadata = restored
    say(f"going on from step {step}")
    if metadata["versions"] != versions():
        say(f"it was saved by {_named(metadata['versions'])}; this is {_named(versions())}")
    return state, step, Counters(**metadata["counters"])


def _run_steps(
    config: ConfigDict,
    run: Run,
    workdir: Path,
    state: TrainState,
    start: int,
    saver: Saver,
    guard: FiniteGuard,
    preemption: Preemption,
    metrics: MetricsWriter | None,
    evaluators: RunEvaluators | None,
) -> TrainState:
    origin = {"config": config_lib.to_plain(config), "versions": versions()}
    shardings = run.shardings
    accumulate = {task.name: make_accumulate(task, config.seed, shardings) for task in run.tasks}
    update = make_update(run.optimizer, teacher_schedule(config), shardings)
    gradients = zero_gradients(state)
    watch = Watch(run.tasks, run.backbone.dtype, run.mesh.size)
    evaluate = functools.partial(_evaluate, evaluators, run, metrics)
    if config.evaluators.every and start == 0:
        evaluate(state, start)
    with (
        StepDeadline(config.distributed.step_deadline_seconds) as deadline,
        Profiler(workdir / "profile", **config.profile, say=say) as profiler,
        build_pipeline(
            {task.name: task.data for task in run.tasks},
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start,
            workers=config.loader.workers,
            prefetch=config.loader.prefetch,
            max_failed_fraction=config.loader.max_failed_fraction,
            max_restarts=config.loader.max_restarts,
        ) as pipeline,
    ):
        told: dict[str, dict[str, int]] = {}
        for step in range(start + 1, config.steps + 1):
            profiler.before(step)
            watch.charge("other")
            batches = next(pipeline)
            watch.charge("data")
            if step == start + 1:
                arrays = {task.name: _on_mesh(batches[task.name], run) for task in run.tasks}
                _tell_programs(run, workdir, compile_step(accumulate, update, state, gradients, arrays))
                watch.charge("compile")
            values: dict[str, Any] = {}
            for task in run.tasks:
                arrays = _on_mesh(batches[task.name], run)
                gradients, values[task.name] = accumulate[task.name](state, gradients, arrays)
            losses = [values[task.name]["loss"] for task in run.tasks]
            state, gradients, update_values = update(state, gradients, losses)

            values, update_values = jax.device_get((values, update_values))
            watch.charge("device")
            watch.count(step, batches)
            task_losses = {task.name: float(values[task.name]["loss"]) for task in run.tasks}
            made_of = functools.partial(_made_of, pipeline, batches)
            guard.check(step, task_losses, float(update_values["gradient_norm"]), made_of)
            if step % config.log_every == 0 or step in (start + 1, config.steps):
                values = merge_metrics(run.tasks, values) | update_values | saver.counters.metrics()
                speed = watch.speed()
                if metrics is not None:
                    with unless_disk_full(f"step {step}: its numbers could not be written"):
                        metrics.write(step, values, speed)
                told = _tell_skipped(pipeline.skipped, told)
            if config.pictures_every and step % config.pictures_every == 0 and step < config.steps:
                _draw(config, run, state, step, metrics)
            evaluating = config.evaluators.every and (step % config.evaluators.every == 0 or step == config.steps)
            if evaluating:
                deadline.step_done(long=True)
                evaluate(state, step)
            watch.charge("other")
            leaving = preemption.reached()
            if leaving or step % config.checkpoint.every == 0 or step == config.steps:
                saver.save(step, state, origin)
            if leaving:
                preemption.leave(f"SIGTERM: the run ends here, saved at step {saver.finish()} of {config.steps}")
            watch.charge("save")
            # The others wait in their next step while process 0 evaluates.
            deadline.step_done(long=evaluating)
    if saver.finish() < config.steps:
        raise TrainingError("the last step could not be saved; with free space, the same command does it again")
    return state


def _on_mesh(batch: Mapping[str, Any], run: Run) -> dict[str, jax.Array]:
    return global_batch({name: array for name, array in batch.items() if name != "record"}, run.mesh)


def _trained(run: Run, state: TrainState) -> Trained:
    return Trained(run.backbone, run.tasks, run.initial, host_copy(state.ema or state.params))


def _draw(config: ConfigDict, run: Run, state: TrainState, step: int, metrics: MetricsWriter | None) -> None:
    """Pictures of what has been learned so far, for TensorBoard."""
    trained = _trained(run, state)  # every process gives its part
    if metrics is not None:
        with unless_disk_full(f"step {step}: its pictures could not be written"):
            for name, picture in pictures(config, trained).items():
                metrics.write_image(step, name, picture)


def _open_evaluators(config: ConfigDict, run: Run) -> RunEvaluators | None:
    """Those of `config.evaluators` in process 0, which evaluates for all; None in the others, and where none is due."""
    fields, opened = config.evaluators, []
    if fields.every < 0:
        raise config_lib.ConfigError(f"evaluators.every: expected 0 or more, got {fields.every}")
    if fields.every:
        make = functools.partial(RunEvaluators, fields, run.backbone.config.patch_size)
        say(f"evaluators: reading {fields.train_images:,} + {fields.test_images:,} pictures ({fields.paths})")
        try:
            from_first_process(lambda: opened.append(make()), errors=(DataError, ValueError))
        except DataError:
            raise
        except ValueError as error:
            raise config_lib.ConfigError(str(error)) from error
    return opened[0] if opened else None


def _evaluate(
    evaluators: RunEvaluators | None, run: Run, metrics: MetricsWriter | None, state: TrainState, step: int
) -> None:
    params = host_copy((state.ema or state.params)["backbone"])  # every process gives its part
    if evaluators is not None and metrics is not None:
        model = build_model(run.backbone.config, jax.device_put(params), dtype=run.backbone.dtype)
        values = dict(evaluators.run(model))
        with unless_disk_full(f"step {step}: its accuracies could not be written"):
            metrics.write(step, values)


def _tell_programs(run: Run, workdir: Path, programs: Sequence[Program]) -> None:
    flops = {task.name: task_flops(task).total for task in run.tasks}
    say(table(programs, flops))
    if jax.process_index() == 0:
        with unless_disk_full("the memory of the programs could not be written"):
            write_programs(workdir / "programs.json", programs, flops, run.mesh.size)


def _made_of(pipeline: Pipeline, batches: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    files = pipeline.describe(batches)
    return {name: {"records": batches[name]["record"].ravel().tolist(), "files": files[name]} for name in batches}


def _tell_skipped(skipped: dict[str, dict[str, int]], told: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Say which samples this process has skipped so far, source by source, when there are more than were told."""
    for source, reasons in skipped.items():
        if reasons != told.get(source):
            counts = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(reasons.items()))
            who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            print(f"{who}skipped of {source}: {counts}", flush=True)
    return {source: dict(reasons) for source, reasons in skipped.items()}


def _named(made_by: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in made_by.items())


def _print_counts(run: Run) -> None:
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in run.state.params.items()}
    for name, count in counts.items():
        say(f"{name:12} {count:13,} parameters")
    unused = jax.device_count() - run.mesh.size
    devices = f"{run.mesh.size} {jax.default_backend()} device(s)"
    devices += f"; {unused} more are not used (config.mesh)" if unused else ""
    say(f"{'together':12} {sum(counts.values()):13,} parameters, on {devices}")
