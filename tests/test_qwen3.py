"""The decoder against the released Qwen3 (golden 03), its cache, padding and packing, and what errors say."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error
from safetensors.numpy import save_file

from omnistream_jax.convert.qwen3 import load_decoder
from omnistream_jax.models.qwen3 import (
    DECODER_PRESETS,
    Qwen3,
    Qwen3Config,
    decoder_preset,
    decoding_params,
    empty_cache,
    init_decoder,
    output_matrix,
)
from omnistream_jax.utils.trees import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = load_golden("03_qwen3")
IDS = GOLDEN.inputs["input_ids"].astype(np.int32)
VISUAL = GOLDEN.inputs["visual_embeds"]
SMALL = Qwen3Config(vocabulary_size=40, width=16, depth=2, heads=4, kv_heads=2, head_width=8, hidden=24)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """The golden's model in float32 and its parameters, by way of a directory."""
    directory = tmp_path_factory.mktemp("qwen3")
    save_file(GOLDEN.weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(GOLDEN.config))
    config, params = load_decoder(directory)
    return Qwen3(config), jax.tree.map(jnp.asarray, params)


def fresh(config, seed=0):
    return jax.jit(lambda key: init_decoder(Qwen3(config), key))(jax.random.key(seed))


@pytest.fixture(scope="module")
def small(quick_compilation):
    model, params = Qwen3(SMALL), fresh(SMALL)
    # Larger than a fresh decoder's, where attention hardly matters.
    return model, jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, params)


def embed(decoder, tokens):
    model, params = decoder
    return model.apply({"params": params}, tokens, method="embed")


def logits(decoder, hidden):
    return _logits(*decoder, hidden)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, hidden):
    return model.apply({"params": params}, hidden, method="logits")


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, embeddings, positions, segments, cache=None):
    return model.apply({"params": params}, embeddings, positions, segments, cache)


def one_text(length, batch=1, start=0):
    """Positions and segments of rows that hold one text each."""
    positions = jnp.broadcast_to(jnp.arange(start, start + length), (batch, length))
    return positions, jnp.ones((batch, length), jnp.int32)


def hidden_of(decoder, embeddings):
    return run(*decoder, embeddings, *one_text(embeddings.shape[1], len(embeddings)))


def prefix(decoder, name):
    """The golden's rows: text alone, or text behind visual embeddings."""
    text = embed(decoder, IDS)
    return text if name == "ids" else jnp.concatenate([VISUAL, text], axis=1)


def random_embeddings(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, SMALL.width)), jnp.float32)


# Against the released model.


@pytest.mark.parametrize("name", ["ids", "embeds"])
def test_logits_match(decoder, name):
    hidden = hidden_of(decoder, prefix(decoder, name))
    actual = logits(decoder, hidden)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, GOLDEN.outputs[f"logits_{name}"]) <= 1e-5
    if name == "embeds":
        assert relative_error(hidden, GOLDEN.outputs["last_hidden_embeds"]) <= 1e-5


@pytest.mark.parametrize("name", ["ids", "embeds"])
def test_greedy_tokens_match_with_a_cache(decoder, name):
    model, params = decoder
    embeddings, expected = prefix(decoder, name), GOLDEN.outputs[f"greedy_{name}"]
    batch, length = embeddings.shape[:2]
    cache = empty_cache(model.config, batch, capacity=length + 12)
    hidden, cache = run(model, params, embeddings, *one_text(length, batch), cache)
    tokens = []
    for step in range(12):
        tokens.append(logits(decoder, hidden[:, -1:]).argmax(-1))
        if step < 11:
            row = one_text(1, batch, start=length + step)
            hidden, cache = run(model, params, embed(decoder, tokens[-1]), *row, cache)
    np.testing.assert_array_equal(np.concatenate(tokens, 1), expected)


@pytest.mark.parametrize("name", ["ids", "embeds"])
def test_greedy_tokens_match_without_a_cache(decoder, name):
    embeddings, expected = prefix(decoder, name), GOLDEN.outputs[f"greedy_{name}"]
    length = embeddings.shape[1]
    embeddings = jnp.pad(embeddings, ((0, 0), (0, 12), (0, 0)))  # one shape for all steps
    for place in range(length, length + 12):
        token = logits(decoder, hidden_of(decoder, embeddings)[:, place - 1]).argmax(-1)
        np.testing.assert_array_equal(token, expected[:, place - length])
        embeddings = embeddings.at[:, place].set(embed(decoder, token[:, None])[:, 0])


