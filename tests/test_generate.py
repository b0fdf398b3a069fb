"""Generation against the released Qwen3 (golden 03): batches, caches, stops, sampling, and what it compiles."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import compilations
from goldens import load_golden
from safetensors.numpy import save_file

from omnistream_jax.convert.qwen3 import load_decoder
from omnistream_jax.generate import (
    ENDED,
    bucket_capacity,
    bucket_length,
    embed_prompts,
    generate,
    generate_stream,
    prefill,
)
from omnistream_jax.models.qwen3 import Qwen3, decoding_params, empty_cache
from omnistream_jax.ops.sampling import nucleus, sample_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = load_golden("03_qwen3")
IDS = GOLDEN.inputs["input_ids"].astype(np.int32)
VISUAL = GOLDEN.inputs["visual_embeds"]
EXPECTED = {name: GOLDEN.outputs[f"greedy_{name}"] for name in ("ids", "embeds")}
# Rows of 3 to 40 tokens, in two buckets.
PROMPTS = [np.random.default_rng(length).integers(256, size=length) for length in (3, 17, 29, 40)]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory, quick_compilation):
    """The golden's model and its parameters as training has them."""
    directory = tmp_path_factory.mktemp("qwen3")
    save_file(GOLDEN.weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(GOLDEN.config))
    config, params = load_decoder(directory)
    return Qwen3(config), jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def decoder(stacked):
    """The same for decoding."""
    model, params = stacked
    return model.clone(decoding=True), decoding_params(params, model.dtype)


def text_of(decoder):
    embeddings, lengths = embed_prompts(*decoder, IDS)
    return np.asarray(embeddings)[:, : lengths[0]]


def answers(decoder, prompts=PROMPTS, *, max_tokens=12, **options):
    return generate(*decoder, *embed_prompts(*decoder, prompts), max_tokens=max_tokens, **options)


# Against the released model.


@pytest.mark.parametrize("model", ["stacked", "decoder"])
@pytest.mark.parametrize("name", ["ids", "embeds"])
def test_greedy_tokens_match(request, model, name):
    model = request.getfixturevalue(model)
    text = text_of(model)
    prompt = text if name == "ids" else np.concatenate([VISUAL, text], axis=1)
    tokens = generate(*model, prompt, max_tokens=12)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, EXPECTED[name])


def test_greedy_tokens_match_with_text_and_visual_prefix_in_one_batch(decoder):
    text = text_of(decoder)
    longer = np.concatenate([VISUAL, text], axis=1)
    shorter = np.pad(text, ((0, 0), (0, VISUAL.shape[1]), (0, 0)), constant_values=np.nan)  # is never read
    lengths = np.repeat([longer.shape[1], text.shape[1]], len(text))
    tokens = generate(*decoder, np.concatenate([longer, shorter]), lengths, max_tokens=12)
    np.testing.assert_array_equal(tokens, np.concatenate([EXPECTED["embeds"], EXPECTED["ids"]]))


def test_a_prefix_in_a_cache_serves_several_questions(decoder):
    """The visual tokens are encoded once; the cache stays good after each answer."""
    visual = prefill(*decoder, VISUAL)
    assert int(visual.length) == VISUAL.shape[1]
    for _ in range(2):
        tokens = generate(*decoder, text_of(decoder), max_tokens=12, cache=visual)
        np.testing.assert_array_equal(tokens, EXPECTED["embeds"])


# Rows of unequal lengths.


@pytest.fixture(scope="module")
def alone(decoder):
    return np.concatenate([answers(decoder, [prompt]) for prompt in PROMPTS])


def test_a_batch_of_unequal_prompts_equals_each_alone(decoder, alone):
    assert len({tuple(row) for row in alone}) == len(PROMPTS)
    np.testing.assert_array_equal(answers(decoder), alone)
    np.testing.assert_array_equal(answers(decoder, PROMPTS[:3]), alone[:3])


def test_a_prompt_cut_between_cache_and_question_equals_the_whole(decoder, alone):
    """Both parts are of unequal lengths, so that padding stands in the middle of the row."""
    cuts = (2, 9, 1, 35)
    heads, tails = zip(*[(prompt[:cut], prompt[cut:]) for prompt, cut in zip(PROMPTS, cuts, strict=True)], strict=True)
    cache = prefill(*decoder, *embed_prompts(*decoder, heads))
    assert int(cache.length) == 35
    np.testing.assert_array_equal(answers(decoder, tails, cache=cache), alone)


