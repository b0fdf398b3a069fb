"""What a training run would need on devices that are not here: `config.job=plan`, on `config.topology`.

    python -m omnistream_jax.main --config=configs/pretrain.py:stage2 --config.job=plan --config.topology=h100:64

Every program of a step is compiled for those devices ahead of time, and nothing is run. No data and no weights are
opened: a batch's shapes follow from the config, and the Gram teacher is taken to be as large as the student.

Told are a device's memory, the model's FLOPs (counted by hand, flops.py), what is sent (read from the compiled
programs) and the time that a step takes at least (roofline.py). The compiler's memory is what a program reserves; that
of CUDA, NCCL and the allocator's gaps comes on top, for which topology.py leaves room.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnistream_jax.config import ConfigError
from omnistream_jax.flops import Flops, peak_flops, task_flops
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.ops.attention import attention_path
from omnistream_jax.plan_report import Plan, PlannedProgram, report
from omnistream_jax.programs import device_bytes, read_program
from omnistream_jax.roofline import UTILISATION, Times, read_messages
from omnistream_jax.sharding import replicated, split_batch, state_shardings
from omnistream_jax.step import TrainState, fresh_params, init_state, make_accumulate, make_update
from omnistream_jax.tasks.build import build_backbone, build_optimizer, build_tasks, teacher_schedule, trains_gram
from omnistream_jax.tasks.build_fields import EMBEDDED
from omnistream_jax.tasks.caption import CaptionTask
from omnistream_jax.tasks.geometry import GeometryTask
from omnistream_jax.tasks.self_supervision import SelfSupervisionTask
from omnistream_jax.tasks.task import Task
from omnistream_jax.topology import GPU_PACKAGES, Topology, link_bandwidth, parse_topology, planned_mesh, stand_in_for

# XLA's own products for GPUs are tried out on one; without it, it fails at some. cuBLAS's need no trial.
_COMPILER_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}
_BLOCK_REMAT = 4 / 3  # with remat "block", every forward pass that has a gradient is computed twice


def plan(config: ConfigDict) -> None:
    """The job: makes the plan and prints it, a program as soon as it is compiled.

    Raises:
        ConfigError: a field does not fit, or the plug-in for the topology is not installed.
    """
    print(report(make_plan(config, lambda line: print(line, flush=True))), flush=True)


def make_plan(config: ConfigDict, say: Callable[[str], None] = lambda line: None) -> Plan:
    """The plan of a config with a `topology`; `say` is told what is being compiled.

    Raises:
        ConfigError: as `plan`.
    """
    topology = parse_topology(config.topology)
    stand_in_for(topology)
    # What is compiled for devices that are not here cannot be loaded again, nor does it tell its memory.
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = planned_mesh(topology, **config.mesh)
    config = _without_files(config, topology)
    try:
        backbone = build_backbone(config)
        device = topology.device
        path = attention_path(backbone.dtype, backbone.config.head_width, device.platform, device.capability)
        gram = backbone.config if trains_gram(config) else None
        tasks = [_attending(task, path) for task in build_tasks(config, backbone.clone(attention=path), gram)]
        state, shardings = _abstract_state(config, backbone.clone(attention="xla"), tasks, gram is not None, mesh)
        optimizer = build_optimizer(config)
        optimizer.check_factors(state.params)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    jitted = {task.name: make_accumulate(task, config.seed, shardings) for task in tasks}
    arguments: dict[str, tuple] = {task.name: (state, state.params, _batch(task, mesh)) for task in tasks}
    losses = [jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))] * len(tasks)
    jitted["update"] = make_update(optimizer, teacher_schedule(config), shardings)
    arguments["update"] = (state, state.params, losses)
    flops = {task.name: task_flops(task) for task in tasks}
    remat = _BLOCK_REMAT if config.model.remat == "block" else 1.0
    programs = []
    for name, function in jitted.items():
        say(f"compiling {name}")
        compiled = functools.partial(_planned, name, topology, mesh, backbone.dtype, remat * flops.get(name, Flops()))
        programs.append(compiled(function, arguments[name], flops.get(name, Flops()).total))
        say(f"    {programs[-1].needs / 1e9:,.2f} GB a device")
    settings = f"{jnp.dtype(backbone.dtype).name}, attention by {path}, remat {config.model.remat}"
    return Plan(config.name, topology, mesh, settings, device_bytes(state), device_bytes(state.params), programs)


def _without_files(config: ConfigDict, topology: Topology) -> ConfigDict:
    """The config with what comes with the package in place of paths, and the number type of the topology."""
    config = config.copy_and_resolve_references()
    if config.model.dtype == "auto":
        config.model.dtype = "float32" if topology.device.platform == "cpu" else "bfloat16"
    for fields in config.tasks.values():
        fields.update({"paths": EMBEDDED, "path_weights": ()})
    if config.language.decoder.vocabulary_size:  # else it is the tokenizer's, which must be there
        config.language.tokenizer = EMBEDDED
    return config


def _attending(task: Task, path: str) -> Task:
    """The task with its Gram teacher's attention by `path`; that of the student is its backbone's."""
    gram = getattr(task, "gram_backbone", None)
    return task if gram is None else dataclasses.replace(task, gram_backbone=gram.clone(attention=path))


def _abstract_state(
    config: ConfigDict, backbone: Backbone, tasks: Sequence[Task], gram: bool, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """What stands for the state on the mesh, and the shardings of its leaves."""
    params = jax.eval_shape(functools.partial(fresh_params, backbone, tasks, config.seed))
    optimizer = build_optimizer(config)
    start = functools.partial(init_state, tasks=tasks, optimizer=optimizer)
    state = jax.eval_shape(lambda params, gram: start(params, gram=gram), params, params["backbone"] if gram else None)
    shardings = state_shardings(mesh, state)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, shardings), shardings


def batch_shapes(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a task's global batch as data/schema.py tells them, without "record".

    Raises:
        TypeError: a task of a kind that is not known here.
    """
    data = task.data
    rows, shape = data.global_batch_size, jax.ShapeDtypeStruct
    if isinstance(task, SelfSupervisionTask):
        frames, side, local, cells = data.frames, data.global_size, data.local_size, data.global_size // data.patch_size
        arrays = {
            "global_crops": shape((rows, 2, frames, side, side, 3), jnp.uint8),
            "local_crops": shape((rows, data.local_crops, frames, local, local, 3), jnp.uint8),
            "masks": shape((rows, 2, frames, cells, cells), jnp.bool_),
        }
        if data.gram_size is not None:
            arrays["gram_crops"] = shape((rows, 2, 1, data.gram_size, data.gram_size, 3), jnp.uint8)
        return arrays
    if isinstance(task, GeometryTask):
        clip = (rows, data.frames)
        pixels = (*clip, *data.size)
        flags = ("has_pose", "has_depth", "metric", "dynamic")
        return {
            "frames": shape((*pixels, 3), jnp.uint8),
            "depth": shape(pixels, jnp.float32),
            "valid": shape(pixels, jnp.bool_),
            "sky": shape(pixels, jnp.bool_),
            "intrinsics": shape((*clip, 3, 3), jnp.float32),
            "cam_to_world": shape((*clip, 4, 4), jnp.float32),
            **{name: shape((rows,), jnp.bool_) for name in flags},
        }
    if isinstance(task, CaptionTask):
        row = (rows, data.max_tokens)
        return {
            "image": shape((rows, data.captions_per_row, data.size, data.size, 3), jnp.uint8),
            **{name: shape(row, jnp.int32) for name in ("tokens", "segment", "position")},
            "target_mask": shape(row, jnp.bool_),
            "cut": shape((rows, data.captions_per_row), jnp.bool_),
            "texts": shape((rows, data.captions_per_row), jnp.int32),
        }
    raise TypeError(f"task {task.name}: the batches of a {type(task).__name__} are not known")


