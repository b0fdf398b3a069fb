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
SMALL = DualDPT(patch_size=16, features=8, out_channels=(4, 8, 4, 8))


def patch_tokens(tokens, golden):
    """Golden tokens [B, T, P, D] without the special ones: [B, T, h, w, D]."""
    rows, columns = (golden.meta[side] // golden.config["patch_size"] for side in "HW")
    return tokens[:, :, golden.meta["patch_start_idx"] :].reshape(*tokens.shape[:2], rows, columns, -1)


def random_features(shape, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for _ in range(4)]


def test_head_agrees_with_depth_anything_3_in_values_and_gradients():
    golden = load_golden("06a_da3_dualdpt")
    config, height, width = golden.config, golden.meta["H"], golden.meta["W"]
    sizes = {"features": config["features"], "out_channels": tuple(config["out_channels"])}
    head = DualDPT(patch_size=config["patch_size"], **sizes)
    features = [patch_tokens(golden.inputs[f"feats.{i}"], golden) for i in range(4)]

    def loss(params, features):
        maps = head.apply({"params": params}, features, height, width)
        outputs = {
            "depth": maps.depth,
            "depth_conf": maps.depth_confidence,
            "ray": jnp.concatenate([maps.rays[..., 3:], maps.rays[..., :3]], axis=-1),  # theirs is [d, o]
            "ray_conf": maps.ray_confidence,
        }
        return sum(jnp.sum(outputs[name] * golden.cotangents[name]) for name in outputs), outputs

    params = convert_dual_dpt(golden.weights, width=config["dim_in"], **sizes)
    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, features)
    assert outputs.keys() == golden.outputs.keys()
    errors = {name: relative_error(outputs[name], expected) for name, expected in golden.outputs.items()}
    assert max(errors.values()) <= TOLERANCE, errors
    assert relative_error(value, golden.grads["loss"]) <= TOLERANCE

    expected = {name.replace("conv2_aux.0.2", "conv2_aux.3.2"): array for name, array in golden.grads.items()}
    inputs = {name: patch_tokens(expected.pop(name), golden) for name in sorted(expected) if name.startswith("input:")}
    assert len(inputs) == 4 and expected.pop("loss").shape == ()
    ours = dual_dpt_tensors(gradients[0])
    errors = {name: relative_error(ours[name], array) for name, array in expected.items()}
    errors |= {name: relative_error(ours, inputs[name]) for name, ours in zip(inputs, gradients[1], strict=True)}
    assert max(errors.values()) <= GRADIENT_TOLERANCE, errors


def test_uv_embedding_agrees_with_depth_anything_3():
    golden = load_golden("06c_da3_uv_embed")
    assert len(golden.config) == 3
    for case, config in golden.config.items():
        rows, columns = uv_tables(config["height"], config["width"], config["channels"], config["aspect_ratio"])
        assert relative_error(rows[:, None] + columns, golden.outputs[f"{case}/embed"]) <= 1e-6


def test_a_clip_gives_what_its_frames_give_alone_on_a_tall_image():
    """Three rows of one patch: the coarsest level has an odd size, and columns of one cell."""
    features = random_features((2, 2, 3, 1, 12))
    params = jax.jit(SMALL.init, static_argnums=(2, 3))(jax.random.key(0), features, 48, 16)["params"]
    apply = jax.jit(SMALL.apply, static_argnums=(2, 3))
    clip = apply({"params": params}, features, 48, 16)
    assert clip.depth.shape == clip.depth_confidence.shape == (2, 2, 48, 16)
    assert clip.rays.shape == (2, 2, 24, 8, 6) and clip.ray_confidence.shape == (2, 2, 24, 8)
    for batch, frame in np.ndindex(2, 2):
        window = np.s_[batch : batch + 1, frame : frame + 1]
        alone = apply({"params": params}, [level[window] for level in features], 48, 16)
        errors = jax.tree.map(lambda one, all_: relative_error(one, all_[window]), alone, clip)  # noqa: B023
        assert max(jax.tree.leaves(errors)) <= 1e-6, errors
    assert relative_error(clip.rays[0, :1], np.asarray(clip.rays[0, 1:])) > 1e-3  # frames do differ


def test_head_starts_near_depth_one_and_rays_zero_and_every_parameter_gets_a_gradient():
    features = random_features((1, 1, 2, 2, 16))
    params = jax.jit(SMALL.init, static_argnums=(2, 3))(jax.random.key(1), features, 32, 32)["params"]

    def loss(params):
        maps = SMALL.apply({"params": params}, features, 32, 32)
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(maps)), maps

    gradients, maps = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(maps.depth, 1, atol=0.1)
    np.testing.assert_allclose(maps.depth_confidence, 2, atol=0.1)
    np.testing.assert_allclose(maps.rays, 0, atol=0.1)
    np.testing.assert_allclose(maps.ray_confidence, 2, atol=0.1)
    assert np.std(maps.depth) > 0 and np.std(maps.rays) > 0
    flat = jax.tree_util.tree_leaves_with_path(gradients)
    assert [
        jax.tree_util.keystr(path) for path, leaf in flat if not np.any(leaf) or not np.all(np.isfinite(leaf))
    ] == []


def test_bfloat16_head_has_float32_params_and_maps_near_those_of_float32():
    features = random_features((1, 1, 2, 2, 16))
    params = jax.jit(SMALL.init, static_argnums=(2, 3))(jax.random.key(2), features, 32, 32)["params"]
    for name in ("depth_output", "ray_output"):
        params[name]["kernel"] *= 30  # values that rounding shows in
    low = SMALL.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: low.init(jax.random.key(2), features, 32, 32))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    exact, maps = (
        jax.jit(head.apply, static_argnums=(2, 3))({"params": params}, features, 32, 32) for head in (SMALL, low)
    )
    for ours, reference in zip(jax.tree.leaves(maps), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.float32
        assert 1e-5 < relative_error(ours, reference) < 5e-2
        assert np.any(ours != ours.astype(jnp.bfloat16).astype(jnp.float32))  # not rounded on the way out


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
        assert len(set(layers)) == 4 and list(layers) == sorted(layers) and 0 <= layers[0] and layers[3] == depth - 1
    with pytest.raises(ValueError, match="depth"):
        default_layers(3)