def test_a_cache_that_is_filled_piece_by_piece_grows(decoder, alone):
    prompt, cache = PROMPTS[3], None
    for start in range(0, 36, 9):
        cache = prefill(*decoder, *embed_prompts(*decoder, [prompt[start : start + 9]]), cache=cache)
    assert int(cache.length) == 36
    assert cache.capacity == bucket_capacity(27 + 32) == 64
    tokens = answers(decoder, [prompt[36:]], cache=cache, max_tokens=60)
    assert tokens.shape == (1, 60)
    np.testing.assert_array_equal(tokens[:, :12], alone[3:])
    np.testing.assert_array_equal(tokens, answers(decoder, [prompt], max_tokens=60))
    grown = prefill(*decoder, *embed_prompts(*decoder, [prompt]), cache=cache, room=100)
    assert (int(grown.length), grown.capacity) == (76, 256)


def test_prefill_consumes_its_cache(decoder):
    before = prefill(*decoder, VISUAL, room=64)
    after = prefill(*decoder, VISUAL, cache=before)
    assert int(after.length) == 2 * VISUAL.shape[1]
    with pytest.raises(ValueError, match="cache: prefill has consumed it already"):
        generate(*decoder, VISUAL, max_tokens=1, cache=before)


# The end of an answer.


def test_each_row_ends_with_its_own_stop_token(decoder, alone):
    """Two stop tokens, which rows 0 and 1 meet at different places, and others perhaps not at all."""
    stops = [alone[0, 2], alone[1, 6]]
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in alone]
    assert len(set(ends)) > 1
    tokens = answers(decoder, stop_tokens=stops)
    assert tokens.shape == (len(PROMPTS), max(ends))
    for row, expected, end in zip(tokens, alone, ends, strict=True):
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == ENDED).all()


def test_generation_ends_when_all_rows_have(decoder, alone):
    assert answers(decoder, stop_tokens=alone[:, 0], max_tokens=70).shape == (len(PROMPTS), 1)
    stop = alone[1, 4]
    length = alone[1].tolist().index(stop) + 1
    tokens = answers(decoder, PROMPTS[1:2], stop_tokens=[stop], max_tokens=70)
    np.testing.assert_array_equal(tokens, alone[1:2, :length])


@pytest.mark.parametrize("max_tokens", [1, 2, 32, 33, 34, 70])
def test_answers_have_as_many_tokens_as_allowed(decoder, max_tokens):
    tokens = answers(decoder, PROMPTS[:1], max_tokens=max_tokens)
    assert tokens.shape == (1, max_tokens)
    np.testing.assert_array_equal(tokens, answers(decoder, PROMPTS[:1], max_tokens=70)[:, :max_tokens])


# Tokens as they come.


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}])
def test_a_stream_gives_the_tokens_of_generate(decoder, options):
    free = answers(decoder, max_tokens=40, **options)
    options["stop_tokens"] = [free[0, 5], free[2, 35]]
    expected = answers(decoder, max_tokens=40, **options)
    assert (expected == ENDED).any()
    prompts = embed_prompts(*decoder, PROMPTS)
    steps = list(generate_stream(*decoder, *prompts, max_tokens=40, **options))
    assert {step.shape for step in steps} == {(len(PROMPTS),)}
    np.testing.assert_array_equal(np.stack(steps, 1), expected)


def test_a_stream_may_be_left(decoder, alone):
    cache = prefill(*decoder, *embed_prompts(*decoder, [prompt[:-1] for prompt in PROMPTS]))
    last = embed_prompts(*decoder, [prompt[-1:] for prompt in PROMPTS])
    for number, tokens in enumerate(generate_stream(*decoder, *last, max_tokens=12, cache=cache)):
        np.testing.assert_array_equal(tokens, alone[:, number])
        if number == 3:
            break
    np.testing.assert_array_equal(generate(*decoder, *last, max_tokens=12, cache=cache), alone)


# Compilation.

PROGRAMS = ("_embed_program", "_extend_program", "_first_program", "_decode_program")


def test_prompts_and_answers_of_a_bucket_share_programs(decoder, caplog):
    jax.clear_caches()
    _, first = compilations(caplog, lambda: answers(decoder, PROMPTS[1:2], max_tokens=20))
    assert {name: first[name] for name in PROGRAMS} == dict.fromkeys(PROGRAMS, 1)

    def others():
        answers(decoder, PROMPTS[2:3], max_tokens=33, stop_tokens=[1, 2, 3])
        list(generate_stream(*decoder, *embed_prompts(*decoder, PROMPTS[:1]), max_tokens=4))
        generate(*decoder, VISUAL[:1], max_tokens=5)

    _, second = compilations(caplog, others)
    assert not second, "a program was compiled anew"
    _, third = compilations(caplog, lambda: answers(decoder, PROMPTS[3:], max_tokens=20))
    assert {name: third[name] for name in PROGRAMS} == {**dict.fromkeys(PROGRAMS, 0), **dict.fromkeys(PROGRAMS[:2], 1)}