def _batch(task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: shape.update(sharding=split_batch(mesh)) for name, shape in batch_shapes(task).items()}


def _planned(
    name: str,
    topology: Topology,
    mesh: Mesh,
    dtype: jnp.dtype,
    executed: Flops,
    function: Callable,
    arguments: tuple,
    flops: float,
) -> PlannedProgram:
    """Compiles one program, and reads what a plan tells of it."""
    started = time.monotonic()
    try:
        compiled = function.lower(*arguments).compile(compiler_options=_COMPILER_OPTIONS.get(topology.device.platform))
    except jax.errors.JaxRuntimeError as error:
        refused = re.search(r"Used ([\d.]+)([MGT]) of [\d.]+[MGT] hbm", str(error))
        if refused is None:
            raise
        needs = float(refused[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[refused[2]]
        return PlannedProgram(name, None, needs, flops, None, None)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        packages = GPU_PACKAGES.format(v=jax.__version__)
        raise ConfigError(f"topology: attention on GPUs needs cuDNN to compile ({error}): {packages}") from error
    program = read_program(name, compiled, device_bytes(arguments), time.monotonic() - started)
    messages = read_messages(compiled.as_text(), mesh.size)
    times = None
    if peak := peak_flops(mesh.devices.flat[0], dtype):
        stats = compiled.memory_analysis()
        moved = stats.argument_size_in_bytes + stats.output_size_in_bytes + 2 * stats.temp_size_in_bytes
        times = Times(
            products=executed.executed / mesh.size / (UTILISATION * peak),
            memory=moved / topology.device.bandwidth,
            messages=sum(one.sent / link_bandwidth(topology, mesh, one.group) for one in messages.collectives),
        )
    return PlannedProgram(name, program, program.memory, flops, messages, times)
