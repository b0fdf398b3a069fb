"""The language loss against float64 NumPy, optax and Qwen3 (golden 03), and the memory that it is planned to take."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import REPOSITORY, load_golden, relative_error

from omnistream_jax.losses.language import language_loss

TOLERANCE = 1e-5


def make_inputs(rows=3, length=14, width=8, vocabulary=37, seed=0):
    """Logits are of size one; half of the positions count."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((rows, length, width)).astype(np.float32)
    embedding = (0.5 * random.standard_normal((vocabulary, width))).astype(np.float32)
    targets = random.integers(vocabulary, size=(rows, length), dtype=np.int32)
    return hidden, embedding, targets, random.random((rows, length)) < 0.5


def reference(hidden, embedding, targets, mask):
    """Loss, accuracy and both gradients in float64, by the formula: d logits = (softmax - one hot) / count."""
    hidden, embedding = hidden.astype(np.float64), embedding.astype(np.float64)
    logits = hidden @ embedding.T
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    normaliser = logits.max(axis=-1) + np.log(exponentials.sum(axis=-1))
    losses = normaliser - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    d_logits = (probabilities - np.eye(len(embedding))[targets]) * mask[..., None] / mask.sum()
    accuracy = (logits.argmax(axis=-1) == targets)[mask].mean()
    gradients = d_logits @ embedding, np.einsum("blv,bld->vd", d_logits, hidden)
    return losses[mask].mean(), accuracy, gradients


# Compiled once for each shape and chunk, whichever test asks.
loss_alone = jax.jit(language_loss, static_argnames=("chunk", "shards"))


@partial(jax.jit, static_argnames=("chunk", "shards"))
def value_and_gradients(inputs, scale=1.0, **options):
    """((loss, accuracy), (d hidden, d embedding)) of scale * loss."""

    def loss(hidden, embedding, targets, mask):
        value, accuracy = language_loss(hidden, embedding, targets, mask, **options)
        return scale * value, accuracy

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(*inputs)


# 42 positions: 5 and 41 do not divide, 1,000 is more than there are.
@pytest.mark.parametrize(("chunk", "shards"), [(1, 1), (5, 1), (41, 1), (1000, 1), (4, 3)])
def test_value_accuracy_and_gradients_agree_with_float64_whatever_the_chunk(chunk, shards):
    inputs = make_inputs()
    inputs[2][0, :6] = (inputs[0] @ inputs[1].T).argmax(axis=-1)[0, :6]  # some that are right
    expected, expected_accuracy, expected_gradients = reference(*inputs)
    assert 0 < expected_accuracy < 1
    (value, accuracy), gradients = value_and_gradients(inputs, scale=2.0, chunk=chunk, shards=shards)
    assert relative_error(value, 2.0 * expected) <= TOLERANCE
    assert accuracy == pytest.approx(expected_accuracy, rel=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, 2.0 * expected_gradient) <= TOLERANCE


def test_without_gradients_it_is_the_same_loss():
    inputs = make_inputs()
    (expected, expected_accuracy), _ = value_and_gradients(inputs, chunk=8)
    value, accuracy = loss_alone(*inputs, chunk=8)
    assert relative_error(value, expected) <= 1e-6
    assert accuracy == expected_accuracy


def test_optax_agrees_where_all_positions_count():
    hidden, embedding, targets, _ = make_inputs(seed=1)
    (value, _), gradients = value_and_gradients((hidden, embedding, targets, np.ones_like(targets, bool)), chunk=9)

    def plain(hidden, embedding):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, targets).mean()

    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, embedding)
    assert relative_error(value, expected) <= TOLERANCE
    assert max(map(relative_error, gradients, expected_gradients)) <= TOLERANCE


def test_it_is_qwen3s_loss_with_its_gradients():
    golden = load_golden("03_qwen3")
    hidden, embedding = golden.outputs["last_hidden_embeds"], golden.weights["model.embed_tokens.weight"]
    labels = golden.inputs["labels"]
    # Position i predicts the label at i + 1; transformers marks what does not count with -100.
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    mask = targets != -100
    assert 0 < mask.sum() < mask.size
    (value, _), (d_hidden, d_embedding) = value_and_gradients(
        (hidden, embedding, targets.astype(np.int32), mask), chunk=7
    )
    assert relative_error(value, golden.outputs["lm_loss"]) <= TOLERANCE

    # From PyTorch's logits by the formula,
    logits = golden.outputs["logits_embeds"].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    one_hot = np.eye(len(embedding))[np.where(mask, targets, 0)]
    d_logits = (probabilities - one_hot) * mask[..., None] / mask.sum()
    assert relative_error(d_hidden, d_logits @ embedding) <= TOLERANCE
    assert relative_error(d_embedding, np.einsum("blv,bld->vd", d_logits, hidden)) <= TOLERANCE
    # and PyTorch's own: the states are (normalised states) * (scale of the last norm).
    d_scale = np.sum(d_hidden * hidden, axis=(0, 1)) / golden.weights["model.norm.weight"]
    assert relative_error(d_scale, golden.grads["model.norm.weight"]) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_mask_gives_zero_and_no_gradient(dtype):
    hidden, embedding, targets, mask = make_inputs()
    inputs = (hidden.astype(dtype), embedding, targets, np.zeros_like(mask))
    (value, accuracy), gradients = value_and_gradients(inputs, chunk=8)
    assert value == 0
    assert accuracy == 0
    assert not any(np.any(np.asarray(gradient, np.float32)) for gradient in gradients)