def test_sampling_settings_are_no_shapes(decoder, caplog):
    run = functools.partial(answers, decoder, PROMPTS[:1], max_tokens=3)
    run(temperature=0.7, top_p=0.9)
    _, more = compilations(caplog, lambda: run(temperature=1.2, top_p=0.5, seed=8))
    assert not more


def test_buckets():
    assert [bucket_length(n) for n in (1, 17, 29, 32, 33, 65, 128, 129, 256, 257, 513)] == [
        *(32, 32, 32, 32, 64, 96, 128, 160, 256, 320, 640)
    ]
    assert [bucket_capacity(n) for n in (1, 64, 65, 1000, 1024, 1025)] == [64, 64, 128, 1024, 1024, 2048]
    for tokens in range(1, 3000):
        assert tokens <= bucket_length(tokens) <= max(32, tokens + 31, 1.25 * tokens)


# Sampling.

DRAWS = 2000


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def nucleus_by_sorting(probabilities, top_p):
    """The definition, in NumPy: the likeliest tokens up to the one with which the sum reaches top_p."""
    kept = np.zeros(len(probabilities), bool)
    total = 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        kept[token] = True
        total += probabilities[token]
        if total >= top_p:
            break
    return kept


def draw(logits, seed, temperature, top_p):
    """DRAWS tokens, each a row of one batch."""
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    return np.asarray(jax.jit(sample_tokens)(jax.random.key(seed), logits, temperature, top_p))


