"""Plans for devices that are not here, against what running the same here shows, and against numbers worked by hand."""

import json
import os
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from training_cases import PRETRAIN, REPOSITORY, whole_config

from omnistream_jax.config import ConfigError
from omnistream_jax.plan import batch_shapes
from omnistream_jax.roofline import Times, read_messages
from omnistream_jax.tasks.build import build_backbone, build_tasks
from omnistream_jax.topology import link_bandwidth, parse_topology, planned_mesh

# Of what the process grows by in a program beside what the plan says; of what it has in arrays.
MEMORY_TOLERANCE = 0.1
ARRAYS_TOLERANCE = 1e-3


@pytest.mark.parametrize(
    ("name", "count", "host"),
    [("cpu:3", 3, 3), ("h100:64", 64, 8), ("a100:4", 4, 4), ("v5e:16x16", 256, 256), ("v5p:4x4x8", 128, 128)],
)
def test_a_topology_is_as_many_devices_as_its_name_says(name, count, host):
    topology = parse_topology(name)
    assert (topology.count, topology.host_devices) == (count, host)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "COUNT of cpu, a100, h100, h200 or SIDES of v5e, v5p, v6e"),
        ("h100", "expected h100:COUNT"),
        ("h1000:8", "COUNT of"),
        ("h100:0", "expected h100:COUNT"),
        ("h100:12", "whole hosts of 8"),
        ("v5e:256", "expected v5e:4x4"),
        ("v5p:4x4", "expected v5p:4x4x8"),
    ],
)
def test_what_is_no_topology_is_refused_with_what_was_expected(name, expected):
    with pytest.raises(ConfigError, match=f"^topology: .*{expected}.*got {name!r}"):
        parse_topology(name)


def test_a_missing_plug_in_is_named_with_the_version_that_jax_asks_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"v5e:.*\(no module libtpu\): pip install --no-deps 'libtpu==[\d.*]+'$"):
        planned_mesh(parse_topology(f"v5e:1x{jax.device_count()}"))


def test_batches_are_planned_with_the_shapes_and_types_that_the_data_gives():
    config = whole_config(self_supervision__gram__size=48)
    backbone = build_backbone(config)
    for task in build_tasks(config, backbone, backbone.config):
        batch = task.data.dataset(0, 0, 1)[0]
        found = {
            name: (np.shape(array), np.asarray(array).dtype)
            for name, array in batch.items()
            if name not in ("record", "skipped")
        }
        assert {name: (shape.shape, shape.dtype) for name, shape in batch_shapes(task).items()} == found, task.name


PROGRAM_TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[8,100])) -> (s32[], bf16[8,100]) {
  %state = (s32[], bf16[8,100]{1,0}) parameter(0)
  %start = (bf16[2,100], bf16[8,100]{1,0}) all-gather-start(%part), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %done = bf16[8,100]{1,0} all-gather-done(%start)
  ROOT %next = (s32[], bf16[8,100]{1,0}) tuple(%i, %done)
}