def test_positions_outside_the_mask_neither_count_nor_learn():
    hidden, embedding, targets, mask = make_inputs()
    mask[1] = False  # a row without any answer
    before = value_and_gradients((hidden, embedding, targets, mask), chunk=8)
    others = np.where(mask[..., None], hidden, 1e4), embedding, np.where(mask, targets, -100), mask
    after = value_and_gradients(others, chunk=8)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    d_hidden = np.asarray(before[1][0])
    assert np.all(np.any(d_hidden != 0, axis=-1) == mask)


@pytest.mark.parametrize("wrong", [-1, 37])
def test_a_target_outside_the_vocabulary_makes_the_loss_nan(wrong):
    hidden, embedding, targets, mask = make_inputs()
    targets[mask.nonzero()[0][0], mask.nonzero()[1][0]] = wrong
    assert np.isnan(loss_alone(hidden, embedding, targets, mask, chunk=8)[0])


def test_bfloat16_states_have_float32_losses_and_each_gradient_its_inputs_dtype():
    hidden, embedding, targets, mask = make_inputs(width=64, vocabulary=500)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(hidden, np.float32), np.asarray(jnp.asarray(embedding, jnp.bfloat16), np.float32)
    (value, _), (d_hidden, d_embedding) = value_and_gradients((hidden, embedding, targets, mask), chunk=16)
    # The inputs are rounded, the logits and the loss are not.
    expected, _, (expected_hidden, expected_embedding) = reference(*rounded, targets, mask)
    assert value.dtype == jnp.float32
    assert relative_error(value, expected) <= TOLERANCE
    assert d_hidden.dtype == jnp.bfloat16
    assert d_embedding.dtype == jnp.float32
    assert relative_error(d_hidden.astype(jnp.float32), expected_hidden) <= 1e-2
    assert relative_error(d_embedding, expected_embedding) <= 1e-2
    # The sum over positions is not rounded to bfloat16 on the way out.
    assert np.any(d_embedding != d_embedding.astype(jnp.bfloat16).astype(jnp.float32))
    inputs = (hidden, embedding.astype(jnp.bfloat16), targets, mask)
    _, (_, d_embedding) = jax.eval_shape(partial(value_and_gradients, chunk=16), inputs)
    assert d_embedding.dtype == jnp.bfloat16


def test_logits_of_any_size_stay_finite():
    hidden, embedding, targets, mask = make_inputs()
    inputs = (1e3 * hidden, embedding, targets, mask)
    (value, _), gradients = value_and_gradients(inputs, chunk=8)
    assert relative_error(value, reference(*inputs)[0]) <= TOLERANCE
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_memory_is_less_than_half_of_all_logits_at_qwen3s_vocabulary():
    rows, length, width, vocabulary = 4, 512, 64, 151_936
    shapes = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    )

    def plain(hidden, embedding, targets, mask):
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, targets)
        return jnp.sum(losses * mask) / jnp.sum(mask)

    def planned(loss):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    all_logits = rows * length * vocabulary * 4
    assert planned(plain) > all_logits
    assert planned(lambda *inputs: language_loss(*inputs)[0]) < all_logits / 2


def test_devices_visit_their_own_rows_and_add_their_gradients_once():
    # Four devices in a process of their own: the number cannot change once JAX runs.
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from test_language_loss import make_inputs, reference, relative_error
        from omnistream_jax.losses.language import language_loss
        from omnistream_jax.sharding import make_mesh, replicated, split_batch

        mesh = make_mesh()
        rows, whole = split_batch(mesh), replicated(mesh)
        inputs = make_inputs(rows=8)
        inputs[3][2:4] = False  # a device without any answer
        loss = lambda *inputs: language_loss(*inputs, chunk=5, shards=4)[0]
        compiled = jax.jit(
            jax.value_and_grad(loss, (0, 1)), in_shardings=(rows, whole, rows, rows)
        ).lower(*inputs).compile()
        value, gradients = compiled(*jax.device_put(inputs, (rows, whole, rows, rows)))
        expected, _, expected_gradients = reference(*inputs)
        assert relative_error(value, expected) <= 1e-5
        assert max(map(relative_error, gradients, expected_gradients)) <= 1e-5
        text = compiled.as_text()
        assert "all-gather" not in text and "all-to-all" not in text
        sums = [line for line in text.splitlines() if " all-reduce(" in line and "f32[37,8]" in line]
        assert len(sums) == 1 and "while/body" not in sums[0], sums
        """
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((3, 14), np.float32)}, r"hidden \[B, L, D\]"),
        ({"embedding": np.zeros((37, 9), np.float32)}, "equal D"),
        ({"targets": np.zeros((3, 13), np.int32)}, "targets and mask"),
        ({"mask": np.zeros((2, 14), bool)}, "targets and mask"),
        ({"targets": np.zeros((3, 14), np.float32)}, "targets: expected integers"),
        ({"mask": np.ones((3, 14), np.float32)}, "mask: expected bool"),
        ({"embedding": np.zeros((0, 8), np.float32)}, "empty"),
        ({"chunk": 0}, "chunk: expected at least 1"),
        ({"shards": 2}, "shards: expected a divisor of the 3 rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = dict(zip(("hidden", "embedding", "targets", "mask"), make_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        language_loss(**arguments)