@pytest.mark.parametrize("remat", ["auto", "none", "block"])
def test_loss_and_gradients_match(decoder, remat):
    model, params = Qwen3(decoder[0].config, remat=remat), decoder[1]
    labels = jnp.asarray(GOLDEN.inputs["labels"])[:, 1:]

    @jax.jit
    def loss(visual, params):
        embeddings = jnp.concatenate([visual, embed((model, params), IDS)], axis=1)
        scores = logits((model, params), hidden_of((model, params), embeddings))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores[:, :-1]), jnp.maximum(labels, 0)[..., None], -1)
        return -(chosen[..., 0] * (labels >= 0)).sum() / (labels >= 0).sum()

    value, (visual, weights) = jax.value_and_grad(loss, (0, 1))(VISUAL, params)
    assert relative_error(value, GOLDEN.outputs["lm_loss"]) <= 1e-5
    assert relative_error(visual, GOLDEN.grads["input:visual_embeds"]) <= 1e-4
    blocks, width = weights["blocks"], model.config.width
    ours = {
        "embed_tokens.weight": weights["embedding"],
        "norm.weight": weights["norm"]["scale"],
        "layers.0.self_attn.q_norm.weight": blocks["query_norm"]["scale"][0],
        "layers.0.self_attn.k_norm.weight": blocks["key_norm"]["scale"][0],
        "layers.0.self_attn.q_proj.weight": blocks["query"]["kernel"][0].reshape(width, -1).T,
        "layers.0.self_attn.k_proj.weight": blocks["key"]["kernel"][0].reshape(width, -1).T,
        "layers.0.self_attn.v_proj.weight": blocks["value"]["kernel"][0].reshape(width, -1).T,
        "layers.0.self_attn.o_proj.weight": blocks["projection"]["kernel"][0].reshape(-1, width).T,
        "layers.1.mlp.gate_proj.weight": blocks["gate"]["kernel"][1].T,
    }
    expected = {name: grad for name, grad in GOLDEN.grads.items() if name.startswith("model.")}
    assert {f"model.{name}" for name in ours} >= expected.keys()
    assert len(expected) >= 8
    for name, gradient in expected.items():
        assert relative_error(ours[name.removeprefix("model.")], gradient) <= 1e-4, name


@pytest.mark.parametrize("name", ["ids", "embeds"])
def test_bfloat16_stays_within_two_percent(decoder, name):
    half = (Qwen3(decoder[0].config, dtype=jnp.bfloat16), decoder[1])
    hidden = hidden_of(half, prefix(half, name))
    assert hidden.dtype == jnp.bfloat16
    actual, expected = logits(half, hidden), GOLDEN.outputs[f"logits_{name}"]
    assert actual.dtype == jnp.float32
    deviation = np.sqrt(np.mean(np.square(actual - expected)) / np.mean(np.square(expected)))
    assert 0 < deviation <= 0.02


# One rule for rows: segments.


def test_left_padded_rows_equal_each_alone(small):
    """Rows of 3, 5 and 8 tokens in 8 places; what stands in the padding does not matter."""
    embeddings = random_embeddings(3, 8)
    lengths = np.array([3, 5, 8])
    positions = np.arange(8) - (8 - lengths)[:, None]
    segments = (positions >= 0).astype(np.int32)
    batched = run(*small, embeddings, jnp.maximum(positions, 0), segments)
    assert jnp.isfinite(batched).all()
    for row, length in enumerate(lengths):
        alone = hidden_of(small, embeddings[row : row + 1, 8 - length :])
        np.testing.assert_allclose(batched[row, 8 - length :], alone[0], atol=2e-5)


