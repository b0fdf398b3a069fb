"""The self-distillation losses against DINOv3's numbers (golden 05a) and against their mathematics."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import REPOSITORY, load_golden, relative_error

from omnistream_jax.losses.dino import dino_loss, teacher_entropy
from omnistream_jax.losses.gram import cubic_matrix, gram_loss, resize_patches
from omnistream_jax.losses.ibot import ibot_loss
from omnistream_jax.losses.koleo import koleo_loss
from omnistream_jax.losses.sinkhorn import sinkhorn_knopp

TOLERANCE = 1e-5

# Compiled whole, as training does; it is faster than operation by operation.
sinkhorn = jax.jit(sinkhorn_knopp, static_argnames="iterations")
entropies = jax.jit(teacher_entropy)


@pytest.fixture(scope="module")
def golden():
    return load_golden("05a_dinov3_losses")


def check_loss(golden, loss, name, parameter):
    """The value of a loss and its gradient for one input agree with the golden's."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(golden.inputs[parameter])
    assert relative_error(value, golden.outputs[name]) <= TOLERANCE
    assert relative_error(gradient, golden.grads[f"{name}/d_{parameter}"]) <= TOLERANCE


def test_sinkhorn_agrees_with_dinov3(golden):
    config = golden.config
    logits = golden.inputs["teacher_cls_logits"].reshape(-1, config["prototypes"])
    probs = sinkhorn(logits, config["teacher_temp"], config["n_iterations"])
    expected = golden.outputs["dino_teacher_probs"]
    assert relative_error(probs.reshape(expected.shape), expected) <= TOLERANCE
    probs = sinkhorn(golden.inputs["teacher_patch_logits"], config["teacher_temp"])
    assert relative_error(probs, golden.outputs["ibot_teacher_probs"]) <= TOLERANCE


def test_dino_global_and_local_agree_with_dinov3(golden):
    teacher = golden.outputs["dino_teacher_probs"]
    check_loss(golden, lambda s: dino_loss(s, teacher, 0.1, ignore_diagonal=True), "dino_global", "s_glob")
    check_loss(golden, lambda s: dino_loss(s, teacher), "dino_local", "s_loc")
    value = dino_loss(golden.inputs["s_glob"], teacher)
    assert relative_error(value, golden.outputs["dino_global_with_diagonal"]) <= TOLERANCE


@pytest.mark.parametrize("padding", [0, 7])
def test_ibot_agrees_with_dinov3_whatever_the_padding(golden, padding):
    rows = ((0, padding), (0, 0))
    teacher = np.pad(golden.outputs["ibot_teacher_probs"], rows)
    weights = np.pad(golden.inputs["masks_weight"], (0, padding))
    crops = len(golden.inputs["masks"])

    def loss(student):
        return ibot_loss(jnp.pad(student, rows, constant_values=3.0), teacher, weights, crops)

    check_loss(golden, loss, "ibot", "s_patch")


def test_ibot_weights_are_one_over_the_masked_patches_of_the_crop(golden):
    masks = golden.inputs["masks"]
    weights = np.repeat(1 / np.maximum(masks.sum(1), 1), masks.sum(1))
    value = ibot_loss(golden.inputs["s_patch"], golden.outputs["ibot_teacher_probs"], weights, len(masks))
    assert relative_error(value, golden.outputs["ibot_no_masks_weight"]) <= TOLERANCE


def test_koleo_agrees_with_dinov3(golden):
    check_loss(golden, lambda s: (koleo_loss(s[0]) + koleo_loss(s[1])) / 2, "koleo", "s_pre")


def test_gram_agrees_with_dinov3(golden):
    check_loss(golden, lambda s: gram_loss(s, golden.inputs["g_t"]), "gram", "g_s")


def test_total_is_the_weighted_sum_of_dinov3(golden):
    inputs, outputs, config = golden.inputs, golden.outputs, golden.config
    crops, local_crops = config["n_global_crops"], config["n_local_crops"]
    teacher = outputs["dino_teacher_probs"]
    global_terms, local_terms = crops * (crops - 1), crops * local_crops
    dino = global_terms * dino_loss(inputs["s_glob"], teacher, ignore_diagonal=True)
    dino += local_terms * dino_loss(inputs["s_loc"], teacher)
    total = dino / (global_terms + local_terms)
    total += ibot_loss(inputs["s_patch"], outputs["ibot_teacher_probs"], inputs["masks_weight"], 8)
    total += config["koleo_weight"] * sum(koleo_loss(crop) for crop in inputs["s_pre"])
    total += gram_loss(inputs["g_s"], inputs["g_t"])
    assert relative_error(total, outputs["dinov3_meta_arch_total"]) <= TOLERANCE


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_compute_in_float32_whatever_the_input(golden, dtype):
    inputs = {name: jnp.asarray(value) for name, value in golden.inputs.items()}
    teacher = golden.outputs["dino_teacher_probs"]
    losses = {
        "s_glob": lambda s: dino_loss(s, teacher),
        "s_patch": lambda s: ibot_loss(s, golden.outputs["ibot_teacher_probs"], inputs["masks_weight"], 8),
        "s_pre": lambda s: koleo_loss(s[0]),
        "g_s": lambda s: gram_loss(s, inputs["g_t"]),
        "teacher_patch_logits": lambda s: sinkhorn(s, 0.07),
    }
    for name, loss in losses.items():
        low = inputs[name].astype(dtype)
        value = loss(low)
        assert value.dtype == jnp.float32
        assert relative_error(value, loss(low.astype(jnp.float32))) <= 1e-6, name


