"""Where arrays lie on a mesh, and that a mesh changes nothing but who computes."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from mesh_cases import collectives, largest_difference, run_program
from training_cases import small_config, whole_config

from omnistream_jax import sharding
from omnistream_jax.build import build
from omnistream_jax.config import ConfigError
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.step import fresh_params, init_state
from omnistream_jax.tasks.build import build_optimizer, build_tasks

SHARE = {"data": 1, "fsdp": 8, "tensor": 1}
BOTH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "expected"),
    [
        ("params/backbone/blocks/attention/qkv_kernel", (24, 1024, 3, 16, 64), SHARE, (None, "fsdp")),
        ("params/backbone/blocks/attention/qkv_kernel", (24, 1024, 3, 16, 64), BOTH, (None, "fsdp", None, "tensor")),
        ("ema/backbone/blocks/attention/projection/kernel", (24, 16, 64, 1024), BOTH, (None, "tensor", None, "fsdp")),
        ("gram/blocks/mlp/hidden/kernel", (24, 1024, 4096), SHARE, (None, None, "fsdp")),
        ("gram/blocks/mlp/hidden/kernel", (24, 1024, 4096), BOTH, (None, "fsdp", "tensor")),
        ("gram/blocks/mlp/output/kernel", (24, 4096, 1024), BOTH, (None, "tensor", "fsdp")),
        ("optimizer/0/mu/dino_head/last_layer/kernel", (256, 65_536), SHARE, (None, "fsdp")),
        ("optimizer/0/mu/dino_head/last_layer/kernel", (256, 65_536), BOTH, ("fsdp", "tensor")),
        ("params/decoder/embedding", (151_936, 1024), SHARE, ("fsdp",)),
        ("params/decoder/embedding", (151_936, 1024), BOTH, ("tensor", "fsdp")),
        ("params/decoder/blocks/key/kernel", (28, 1024, 8, 128), BOTH, (None, "fsdp", "tensor")),
        ("params/decoder/blocks/down/kernel", (28, 3072, 1024), BOTH, (None, "tensor", "fsdp")),
        ("params/geometry/dpt/ray_neck_0/conv/kernel", (3, 3, 256, 128), BOTH, (None, None, "fsdp")),
        # A block's share counts, not all of them; the axis of blocks is never split, though 8 divides 24.
        ("params/backbone/blocks/norm1/scale", (24, 1024), SHARE, ()),
        ("params/backbone/blocks/attention/query_bias", (24, 16, 64), BOTH, (None, "tensor")),
        ("params/backbone/register_tokens", (2, 4, 1024), SHARE, ()),
        ("step", (), BOTH, ()),
        # 7 divides no axis, 6 the second.
        ("params/dino_head/mlp_0/kernel", (1024, 2046), {**SHARE, "fsdp": 7}, ()),
        ("params/dino_head/mlp_0/kernel", (1024, 2046), {**SHARE, "fsdp": 6}, (None, "fsdp")),
    ],
)
def test_a_parameter_lies_where_its_name_and_shape_say(name, shape, sizes, expected):
    spec = sharding.parameter_spec(name, shape, sizes)
    assert tuple(spec) + (None,) * (len(shape) - len(spec)) == expected + (None,) * (len(shape) - len(expected))


def test_what_tensor_cannot_split_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mesh.tensor: 2 does not divide the 549 of axis 0 of decoder/embedding"):
        sharding.parameter_spec("decoder/embedding", (549, 32), BOTH)


def test_a_parameter_its_moments_and_its_teachers_lie_alike(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 128)
    config = whole_config(language__decoder__vocabulary_size=560)
    backbone = Backbone(BackboneConfig(width=32, depth=4, heads=4, mlp_width=64))
    tasks = build_tasks(config, backbone, backbone.config)

    def start():
        params = fresh_params(backbone, tasks, seed=0)
        return init_state(params, tasks, build_optimizer(config), params["backbone"])

    mesh = AbstractMesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    specs = jax.tree.map(lambda leaf: leaf.spec, sharding.state_shardings(mesh, jax.eval_shape(start)))
    adam = specs.optimizer[0]
    assert specs.params == adam.mu == adam.nu == specs.ema
    assert specs.params["backbone"] == specs.gram
    assert specs.step == adam.count == PartitionSpec()
    leaves = jax.tree.leaves(specs.params, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    assert sum("fsdp" in leaf for leaf in leaves) > len(leaves) / 3
    assert sum("tensor" in leaf for leaf in leaves) >= 17
    blocks = [specs.params["backbone"]["blocks"], specs.params["decoder"]["blocks"]]
    stacked = jax.tree.leaves(blocks, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    assert {leaf[0] for leaf in stacked} == {None}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
    ],
)
def test_an_axis_of_minus_one_takes_what_is_left_over(axes, expected, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert tuple(sharding.mesh_sizes(**axes).values()) == expected


def test_one_process_may_leave_devices_out_and_several_may_not(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert tuple(sharding.mesh_sizes(data=2, fsdp=2).values()) == (2, 2, 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"mesh.data: mesh.data 2 x mesh.fsdp 2 makes 4 devices, there are 8"):
        sharding.mesh_sizes(data=2, fsdp=2)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 9}, "mesh.data: mesh.data 9 makes 9 devices, there are 8"),
        ({"fsdp": 3}, "mesh.data: mesh.fsdp 3 does not divide the 8 devices"),
        ({"fsdp": 0}, "mesh.fsdp: expected 1 or more devices, or -1"),
        ({"fsdp": -1}, "mesh.fsdp: only one axis can be -1, and mesh.data is"),
        ({"tensor": 8}, "mesh.tensor: expected a divisor of the 4 devices of a process, got 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_its_field(axes, message, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=i // 4) for i in range(8)])
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**axes)


def test_a_mesh_that_a_slice_cannot_have_is_an_error_of_the_mesh(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1. If you want to split, do so")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(ValueError, match=r"^mesh: Failed to find assignment for logical_axis_index 1$"):
        sharding.make_mesh()


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def devices_of(*processes):
    return [Device(number, process) for number, process in enumerate(processes)]


def as_the_slice_orders_them(shape, axes, axis_types, devices):
    return Mesh(np.array(devices).reshape(shape), axes, axis_types=axis_types)


@pytest.mark.parametrize("processes", [(0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1)])
def test_a_tensor_axis_stays_within_a_process_however_the_slice_orders_its_devices(processes, monkeypatch):
    sizes = {"data": 2, "fsdp": 1, "tensor": 2}
    monkeypatch.setattr(jax, "make_mesh", as_the_slice_orders_them)
    mesh = sharding.lay_out(sizes, devices_of(*processes))
    assert mesh.shape == sizes
    groups = [{device.process_index for device in group} for group in mesh.devices.reshape(2, 2)]
    assert sorted(groups, key=min) == [{0}, {1}]
    assert sorted(device.id for device in mesh.devices.flat) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ((0, 1, 2, 3), "expected a divisor of the 1 devices of a process, got 2"),
        ((0, 0, 1, 2), "expected devices of one process, but processes have unequal numbers of them"),
    ],
)
def test_a_tensor_axis_across_processes_is_refused(processes, message, monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", as_the_slice_orders_them)
    with pytest.raises(ValueError, match=f"mesh.tensor: {message}"):
        sharding.lay_out({"data": 2, "fsdp": 1, "tensor": 2}, devices_of(*processes))


def test_a_batch_keeps_its_shape_on_the_mesh():
    mesh, rows = sharding.make_mesh(data=1), {"x": np.zeros((4, 3), np.float32), "y": np.arange(4)}
    batch = sharding.global_batch(rows, mesh)
    assert {name: array.shape for name, array in batch.items()} == {"x": (4, 3), "y": (4,)}


def test_a_batch_that_does_not_split_is_refused_by_its_field(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = small_config(mesh__fsdp=2, mesh__tensor=2, tasks__clip_ssl__batch_size=6)
    message = "tasks.clip_ssl.batch_size: expected a multiple of the 4 parts into which mesh.data x mesh.fsdp split it"
    with pytest.raises(ConfigError, match=message):
        build_tasks(config, Backbone(BackboneConfig(width=32, depth=4, heads=4, mlp_width=64)), None)


def test_a_mesh_of_another_size_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r"mesh.data: mesh.fsdp 5 does not divide the"):
        build(small_config(mesh__fsdp=5))


def test_a_kernel_that_xla_cannot_split_runs_on_each_device():
    program = """
        import jax, numpy as np
        from omnistream_jax.ops.attention import frame_causal_attention
        from omnistream_jax.ops.splash import splash_frame_causal
        from omnistream_jax.sharding import make_mesh

        mesh = make_mesh(fsdp=2, tensor=2)
        place = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, None, "tensor"))
        inputs = np.random.default_rng(0).normal(size=(3, 2, 2, 20, 2, 64)).astype(np.float32)
        attend = lambda *arrays: splash_frame_causal(*arrays, interpret=True)
        with jax.set_mesh(mesh):
            compiled = jax.jit(attend).lower(*jax.device_put(tuple(inputs), place)).compile()
        found = compiled(*jax.device_put(tuple(inputs), place))
        assert found.sharding.is_equivalent_to(place, found.ndim)
        np.testing.assert_allclose(found, frame_causal_attention(*inputs), rtol=2e-5, atol=2e-6)
        assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))
    """
    run_program(program, 4)


STEPS = """
    import json, sys
    import mesh_cases

    mesh_cases.compile_quickly()
    mesh_cases.shrink_model()
    only = {"tasks__clip_ssl__weight": 0.0, "tasks__clip_geometry__weight": 0.0}
    only["self_supervision__gram__weight"] = 0.0
    programs = {}
    rows = mesh_cases.losses_of(3, programs, **only, **json.loads(sys.argv[1]))
    print(json.dumps([rows, programs]))
