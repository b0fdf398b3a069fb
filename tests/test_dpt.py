"""The dual DPT head against Depth Anything 3's (goldens 06a, 06c)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error
from scipy import ndimage

from omnistream_jax.convert.depth_anything3 import convert_dual_dpt, dual_dpt_tensors
from omnistream_jax.models.dpt import DualDPT, default_layers, resize_linear, uv_tables

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5
QUICK = {"xla_backend_optimization_level": 0}  # compiles in a third of the time
SMALL = DualDPT(patch_size=16, features=8, out_channels=(4, 8, 4, 8))


def patch_tokens(tokens, golden):
    """Golden tokens [B, T, P, D] without the special ones: [B, T, h, w, D]."""
    rows, columns = (golden.meta[side] // golden.config["patch_size"] for side in "HW")
    return tokens[:, :, golden.meta["patch_start_idx"] :].reshape(*tokens.shape[:2], rows, columns, -1)


@pytest.fixture(scope="module")
def golden():
    return load_golden("06a_da3_dualdpt")


def golden_head(golden, **options):
    """Depth Anything 3's head: ours, its parameters, and the features that feed it."""
    sizes = {"features": golden.config["features"], "out_channels": tuple(golden.config["out_channels"])}
    head = DualDPT(patch_size=golden.config["patch_size"], **sizes, **options)
    params = convert_dual_dpt(golden.weights, width=golden.config["dim_in"], **sizes)
    return head, params, [patch_tokens(golden.inputs[f"feats.{i}"], golden) for i in range(4)]


def their_outputs(maps):
    """Our maps under their names; the order of their rays is [d, o]."""
    return {
        "depth": maps.depth,
        "depth_conf": maps.depth_confidence,
        "ray": jnp.concatenate([maps.rays[..., 3:], maps.rays[..., :3]], axis=-1),
        "ray_conf": maps.ray_confidence,
    }


def test_head_agrees_with_depth_anything_3_in_values_and_gradients(golden):
    head, params, features = golden_head(golden)

    def loss(params, features):
        outputs = their_outputs(head.apply({"params": params}, features, golden.meta["H"], golden.meta["W"]))
        return sum(jnp.sum(outputs[name] * golden.cotangents[name]) for name in outputs), outputs

    differentiate = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=QUICK)
    (value, outputs), gradients = differentiate(params, features)
    assert outputs.keys() == golden.outputs.keys()
    errors = {name: relative_error(outputs[name], expected) for name, expected in golden.outputs.items()}
    assert max(errors.values()) <= TOLERANCE, errors
    assert relative_error(value, golden.grads["loss"]) <= TOLERANCE

    ours = dual_dpt_tensors(gradients[0])
    ours |= {f"input:feats.{i}": gradient for i, gradient in enumerate(gradients[1])}
    errors = {}
    for name, expected in golden.grads.items():
        if name != "loss":
            expected = patch_tokens(expected, golden) if name.startswith("input:") else expected
            # The norm that all levels share goes by the first level's name there.
            gradient = ours[name.replace("output_conv2_aux.0.2", "output_conv2_aux.3.2")]
            errors[name] = relative_error(gradient, expected)
    assert len(errors) == 38
    assert max(errors.values()) <= GRADIENT_TOLERANCE, errors
    assert [name for name, gradient in ours.items() if not np.any(gradient)] == []  # nothing idle in our tree


def test_frames_alone_give_what_the_clip_gives(golden):
    head, params, features = golden_head(golden)
    apply = jax.jit(lambda features: their_outputs(head.apply({"params": params}, features, 32, 48)))
    for frame in range(2):
        alone = apply([level[:, frame : frame + 1] for level in features])
        for name, expected in golden.outputs.items():
            assert relative_error(alone[name], expected[:, frame : frame + 1]) <= TOLERANCE, name


def test_uv_embedding_agrees_with_depth_anything_3():
    golden = load_golden("06c_da3_uv_embed")
    assert len(golden.config) == 3
    for case, config in golden.config.items():
        rows, columns = uv_tables(config["height"], config["width"], config["channels"], config["aspect_ratio"])
        assert relative_error(rows[:, None] + columns, golden.outputs[f"{case}/embed"]) <= 1e-6


