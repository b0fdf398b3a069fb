"""The count of FLOPs by hand, against counts of the programs themselves (their jaxprs, and XLA's) and known numbers."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import whole_config

from omnistream_jax import flops as flops_lib
from omnistream_jax.flops import task_flops
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.geometry import GeometryHeads, geometry_config
from omnistream_jax.models.heads import DinoHead
from omnistream_jax.models.presets import BackboneConfig, preset
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config
from omnistream_jax.tasks.build import build_backbone, build_tasks
from omnistream_jax.tasks.task import Teachers


def products_of(jaxpr, trips=1.0):
    """FLOPs of all products and convolutions of a jaxpr: a scan's body times its length, a while's times `trips`."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            )
        elif name == "conv_general_dilated":
            numbers, kernel = params["dimension_numbers"], equation.invars[1].aval.shape
            summed = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
            # Zeros put between the cells of a strided convolution's gradient meet nothing.
            total += 2 * math.prod(equation.outvars[0].aval.shape) * summed / math.prod(params["lhs_dilation"])
        elif name == "cond":
            total += max(products_of(branch.jaxpr, trips) for branch in params["branches"])
        else:
            factor = params["length"] if name == "scan" else trips if name == "while" else 1
            for inner in jax.tree.leaves(list(params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
                if hasattr(inner, "eqns"):
                    total += factor * products_of(inner, trips)
    return total


def products(function, *arguments, trips=1.0):
    return products_of(jax.make_jaxpr(function)(*arguments).jaxpr, trips)


def shapes(function, *arguments):
    return jax.eval_shape(function, *arguments)


KEY = jax.random.key(0)


@pytest.mark.parametrize(("side", "executed", "dense"), [(224, 7.7, 9.4), (512, 79.5, 123)])
def test_a_clip_of_vit_large_costs_what_was_computed_by_hand(side, executed, dense):
    """../shared/PERFORMANCE.md: forward and backward of 16 frames, in TFLOP, as a fused attention executes it."""
    clip = flops_lib.train(flops_lib.backbone(preset("large"), 16, side, side))
    assert clip.executed / 1e12 == pytest.approx(executed, rel=0.006)
    tokens = 5 + (side // 16) ** 2
    blocks = 3 * 24 * (16 * tokens * 24 * 1024**2 + 4 * tokens**2 * 136 * 1024)
    embedding = 3 * 2 * 16 * (tokens - 5) * 768 * 1024
    assert clip.total == pytest.approx(blocks + embedding, rel=1e-12)
    # A dense mask computes 16 x 16 frames' scores where 136 are visible.
    assert (clip.linear + (clip.attention + clip.recomputed) * 256 / 136) / 1e12 == pytest.approx(dense, rel=0.006)


def test_a_frame_of_vit_large_costs_two_operations_a_parameter_and_token():
    large = flops_lib.backbone(preset("large"), 1, 224, 224)
    assert large.linear == pytest.approx(2 * 302e6 * 201, rel=0.01)  # 302 M parameters of the blocks


CASES = {
    "plain": (BackboneConfig(width=32, depth=3, heads=2, mlp_width=48), 3, False),
    "camera": (BackboneConfig(width=32, depth=2, heads=4, mlp_width=64), 2, True),
    "swiglu": (BackboneConfig(width=16, depth=2, heads=2, mlp_width=40, mlp="swiglu", patch_size=8), 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_backbone_is_counted_as_its_program_multiplies(case):
    config, frames, camera = CASES[case]
    module = Backbone(config)
    clip = jnp.zeros((2, frames, 48, 32, 3))
    params = shapes(functools.partial(module.init, camera_token=camera), KEY, clip)

    def forward(params, clip):
        out = module.apply(params, clip, layers=(), camera_token=camera)
        return out.patches.sum() + out.cls.sum()

    counted = 2 * flops_lib.backbone(config, frames, 48, 32, camera)
    assert products(forward, params, clip) == counted.total
    # The images need no gradient: the embedding has two products instead of three.
    embed = 2 * 2 * frames * (48 * 32) * 3 * config.width
    assert products(jax.grad(forward), params, clip) == flops_lib.train(counted).total - embed


def test_the_geometry_heads_are_counted_as_their_program_multiplies():
    config = geometry_config(4, features=8, out_channels=(8, 12, 16, 20))
    module = GeometryHeads(config, width=24, patch_size=8)
    hidden = [jnp.zeros((2, 3, 15 + 6, 24))] * 4  # 3 x 5 patches behind 6 specials
    camera = jnp.zeros((2, 3, 24))
    apply = functools.partial(module.apply, height=24, width=40)
    params = shapes(functools.partial(module.init, height=24, width=40), KEY, hidden, camera)
    counted = flops_lib.geometry_heads(config, 24, 8, 24, 40)
    assert products(apply, params, hidden, camera) == (6 * counted).total


def test_the_heads_of_self_distillation_are_counted_as_their_program_multiplies():
    head = DinoHead(prototypes=96, hidden=40, bottleneck=16)
    rows = jnp.zeros((7, 24))
    assert products(head.apply, shapes(head.init, KEY, rows), rows) == (7 * flops_lib.dino_head(head, 24)).total


def test_the_decoder_is_counted_as_its_program_multiplies_where_a_mask_would_let_it():
    config = Qwen3Config(vocabulary_size=64, width=32, depth=3, heads=4, kv_heads=2, head_width=16, hidden=48)
    module, row = Qwen3(config), jnp.zeros((1, 20), jnp.int32)
    embeddings = jnp.zeros((1, 20, 32))
    params = shapes(module.init, KEY, embeddings, row, row)
    counted = flops_lib.decoder(config, 20, 1)
    # XLA's products take all 20 x 20 pairs, of which 210 are visible.
    expected = counted.linear + counted.attention * 400 / 210
    assert products(module.apply, params, embeddings, row, row) == pytest.approx(expected, rel=1e-12)
    # Two segments see each other's tokens no more.
    assert flops_lib.decoder(config, 20, 2).attention == pytest.approx(counted.attention * 110 / 210)


def test_xla_counts_little_more_in_a_program_without_loops():
    """XLA adds what is done element by element. (Of convolutions it leaves out what meets the border's zeros.)"""
    config = BackboneConfig(width=256, depth=1, heads=2, mlp_width=1024)
    module, frames = Backbone(config), jax.ShapeDtypeStruct((1, 2, 64, 64, 3), jnp.float32)
    params = shapes(module.init, KEY, frames)
    forward = jax.jit(lambda params, frames: module.apply(params, frames, layers=()).patches)
    counted = flops_lib.backbone(config, 2, 64, 64).total
    assert counted < forward.lower(params, frames).compile().cost_analysis()["flops"] < 1.05 * counted


@pytest.fixture(scope="module")
def tasks():
    config = whole_config(self_supervision__head_hidden=64, tasks__image_ssl__global_size=64)
    model = build_backbone(config)
    return {task.name: task for task in build_tasks(config, model, model.config)}


@pytest.mark.parametrize("name", ["image_ssl", "clip_ssl", "clip_geometry", "caption"])
def test_a_task_is_counted_as_its_gradient_multiplies(tasks, name):
    """The whole program, with losses and without what the hand leaves out: to some percent at these small sizes."""
    task = tasks[name]
    element = task.data.dataset(0, 0, 1)[0]
    batch = {key: np.asarray(value) for key, value in element.items() if key not in ("record", "skipped")}
    frame = jnp.zeros((1, 1, 16, 16, 3))
    params = {"backbone": shapes(task.backbone.init, KEY, frame)["params"]}
    params |= {name: shapes(init, KEY) for name, init in task.heads.items()}
    gram = params["backbone"] if name == "image_ssl" else None
    teachers = Teachers(jax.ShapeDtypeStruct((), jnp.int32), params, gram)
    gradient = jax.grad(lambda params, teachers, batch: task.loss(params, teachers, batch, KEY)[0])
    learned, expected = None, task_flops(task).total
    if name == "caption":
        tokens = task.data.captions_per_row * (task.data.size // 16) ** 2 + task.data.max_tokens
        rows = task.data.global_batch_size
        inner = task.decoder.config.heads * task.decoder.config.head_width
        dense = 3 * rows * task.decoder.config.depth * 4 * tokens**2 * inner
        causal = 3 * rows * flops_lib.decoder(task.decoder.config, tokens, task.data.captions_per_row).attention
        learned = rows * (task.data.max_tokens - 1)  # one chunk, of all predictions of these short rows
        expected = task_flops(task, learned_tokens=learned).total + dense - causal
    assert products(gradient, params, teachers, batch) == pytest.approx(expected, rel=0.03)


def test_a_caption_task_pays_for_the_tokens_that_it_learns(tasks):
    task = tasks["caption"]
    none, some = (task_flops(task, learned_tokens=count).total for count in (0, 10))
    config = task.decoder.config
    assert some - none == 3 * 2 * 10 * config.width * config.vocabulary_size
    assert task_flops(task) == task_flops(task, learned_tokens=task.data.global_batch_size * task.data.max_tokens)


def test_the_gram_teacher_costs_from_its_first_step_on(tasks):
    task = tasks["image_ssl"]
    first = task.settings.gram_from_step
    before, after = (task_flops(task, step=step) for step in (first - 1, first))
    assert after == task_flops(task)
    clip, side = task.data.global_batch_size * 2, task.data.global_size
    teacher = clip * flops_lib.backbone(task.backbone.config, 1, side, side)
    matrices = clip * 4 * 2 * (side // 16) ** 4 * task.backbone.config.width
    assert after.total - before.total == pytest.approx(teacher.total + matrices)


def test_an_unknown_task_is_refused():
    with pytest.raises(TypeError, match="task sound: no count of FLOPs for a SimpleNamespace"):
        task_flops(types.SimpleNamespace(name="sound"))


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_of_whole_devices_in_sixteen_bits(kind, teraflops):
    device = types.SimpleNamespace(device_kind=kind)
    assert flops_lib.peak_flops(device, jnp.bfloat16) == (teraflops and teraflops * 1e12)
    assert flops_lib.peak_flops(device, jnp.float32) is None