%condition (state: (s32[], bf16[8,100])) -> pred[] {
  %state = (s32[], bf16[8,100]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (whole: f32[64]) -> f32[16] {
  %sum.1 = f32[64]{0:T(128)} all-reduce(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[16]{0:T(128)} dynamic-slice(%sum.1, %i), dynamic_slice_sizes={16}
}

ENTRY %main (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %loop = (s32[]) while(%i), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %both = (f32[10]{0}, /*index=1*/f32[5]{0}) all-reduce(%p, %q), replica_groups=[1,8]<=[8], to_apply=%add
  %alone = f32[1000]{0} all-reduce(%r), replica_groups=[8,1]<=[8], to_apply=%add
  %part = f32[16]{0} reduce-scatter(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  ROOT %scattered = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_messages_are_read_with_their_bytes_their_groups_and_the_trips_of_their_loops():
    found = {(one.kind, one.size, one.group, one.times) for one in read_messages(PROGRAM_TEXT, 8).collectives}
    assert found == {
        ("all-gather", 1600, (0, 2, 4, 6), 24),
        ("reduce-scatter", 256, (0, 1, 2, 3), 1),  # as a TPU writes it
        ("all-reduce", 60, tuple(range(8)), 1),
        ("reduce-scatter", 128, (0, 4), 1),
    }
    sums = read_messages(PROGRAM_TEXT, 8).by_kind()
    assert sums["all-gather"] == (24, 24 * 1600 * 3 / 4)
    assert sums["all-reduce"] == (1, 2 * 60 * 7 / 8)
    assert sums["reduce-scatter"] == (2, 256 * 3 / 4 + 128 / 2)


def test_a_loop_of_unknown_length_that_sends_is_told():
    text = PROGRAM_TEXT.replace(', backend_config={"known_trip_count":{"n":"24"}}', "")
    assert read_messages(text, 8).unknown_loops == 1
    assert read_messages(PROGRAM_TEXT, 8).unknown_loops == 0


def test_a_loop_runs_as_often_as_its_condition_counts_where_a_tpu_tells_no_more():
    text = PROGRAM_TEXT.replace(', backend_config={"known_trip_count":{"n":"24"}}', "")
    text = text.replace("  ROOT %less =", "  %n = s32[]{:T(128)} constant(12)\n  ROOT %less =")
    found = read_messages(text, 8)
    assert found.by_kind()["all-gather"][0] == 12
    assert found.unknown_loops == 0


def test_links_within_a_host_along_a_host_s_adapters_and_around_a_torus():
    hosts = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(process_index=index // 8) for index in range(16)])
    )
    gpus = parse_topology("h100:16")
    assert link_bandwidth(gpus, hosts, range(8)) == 450e9
    assert link_bandwidth(gpus, hosts, (0, 8)) == 50e9
    assert link_bandwidth(gpus, hosts, range(16)) == 400e9
    chips = [types.SimpleNamespace(coords=(x, y, 0)) for x in range(16) for y in range(4)]
    torus = types.SimpleNamespace(devices=np.array(chips).reshape(16, 4))
    tpus = parse_topology("v5e:16x4")
    assert link_bandwidth(tpus, torus, range(4)) == 4.5e10  # a side of 4 ends
    assert link_bandwidth(tpus, torus, range(0, 64, 4)) == 9e10  # one of 16 is a ring
    assert link_bandwidth(tpus, torus, range(64)) == 13.5e10


def test_a_program_takes_the_longest_of_its_times_and_messages_come_on_top_where_nothing_hides_them():
    times = Times(products=3.0, memory=2.0, messages=4.0)
    assert (times.hidden, times.exposed) == (4.0, 7.0)


def command(*arguments: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "omnistream_jax.main", f"--config={PRETRAIN}", "--config.job=plan", *arguments]
    return subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_the_command_refuses_a_wrong_topology_in_one_line():
    ended = command("--config.topology=h100:12")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.strip().splitlines()[-1] == (
        "error: topology: expected up to 8 GPUs or whole hosts of 8, got 'h100:12'"
    )


# What the plan says, and what this process has in arrays and grows by. Each program is run once before it is measured:
# XLA's own pools, which stay, come with the first run.
AGREEMENT = """
    import ctypes, gc, json, sys

    import jax

    jax.config.update("jax_disable_most_optimizations", True)  # time goes into compiling
    from omnistream_jax.build import build
    from omnistream_jax.plan import make_plan
    from omnistream_jax.sharding import global_batch
    from omnistream_jax.step import make_accumulate, zero_gradients
    from training_cases import whole_config

    config = whole_config(**json.loads(sys.argv[1]))
    made = make_plan(config)
    before = sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards[:1])

    def resident(field):
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return 1024 * int(line.split()[1])

    def growth(function, *arguments):
        jax.block_until_ready(arguments)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        start = resident("VmRSS")
        result = jax.block_until_ready(function(*arguments))
        return resident("VmHWM") - start, result

    config.topology = ""  # of plans alone
    run = build(config)
    state, tasks, mesh, shardings = run.state, run.tasks, run.mesh, run.shardings
    del run  # its host copy of the initial backbone is, on a CPU, the device's array itself
    gradients = zero_gradients(state)
    gc.collect()
    arrays = sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards[:1]) - before
    grown = {}
    for task in tasks:
        batch = task.data.dataset(0, 0, 1)[0]
        batch = global_batch({name: batch[name] for name in batch.keys() - {"record", "skipped"}}, mesh)
        accumulate = make_accumulate(task, config.seed, shardings).lower(state, gradients, batch).compile()
        gradients, _ = accumulate(state, gradients, batch)
        grown[task.name], (gradients, _) = growth(accumulate, state, gradients, batch)
    print(json.dumps({
        "arrays": arrays,
        "grown": grown,
        "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "state": made.state,
        "gradients": made.gradients,
        "planned": {one.name: one.program.temporaries + one.program.outputs for one in made.programs},
        "messages": {one.name: one.messages.by_kind() for one in made.programs},
    }))
"""


def agreement(devices: int, **overrides: object) -> dict:
    # What XLA's products set aside beside their program goes with the number of threads; several devices need many
    # (mesh_cases.py).
    threads = "1" if devices == 1 else "64"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": threads, "PYTHONPATH": str(REPOSITORY / "tests")}
    program = [sys.executable, "-c", textwrap.dedent(AGREEMENT), json.dumps(overrides)]
    ended = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return json.loads(ended.stdout.splitlines()[-1])


def without(*tasks: str) -> dict[str, float]:
    return {f"tasks__{task}__weight": 0.0 for task in tasks}


def test_the_plan_of_a_small_model_is_what_running_it_here_shows():
    """What it says of arrays is what the process has in arrays, and of a program, by how much its peak grows."""
    sizes = {"tasks__caption__batch_size": 32, "tasks__caption__size": 64, "self_supervision__gram__weight": 0.0}
    found = agreement(1, **sizes, **without("image_ssl", "clip_ssl", "clip_geometry"), topology="cpu:1")
    assert found["arrays"] == pytest.approx(found["state"] + found["gradients"], rel=ARRAYS_TOLERANCE)
    assert found["planned"]["caption"] > 90e6  # so much that the tolerance is above a process's own few megabytes
    assert found["grown"]["caption"] == pytest.approx(found["planned"]["caption"], rel=MEMORY_TOLERANCE)
    assert not any(found["messages"].values())


@pytest.mark.slow
def test_the_plan_of_every_task_is_what_running_it_here_shows():
    sizes = {"tasks__image_ssl__batch_size": 64, "tasks__image_ssl__global_size": 96, "topology": "cpu:1"}
    sizes |= {"tasks__clip_ssl__batch_size": 16, "tasks__clip_ssl__global_size": 96, "tasks__clip_ssl__frames": 4}
    sizes |= {"tasks__clip_geometry__height": 96, "tasks__clip_geometry__width": 96}
    sizes |= {"tasks__clip_geometry__batch_size": 8, "tasks__caption__batch_size": 32, "tasks__caption__size": 96}
    found = agreement(1, **sizes)
    for name, grown in found["grown"].items():
        assert grown == pytest.approx(found["planned"][name], rel=MEMORY_TOLERANCE, abs=8e6), name


@pytest.mark.slow
def test_a_device_s_share_of_what_a_mesh_splits_is_planned():
    sizes = {f"tasks__{task}__batch_size": 4 for task in ("image_ssl", "clip_geometry")}
    found = agreement(2, **sizes, **without("clip_ssl", "caption"), mesh__fsdp=2, topology="cpu:2")
    assert found["arrays"] == pytest.approx(found["state"] + found["gradients"], rel=ARRAYS_TOLERANCE)
    assert 0.5 < found["state"] / found["whole"] < 0.8  # small arrays stay whole copies
    assert found["messages"]["clip_geometry"]["all-gather"][0] > 0
    assert set(found["messages"]["update"]) == {"all-reduce"}