def assert_drawn_from(tokens, probabilities):
    """Chi-squared over the possible tokens, by the bound of 1 in 10,000 (Wilson and Hilferty 1931); no impossible."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = len(tokens) * probabilities[possible]
    freedom = possible.sum() - 1
    spread = 2 / (9 * freedom)
    bound = freedom * (1 - spread + 3.72 * spread**0.5) ** 3
    assert (np.square(counts[possible] - expected) / expected).sum() < bound


@pytest.mark.parametrize("top_p", [None, 0.6, 0.85])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature, top_p):
    logits = np.array([0.3, 1.4, -0.6, 0.9, 2.0, 0.1])
    probabilities = softmax(logits / temperature)
    if top_p is not None:
        probabilities = probabilities * nucleus_by_sorting(probabilities, top_p)
        assert 1 < (probabilities > 0).sum() < 6
    assert_drawn_from(draw(logits, 0, temperature, top_p), probabilities / probabilities.sum())


def test_the_check_of_draws_tells_a_wrong_temperature():
    logits = np.array([0.3, 1.4, -0.6, 0.9, 2.0, 0.1])
    with pytest.raises(AssertionError):
        assert_drawn_from(draw(logits, 0, 1.2, None), softmax(logits))


@pytest.mark.parametrize("top_p", [1e-50, 1e-40, 1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_the_nucleus_is_the_one_by_sorting(top_p):
    logits = np.random.default_rng(5).normal(size=(8, 1000)) * np.array([0.5, 1, 2, 3, 4, 6, 8, 12])[:, None]
    probabilities = softmax(logits).astype(np.float32)
    kept = np.asarray(jax.jit(nucleus)(probabilities, top_p))
    assert kept.any(1).all()
    for row, found in zip(probabilities, kept, strict=True):
        total = row[found].astype(np.float64).sum()
        assert row[found].min() > row[~found].max(initial=-1)
        assert total >= top_p - 1e-6  # float32 sums
        assert total - row[found].min() < top_p + 1e-6
        if top_p < 1:
            assert abs(found.sum() - nucleus_by_sorting(row.astype(np.float64), top_p).sum()) <= 1


def test_tokens_that_tie_with_the_last_of_the_nucleus_belong_to_it():
    probabilities = np.array([[0.25, 0.25, 0.125, 0.25, 0.125]], np.float32)
    for top_p, kept in ((0.2, [1, 1, 0, 1, 0]), (0.75, [1, 1, 0, 1, 0]), (0.76, [1, 1, 1, 1, 1])):
        np.testing.assert_array_equal(nucleus(probabilities, top_p)[0], kept)


def test_a_vanishing_temperature_takes_the_likeliest_token():
    assert (draw([0.3, 1.4, 1.3], 0, 1e-45, None) == 1).all()


def test_a_seed_determines_the_tokens(decoder):
    run = functools.partial(answers, decoder, [PROMPTS[1]] * 2, temperature=1.5, max_tokens=20)
    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(1).all()
    assert (first[0] != first[1]).any(), "rows draw by themselves"
    np.testing.assert_array_equal(run(seed=1, top_p=1e-9), answers(decoder, [PROMPTS[1]] * 2, max_tokens=20))


def test_first_tokens_of_many_rows_follow_the_decoder(decoder):
    """Through generate itself: 2,000 rows of one prompt, cached once."""
    model, params = decoder
    prompt = PROMPTS[0]
    positions = np.arange(len(prompt), dtype=np.int32)[None]
    embeddings = embed_prompts(model, params, [prompt])[0][:, : len(prompt)]
    cache = empty_cache(model.config, 1, len(prompt))
    variables = {"params": params}
    hidden, _ = model.apply(variables, embeddings, positions, np.ones_like(positions), cache)
    logits = np.asarray(model.apply(variables, hidden[0, -1], method="logits"), np.float64)
    probabilities = softmax(logits / 0.8)
    probabilities *= nucleus_by_sorting(probabilities, 0.7)
    assert 2 < (probabilities > 0).sum() < 200
    rows = np.broadcast_to(embeddings, (DRAWS, *embeddings.shape[1:]))
    tokens = generate(model, params, rows, max_tokens=1, temperature=0.8, top_p=0.7, seed=4)
    assert_drawn_from(tokens[:, 0], probabilities / probabilities.sum())


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected a whole number of at least 1, got 0"),
        ({"max_tokens": 2.5}, "max_tokens: expected a whole number of at least 1, got 2.5"),
        ({"temperature": -0.1}, "temperature: expected a number >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number >= 0, got nan"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and up to 1, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected a number above 0 and up to 1, got 1.1"),
        ({"stop_tokens": [3, 256]}, "stop_tokens: expected ids 0 to 255, got 256"),
        ({"stop_tokens": [-1]}, "stop_tokens: expected ids 0 to 255, got -1"),
        ({"stop_tokens": 7}, "stop_tokens: expected a list of token ids, got 7"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"lengths": np.array([3, 0])}, r"lengths: expected 1 to 11 tokens in each row, got \[3, 0\]"),
        ({"lengths": np.array([3])}, r"lengths: expected integers \[2\], got int64\[1\]"),
        ({"max_length": 30, "max_tokens": 20}, "a prompt of 11 and an answer of 20 are too long, expected at most 30"),
        ({"max_tokens": 502}, "max_length: a prompt of 11 and an answer of 502 are too long, expected at most 512"),
    ],
)
@pytest.mark.parametrize("run", [generate, generate_stream])
def test_bad_arguments_are_refused_at_the_call(decoder, run, options, message):
    with pytest.raises(ValueError, match=message):
        run(*decoder, np.zeros((2, 11, 64), np.float32), **{"max_tokens": 4, **options})


def test_bad_prompts_are_refused(decoder):
    for shape in ((2, 11), (2, 11, 32), (0, 11, 64), (2, 0, 64)):
        with pytest.raises(ValueError, match=r"embeddings: expected \[B, L, 64\], got"):
            generate(*decoder, np.zeros(shape, np.float32), max_tokens=4)
    with pytest.raises(ValueError, match=r"prompts: expected one or more tokens in each row, got rows of \[2, 0\]"):
        embed_prompts(*decoder, [[1, 2], []])
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected ids 0 to 255, got 300"):
        embed_prompts(*decoder, [[1, 2], [300]])
    cache = prefill(*decoder, VISUAL)
    with pytest.raises(ValueError, match="cache: expected 1 rows as of embeddings, got 2"):
        generate(*decoder, VISUAL[:1], max_tokens=4, cache=cache)
    with pytest.raises(ValueError, match="9 tokens in the cache, a prompt of 9 and an answer of 4 are too long"):
        generate(*decoder, VISUAL, max_tokens=4, cache=cache, max_length=20)
    with pytest.raises(ValueError, match="9 tokens in the cache, a prompt of 9 and a room of 4 are too long"):
        prefill(*decoder, VISUAL, cache=cache, room=4, max_length=20)


def test_what_is_not_a_number_is_an_error(decoder):
    spoilt = np.array(VISUAL)
    spoilt[1, 3] = np.nan
    with pytest.raises(ValueError, match="decoder: its logits in row 1 are not finite numbers"):
        generate(*decoder, spoilt, max_tokens=4)


def test_bfloat16_generates_from_bfloat16_caches(stacked):
    model = dataclasses.replace(stacked[0], dtype=jnp.bfloat16, decoding=True)
    decoder = (model, decoding_params(stacked[1], jnp.bfloat16))
    cache = prefill(*decoder, VISUAL)
    assert cache.keys.dtype == jnp.bfloat16
    tokens = generate(*decoder, text_of(decoder), max_tokens=12, cache=cache)
    # The golden's margins are at least 0.01 and logits reach 10: 2 % may change tokens, but not most of them.
    assert (tokens == EXPECTED["embeds"]).mean() > 0.5