def sinkhorn_float64(logits, temperature, iterations):
    """Alternate normalisation of prototypes and rows, as in the papers, in float64."""
    matrix = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    for _ in range(iterations):
        matrix = matrix / matrix.sum(axis=0, keepdims=True)
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return matrix


@pytest.mark.parametrize(("rows", "prototypes", "iterations"), [(5, 11, 1), (64, 16, 3), (16, 300, 10)])
def test_sinkhorn_agrees_with_its_mathematics(rows, prototypes, iterations):
    logits = np.random.default_rng(0).normal(size=(rows, prototypes)).astype(np.float32)
    probs = sinkhorn(logits, 0.05, iterations)
    assert relative_error(probs, sinkhorn_float64(logits, 0.05, iterations)) <= 2e-5
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_ignores_padding_rows_even_if_they_are_not_finite():
    logits = np.random.default_rng(1).normal(size=(12, 20)).astype(np.float32)
    padded = np.full((19, 20), np.nan, np.float32)
    mask = np.zeros(19, bool)
    mask[[0, 2, 3, 5, 7, 8, 9, 11, 12, 14, 17, 18]] = True
    padded[mask] = logits
    padded[1] = 1e9
    probs = sinkhorn(padded, 0.07, row_mask=mask)
    # Scores reach about 40, so float32 keeps their exponentials to a few 1e-6.
    np.testing.assert_allclose(probs[mask], sinkhorn(logits, 0.07), rtol=2e-5)
    assert not np.any(probs[~mask])
    assert not np.any(sinkhorn(padded, 0.07, row_mask=np.zeros(19, bool)))


def test_sinkhorn_survives_logits_that_overflow_or_underflow_exp():
    logits = np.random.default_rng(2).normal(size=(6, 9)).astype(np.float32) * 30
    logits[3] -= 5000
    probs = np.asarray(sinkhorn(logits, 0.04))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-3)


def test_sinkhorn_passes_no_gradient():
    logits = np.random.default_rng(3).normal(size=(6, 9)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(sinkhorn(x, 0.1) ** 2))(logits)
    assert not np.any(gradient)