"""


def test_eight_devices_compute_what_one_does_and_send_what_is_designed():
    """2 x 2 x 2: all three axes at once."""
    rows, programs = json.loads(run_program(STEPS, 8, json.dumps({"mesh__fsdp": 2, "mesh__tensor": 2})))
    expected, _ = json.loads(run_program(STEPS, 1, "{}"))
    losses, others = ([{name: row[name] for name in row if "loss" in name} for row in run] for run in (rows, expected))
    differences = largest_difference(losses, others)
    assert differences[0] <= 1e-5, differences
    assert max(differences) <= 1e-3, differences
    assert largest_difference(rows, expected)[0] <= 2e-5, "a metric, as the gradient's norm"

    assert {message.kind for message in collectives(programs["update"])} == {"all-reduce"}
    assert {message.size for message in collectives(programs["update"])} == {1}, "norms alone"
    # Kernels of a block: 4 of the backbone, 7 of the decoder; whole once in each pass forward and once backward.
    assert blocks_gathered(programs["caption"]) == (4 + 7, 4 + 7)
    # Student on global and on local crops, EMA teacher; the student's two passes backward.
    assert blocks_gathered(programs["image_ssl"]) == (3 * 4, 2 * 4)
    # patch_kernel and register_tokens, and of the projector 2 kernels, of the decoder the embedding.
    assert others_gathered(programs["caption"]) == 2 + 2 + 1
    # The student's and the EMA teacher's, with 4 kernels of either head.
    assert others_gathered(programs["image_ssl"]) == 2 * (2 + 4 + 4)


def blocks_gathered(program: str) -> tuple[int, int]:
    """Parameters that are made whole inside the scans over blocks, (forward, backward)."""
    gathers = [message.path for message in collectives(program) if message.kind == "all-gather"]
    inside = [path for path in gathers if "while/body" in path and "squeeze" in path]
    return sum("transpose" not in path for path in inside), sum("transpose" in path for path in inside)


def others_gathered(program: str) -> int:
    """Parameters that are made whole outside of them."""
    return sum(m.kind == "all-gather" and "sharding_constraint" in m.path for m in collectives(program))
