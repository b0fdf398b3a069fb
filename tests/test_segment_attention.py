"""Rows of many queries, which a decoder's attention takes a piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnistream_jax.ops.attention import segment_attention

QUERIES, KEYS, HEADS, WIDTH = 1100, 1500, 4, 8  # not a multiple of a piece


def plain(query, key, value, query_segments, key_segments, first_place):
    """Whole scores in NumPy, in the precision of the arguments; the groups' keys and values are repeated."""
    key, value = (np.repeat(tokens, HEADS // tokens.shape[2], axis=2) for tokens in (key, value))
    scores = np.einsum("bnhd,bshd->bhns", query, key) / np.sqrt(WIDTH)
    places = first_place + np.arange(query.shape[1])
    own = query_segments[:, :, None]
    image = own // 100 * 100
    seen = key_segments[:, None]
    visible = ((seen == own) | ((seen == image) & (seen > 0))) & (np.arange(key.shape[1]) <= places[:, None])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhns,bshd->bnhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.fixture(scope="module")
def row():
    """Queries at places 300 to 1,399 of a cache: an image and its texts, then another; all of one row's image."""
    draw = np.random.default_rng(0)
    query = draw.normal(size=(2, QUERIES, HEADS, WIDTH)).astype(np.float32)
    key, value = draw.normal(size=(2, 2, KEYS, HEADS // 2, WIDTH)).astype(np.float32)
    segments = np.repeat([100, 101, 102, 200, 201], KEYS // 5)[None].repeat(2, 0).astype(np.int32)
    segments[1] = 1
    return query, key, value, segments[:, 300 : 300 + QUERIES], segments, 300


def test_long_rows_equal_whole_scores(row):
    actual = jax.jit(segment_attention)(*row)
    exact = (part.astype(np.float64) if np.ndim(part) == 4 else part for part in row)
    np.testing.assert_allclose(actual, plain(*exact), rtol=1e-4, atol=1e-6)


def test_gradients_of_long_rows_equal_those_of_short_ones(row):
    weights = np.random.default_rng(1).normal(size=row[0].shape).astype(np.float32)

    @jax.jit
    def whole(query, key, value):
        return (weights * segment_attention(query, key, value, *row[3:])).sum()

    @jax.jit
    def in_short_rows(query, key, value):
        total, first_place = 0.0, row[5]
        for start in range(0, QUERIES, 100):
            part = slice(start, start + 100)
            said = segment_attention(query[:, part], key, value, row[3][:, part], row[4], first_place + start)
            total += (weights[:, part] * said).sum()
        return total

    for actual, expected in zip(*(jax.grad(f, (0, 1, 2))(*row[:3]) for f in (whole, in_short_rows)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_the_keys_and_not_with_their_square():
    def temporaries(tokens):
        tokens_of = [jax.ShapeDtypeStruct((1, tokens, heads, WIDTH), jnp.float32) for heads in (HEADS, 2, 2)]
        segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        compiled = jax.jit(segment_attention).lower(*tokens_of, segments, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)
    assert temporaries(8192) < 8192**2 * HEADS * 4 / 8