def test_head_starts_near_depth_one_and_rays_straight_ahead_on_a_tall_image():
    """Three rows of one patch: the coarsest level has an odd height, and a single column."""
    random = np.random.default_rng(0)
    features = [random.normal(size=(2, 2, 3, 1, 12)).astype(np.float32) for _ in range(4)]
    start = jax.jit(SMALL.init_with_output, static_argnums=(2, 3), compiler_options=QUICK)
    maps, _ = start(jax.random.key(0), features, 48, 16)
    assert maps.depth.shape == maps.depth_confidence.shape == (2, 2, 48, 16)
    assert maps.rays.shape == (2, 2, 24, 8, 6)
    assert maps.ray_confidence.shape == (2, 2, 24, 8)
    ahead = np.array([0, 0, 0, 0, 0, 1])
    for name, value in {"depth": 1, "depth_confidence": 2, "rays": ahead, "ray_confidence": 2}.items():
        found = np.asarray(getattr(maps, name)) - value
        np.testing.assert_allclose(found, 0, atol=0.1, err_msg=name)
        assert np.std(found) > 1e-4, name  # the features count from the start


def test_bfloat16_head_has_float32_params_and_maps_near_those_of_float32(golden):
    head, params, features = golden_head(golden, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), features, 32, 48))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    apply = jax.jit(
        lambda features: their_outputs(head.apply({"params": params}, features, 32, 48)), compiler_options=QUICK
    )
    maps = apply(features)
    for name, expected in golden.outputs.items():
        assert maps[name].dtype == jnp.float32
        assert 1e-4 < relative_error(maps[name], expected) < 5e-2, name
        assert np.any(maps[name] != maps[name].astype(jnp.bfloat16).astype(jnp.float32))  # not rounded on the way out


@pytest.mark.parametrize("sizes", [(3, 5, 6, 10), (4, 1, 7, 3), (6, 5, 6, 1), (9, 8, 4, 3)])
def test_resize_linear_agrees_with_scipy_and_its_gradient_is_the_transpose(sizes):
    rows, columns, height, width = sizes
    random = np.random.default_rng(3)
    x = random.normal(size=(2, rows, columns, 3)).astype(np.float32)
    cotangent = random.normal(size=(2, height, width, 3)).astype(np.float32)
    # Where the result has one cell it is the first, as in PyTorch; SciPy agrees.
    expected = ndimage.zoom(x, (1, height / rows, width / columns, 1), order=1, mode="nearest")
    resized, pull = jax.vjp(lambda x: resize_linear(x, height, width), x)
    assert relative_error(resized, expected) <= 1e-6
    assert float(jnp.vdot(resized, cotangent)) == pytest.approx(float(jnp.vdot(x, pull(cotangent)[0])), rel=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_resize_linear_keeps_a_constant_map_and_the_dtype(dtype):
    resized = resize_linear(jnp.full((1, 3, 3, 1), 3, dtype), 11, 7)
    assert resized.dtype == dtype
    assert np.all(np.asarray(resized, np.float32) == 3)


@pytest.mark.parametrize(
    ("changes", "shapes", "size", "message"),
    [
        ({}, [(1, 1, 2, 2, 8)] * 3, (32, 32), "features: expected 4"),
        ({}, [(1, 1, 2, 3, 8)] * 4, (48, 32), "features: expected 4 arrays .* 3, 2"),
        ({}, [(1, 2, 2, 8)] * 4, (32, 32), "features"),
        ({}, [*[(1, 1, 2, 2, 8)] * 3, (1, 1, 2, 2, 4)], (32, 32), "features"),
        ({}, [(1, 1, 2, 2, 8)] * 4, (40, 32), "multiples of 16, got 40 and 32"),
        ({"features": 12}, [(1, 1, 2, 2, 8)] * 4, (32, 32), "DualDPT.features"),
        ({"out_channels": (4, 4, 4)}, [(1, 1, 2, 2, 8)] * 4, (32, 32), "DualDPT.out_channels"),
        ({"out_channels": (4, 4, 6, 4)}, [(1, 1, 2, 2, 8)] * 4, (32, 32), "DualDPT.out_channels"),
    ],
)
def test_what_does_not_fit_is_named(changes, shapes, size, message):
    features = [jnp.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: SMALL.clone(**changes).init(jax.random.key(0), features, *size))


def test_default_layers_are_spread_over_the_second_half():
    assert default_layers(24) == (11, 15, 19, 23)
    assert default_layers(12) == (5, 7, 9, 11)
    assert default_layers(4) == (0, 1, 2, 3)
    for depth in range(4, 50):
        layers = default_layers(depth)
        assert 0 <= layers[0] < layers[1] < layers[2] < layers[3] == depth - 1
    with pytest.raises(ValueError, match="depth"):
        default_layers(3)