def test_sinkhorn_and_koleo_over_a_device_mesh_agree_with_one_device():
    script = """
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from omnistream_jax.losses.koleo import koleo_loss
        from omnistream_jax.losses.sinkhorn import sinkhorn_knopp
        assert jax.device_count() == 4
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        logits = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
        mask = np.arange(16) % 5 != 2
        rows = NamedSharding(mesh, PartitionSpec("data"))
        sharded, sharded_mask = jax.device_put((logits, mask), rows)
        sinkhorn = jax.jit(lambda x, m: sinkhorn_knopp(x, 0.05, row_mask=m), out_shardings=rows)
        probs = sinkhorn(sharded, sharded_mask)
        np.testing.assert_allclose(probs, sinkhorn_knopp(logits, 0.05, row_mask=mask), rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(jax.jit(koleo_loss)(sharded), koleo_loss(logits), rtol=1e-5)
        gradient = jax.jit(jax.grad(koleo_loss))(sharded)
        np.testing.assert_allclose(gradient, jax.grad(koleo_loss)(logits), rtol=1e-4, atol=1e-6)
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_entropy_is_zero_when_collapsed_and_log_k_when_spread():
    prototypes = 32
    one_hot = 1e4 * np.eye(prototypes, dtype=np.float32)
    probs = np.eye(prototypes, dtype=np.float32)
    spread = entropies(one_hot, probs, 1.0)
    np.testing.assert_allclose(spread.batch_mean, np.log(prototypes), rtol=1e-5)
    np.testing.assert_allclose(spread.targets, 0, atol=1e-6)
    collapsed = entropies(one_hot[[4] * 8], np.full((8, prototypes), 1 / prototypes), 1.0)
    np.testing.assert_allclose(collapsed.batch_mean, 0, atol=1e-6)
    np.testing.assert_allclose(collapsed.targets, np.log(prototypes), rtol=1e-5)


def test_entropy_stays_in_its_bounds_and_ignores_padding():
    logits = np.random.default_rng(4).normal(size=(2, 6, 40)).astype(np.float32)
    targets = sinkhorn(logits.reshape(12, 40), 0.05).reshape(2, 6, 40)
    entropy = entropies(logits, targets, 0.05)
    # A mean of distributions has at least the mean of their entropies.
    rows = entropies(logits, jax.nn.softmax(logits / 0.05), 0.05).targets
    assert 0 < rows < entropy.batch_mean < np.log(40)
    assert 0 < entropy.targets < np.log(40)
    padded = np.concatenate([logits, np.full((2, 3, 40), np.nan, np.float32)], axis=1)
    padded_targets = np.pad(targets, ((0, 0), (0, 3), (0, 0)))
    mask = np.arange(9) < 6
    masked = entropies(padded, padded_targets, 0.05, np.stack([mask, mask]))
    np.testing.assert_allclose(masked, entropy, rtol=1e-5)


def test_koleo_has_finite_gradients_for_duplicates_zeros_and_opposites():
    features = np.random.default_rng(5).normal(size=(6, 8)).astype(np.float32)
    features[1] = features[0]
    features[2] = 0
    value, gradient = jax.jit(jax.value_and_grad(koleo_loss))(features)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    # With two features the neighbour is the other one, also where rounding puts their cosine below -1.
    pairs = np.random.default_rng(6).normal(size=(50, 8)).astype(np.float32)
    values = jax.jit(jax.vmap(lambda pair: koleo_loss(jnp.stack([pair, -pair]))))(pairs)
    np.testing.assert_allclose(values, -np.log(2), rtol=1e-5)


def test_koleo_of_two_points_is_minus_the_log_of_their_distance():
    features = np.array([[3.0, 0.0], [0.0, 0.5]], np.float32)
    np.testing.assert_allclose(koleo_loss(features), -np.log(np.sqrt(2)), rtol=1e-6)


def reference_bicubic(image, height, width):
    """PyTorch's bicubic, tap by tap: Keys' kernel with a = -0.75, repeated borders, no antialiasing."""

    def kernel(x, a=-0.75):
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    old_height, old_width, depth = image.shape
    result = np.zeros((height, width, depth))
    for i in range(height):
        for j in range(width):
            y = (i + 0.5) * old_height / height - 0.5
            x = (j + 0.5) * old_width / width - 0.5
            for row in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for column in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    value = image[min(max(row, 0), old_height - 1), min(max(column, 0), old_width - 1)]
                    result[i, j] += kernel(y - row) * kernel(x - column) * value
    return result


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (5, 9), (13, 14), (8, 7), (1, 1)])
def test_resize_agrees_with_the_published_kernel(size):
    features = np.random.default_rng(7).normal(size=(2, 8, 7, 3)).astype(np.float32)
    resized = resize_patches(features, *size)
    expected = np.stack([reference_bicubic(image, *size) for image in features])
    assert relative_error(resized, expected) <= TOLERANCE


def test_resize_has_the_hand_checked_weights():
    # Halving puts the taps at 1.5, 0.5, 0.5, 1.5 cells: -0.09375, 0.59375, 0.59375, -0.09375.
    weights = cubic_matrix(8, 4)
    np.testing.assert_allclose(weights[1], [0, -0.09375, 0.59375, 0.59375, -0.09375, 0, 0, 0], atol=1e-7)
    # The first tap of the first cell falls outside and is added to the border's.
    np.testing.assert_allclose(weights[0], [0.5, 0.59375, -0.09375, 0, 0, 0, 0, 0], atol=1e-7)
    # Doubling puts them at 1.25, 0.25, 0.75, 1.75 cells.
    expected = [0, -0.10546875, 0.87890625, 0.26171875, -0.03515625, 0]
    np.testing.assert_allclose(cubic_matrix(6, 12)[5], expected, atol=1e-7)
    np.testing.assert_array_equal(cubic_matrix(5, 5), np.eye(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn_knopp(np.zeros((2, 3, 4)), 0.1), "rows, prototypes"),
        (lambda: sinkhorn_knopp(np.zeros((2, 3)), 0.1, 0), "iterations"),
        (lambda: sinkhorn_knopp(np.zeros((2, 3)), 0.1, row_mask=np.ones(3, bool)), "row_mask"),
        (lambda: dino_loss(np.zeros((2, 3, 4)), np.zeros((2, 3, 5))), "equal B and K"),
        (lambda: dino_loss(np.zeros((1, 3, 4)), np.zeros((1, 3, 4)), ignore_diagonal=True), "no pair"),
        (lambda: teacher_entropy(np.zeros((3, 4)), np.zeros((4, 4)), 0.1), "one shape"),
        (lambda: ibot_loss(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(4), 2), "weights"),
        (lambda: ibot_loss(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(3), 0), "crops"),
        (lambda: koleo_loss(np.zeros((1, 4))), "at least 2"),
        (lambda: gram_loss(np.zeros((2, 3, 4)), np.zeros((2, 4, 4))), "equal B and N"),
        (lambda: resize_patches(np.zeros((2, 3, 4)), 2, 2), "features"),
        (lambda: resize_patches(np.zeros((2, 3, 4, 1)), 2, 0), "height and width"),
    ],
)
def test_wrong_shapes_and_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