def test_left_padded_rows_equal_each_alone_with_a_cache(small):
    model, params = small
    embeddings, lengths = random_embeddings(2, 9), np.array([3, 6])
    positions = np.arange(9) - (6 - lengths)[:, None]
    segments = (positions >= 0).astype(np.int32)
    positions = np.maximum(positions, 0)
    cache, outputs = empty_cache(model.config, 2, 12), []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 9)):
        out, cache = run(model, params, embeddings[:, piece], positions[:, piece], segments[:, piece], cache)
        outputs.append(out)
    assert int(cache.length) == 9
    cached = jnp.concatenate(outputs, axis=1)
    for row, length in enumerate(lengths):
        alone = hidden_of(small, embeddings[row : row + 1, 6 - length :])
        np.testing.assert_allclose(cached[row, 6 - length :], alone[0], atol=2e-5)


def test_packed_texts_equal_each_alone_even_when_interleaved(small):
    """A row of the alignment task: two images' tokens, then their texts, then padding."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 1, 1, 2, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5, 0]])
    embeddings = random_embeddings(1, 12)
    packed = run(*small, embeddings, positions, segments)
    assert jnp.isfinite(packed).all()
    for number in (1, 2):
        places = np.flatnonzero(segments[0] == number)
        np.testing.assert_allclose(packed[:, places], hidden_of(small, embeddings[:, places]), atol=2e-5)


def test_texts_about_one_image_equal_each_alone_with_it(small):
    segments = np.array([[100, 100, 200, 101, 101, 102, 102, 102, 201, 0]])
    positions = np.array([[0, 1, 0, 2, 3, 2, 3, 4, 1, 0]])
    embeddings = random_embeddings(1, 10)
    packed = run(*small, embeddings, positions, segments)
    for image, text in ((100, 101), (100, 102), (200, 201)):
        places = np.flatnonzero(np.isin(segments[0], (image, text)))
        np.testing.assert_allclose(packed[:, places], hidden_of(small, embeddings[:, places]), atol=2e-5)


def test_padding_gets_and_gives_no_gradient(small):
    embeddings, segments = random_embeddings(1, 6), np.array([[0, 0, 1, 1, 1, 0]])

    def loss(embeddings):
        hidden = run(*small, embeddings, jnp.maximum(jnp.arange(6) - 2, 0)[None], segments)
        return (jnp.square(hidden[..., :3]) * (segments > 0)[..., None]).sum()

    gradient = jax.grad(loss)(embeddings)
    assert (gradient[segments == 0] == 0).all()
    assert (jnp.abs(gradient[segments > 0]).max(-1) > 0).all()


# The cache.


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_cut_into_pieces_gives_the_whole(small, dtype, decoding):
    model, params = Qwen3(SMALL, dtype=dtype), small[1]
    embeddings = random_embeddings(2, 9)
    whole = hidden_of((model, params), embeddings)
    if decoding:
        model, params = Qwen3(SMALL, dtype=dtype, decoding=True), decoding_params(params, dtype)
    cache, start, outputs = empty_cache(SMALL, 2, 11, dtype), 0, []
    for count in (5, 1, 3):
        row = one_text(count, 2, start)
        out, cache = run(model, params, embeddings[:, start : start + count], *row, cache)
        outputs.append(out)
        start += count
    assert cache.keys.dtype == cache.values.dtype == dtype
    difference = jnp.concatenate(outputs, 1).astype(jnp.float32) - whole.astype(jnp.float32)
    assert jnp.abs(difference).max() <= (2e-5 if dtype == jnp.float32 else 0.05) * jnp.abs(whole).max()


def test_parameters_for_decoding_are_refused_without_a_cache(small):
    with pytest.raises(ValueError, match="cache: parameters for decoding need one"):
        run(Qwen3(SMALL, decoding=True), decoding_params(small[1], jnp.float32), random_embeddings(1, 2), *one_text(2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_for_decoding_lie_on_the_device(small, dtype):
    """NumPy's would be copied there at every token."""
    params = decoding_params(jax.tree.map(np.asarray, small[1]), dtype)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_a_full_cache_is_never_overwritten_in_silence(small):
    model, params = small
    variables, embeddings = {"params": params}, random_embeddings(1, 4)
    cache = empty_cache(SMALL, 1, 6)
    hidden, cache = model.apply(variables, embeddings, *one_text(4), cache)
    cache.check_room(2)
    with pytest.raises(ValueError, match="3 tokens do not fit, 4 of its 6 slots are in use"):
        cache.check_room(3)
    with pytest.raises(ValueError, match="4 tokens do not fit, 4 of its 6"):
        model.apply(variables, embeddings, *one_text(4), cache)
    with pytest.raises(ValueError, match="4 tokens do not fit, 0 of its 3"):
        run(model, params, embeddings, *one_text(4), empty_cache(SMALL, 1, 3))
    hidden, cache = run(model, params, embeddings, *one_text(4), cache)  # inside jit the length is not known
    assert jnp.isnan(hidden).all()
    assert jnp.isnan(run(model, params, embeddings[:, :1], *one_text(1), cache)[0]).all()


def test_a_cache_of_another_decoder_is_refused(small):
    model, params = small
    other = decoder_preset("tiny")
    for cache in (empty_cache(other, 1, 4), empty_cache(SMALL, 2, 4), empty_cache(SMALL, 1, 4, jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"cache: expected keys of float32\[2, 1, 4, 2, 8\], got"):
            run(model, params, random_embeddings(1, 2), *one_text(2), cache)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        empty_cache(SMALL, 1, 0)


# Parameters and bad input.


def test_untied_logits_have_a_matrix_of_their_own(small):
    config = dataclasses.replace(SMALL, tied=False)
    model, params = Qwen3(config), fresh(config, seed=1)
    hidden = random_embeddings(1, 3)
    expected = hidden @ params["output"].T
    np.testing.assert_allclose(logits((model, params), hidden), expected, atol=1e-6)
    assert output_matrix(params, config) is params["output"]
    assert output_matrix(small[1], SMALL) is small[1]["embedding"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("0.6b", 596_049_920),
        ("1.7b", 1_720_574_976),
        ("4b", 4_022_468_096),
        ("8b", 8_190_735_360),
        ("14b", 14_768_307_200),
        ("32b", 32_762_123_264),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, count):
    model = Qwen3(DECODER_PRESETS[name])
    shapes = jax.eval_shape(lambda: init_decoder(model, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}


def test_every_block_starts_with_kernels_of_its_own():
    params = fresh(SMALL)
    for name, leaf in named_leaves(params).items():
        if "kernel" in name:
            assert not np.array_equal(leaf[0], leaf[1]), name
            assert 0.014 < leaf.std() < 0.026, name


def test_a_token_outside_the_vocabulary_is_an_error_or_not_a_number(small):
    for token in (-1, 40):
        with pytest.raises(ValueError, match=f"tokens: expected ids 0 to 39, got {token}"):
            embed(small, jnp.array([[3, token]]))
        inside = jax.jit(lambda tokens: embed(small, tokens))(jnp.array([[3, token]]))
        assert jnp.isfinite(inside[:, 0]).all()
        assert jnp.isnan(inside[:, 1]).all()
    with pytest.raises(ValueError, match="tokens: expected integers, got float32"):
        embed(small, jnp.zeros((1, 2)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", 0, "depth: expected a whole number of at least 1, got 0"),
        ("width", 64.0, "width: expected a whole number of at least 1, got 64.0"),
        ("kv_heads", 3, "heads: 4 query heads do not share 3 key-value heads evenly"),
        ("head_width", 9, "head_width: expected an even number"),
        ("rope_theta", 0.0, "rope_theta: expected a positive number, got 0.0"),
        ("norm_eps", float("inf"), "norm_eps: expected a positive number, got inf"),
        ("tied", "yes", "tied: expected True or False, got 'yes'"),
    ],
)
def test_sizes_that_make_no_decoder_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        decoder_preset("tiny", **{field: value})


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"decoder.preset: expected one of tiny, 0.6b, .*, got '7b'"):
        decoder_preset("7b")


def test_rows_that_do_not_fit_are_refused(small):
    embeddings = random_embeddings(2, 3)
    positions, segments = one_text(3, 2)
    with pytest.raises(ValueError, match=r"embeddings: expected \[B, L, 16\], got \[2, 3, 15\]"):
        run(*small, embeddings[..., :15], positions, segments)
    with pytest.raises(ValueError, match=r"positions: expected integers \[2, 3\], got int32\[1, 3\]"):
        run(*small, embeddings, positions[:1], segments)
    with pytest.raises(ValueError, match=r"segments: expected integers \[2, 3\], got bool\[2, 3\]"):
        run(*small, embeddings, positions, segments > 0)
