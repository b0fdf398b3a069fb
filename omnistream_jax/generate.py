"""Text from a decoder: tokens one after another, behind a prompt and what a cache holds already.

Three programs, each compiled once per bucket of shapes, for all lengths of prompts and answers within it:

    extend    a prompt into the cache, and its last hidden states    per batch, bucket of the prompt and of the cache
    first     the first tokens out of those states                   per batch
    decode    further tokens, until all rows have ended              per batch and bucket of the cache

Prompts are padded up to `bucket_length`, caches to `bucket_capacity`. A prompt of a bucket longer than it is written
whole, but only the tokens of its longest row count; the next ones overwrite the rest, so that buckets fill no slots:

    cache, 2 rows     a a a a | . b b b _ _       . padding of the shorter row, on the left (segment 0)
                      a a a a | b b b b _ _       _ padding of the bucket, behind the cache's length

What is fed here has segment 1, and each token's position is the number of tokens before it in its row.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omnistream_jax.models.qwen3 import DecoderCache, Qwen3, empty_cache
from omnistream_jax.ops.sampling import sample_tokens

Array = jax.Array | np.ndarray

ENDED = -1
"""Stands for a token in rows that have ended."""

_NOT_A_NUMBER = -2  # from the device to the host: the logits were not finite
_FIRST_BUCKET = 32
_FIRST_CAPACITY = 64
_STOPS_BUCKET = 8
# Tokens a call of the decode program when nobody waits for each. On a busy CPU of 2 cores a token of the tiny decoder
# (V = 8192, B = 1) takes 2.6 ms with a call each, 1.3 ms with a call for 8, and 1.2 ms with a call for 32.
_TOKENS_A_CALL = 32


def bucket_length(tokens: int) -> int:
    """The smallest bucket that holds a prompt: 32, 64, 96, 128, then four to a doubling (160, 192, 224, 256, 320)."""
    step = max(_FIRST_BUCKET, _power_of_two(tokens) // 8)
    return -(-tokens // step) * step


def bucket_capacity(tokens: int) -> int:
    """The smallest bucket that holds a row's tokens: 64, 128, 256, 512, ..."""
    return max(_FIRST_CAPACITY, _power_of_two(tokens))


def _power_of_two(least: int) -> int:
    return 1 << (operator.index(least) - 1).bit_length()


def embed_prompts(decoder: Qwen3, params: Mapping[str, Any], prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Rows of token ids of any lengths, one or more each -> embeddings [B, L, D] and lengths int32 [B].

    L is the bucket of the longest. Raises ValueError for a row without tokens, or a token outside the vocabulary.
    """
    rows = [_token_ids(f"prompts[{number}]", prompt, decoder) for number, prompt in enumerate(prompts)]
    if not rows or not all(len(row) for row in rows):
        raise ValueError(f"prompts: expected one or more tokens in each row, got rows of {[len(row) for row in rows]}")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket_length(max(lengths))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return _embed_program(decoder, params, tokens), lengths


def prefill(
    decoder: Qwen3,
    params: Mapping[str, Any],
    embeddings: Array,
    lengths: Array | None = None,
    *,
    cache: DecoderCache | None = None,
    room: int = 0,
    max_length: int | None = None,
) -> DecoderCache:
    """Put embeddings into a cache, so that any number of questions can follow them: see `generate`.

    Args:
        decoder, params: as of `generate`.
        embeddings: [B, L, D], of visual tokens or of text.
        lengths: integers [B], how many of each row's embeddings count, from its first on; None: all.
        cache: what stands before them. It is consumed: donated where they fit, and the cache that is returned takes
            its place either way. None: nothing.
        room: tokens that will be fed after these: a cache that must grow grows for them as well.
        max_length: of a row, with the cache and the room; None: the decoder's.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    prompt = _Prompt.check(decoder, embeddings, lengths, cache)
    if operator.index(room) < 0:
        raise ValueError(f"room: expected a number of tokens >= 0, got {room}")
    start = 0 if cache is None else int(cache.length)
    max_length = decoder.config.max_length if max_length is None else max_length
    _check_length(start, prompt.longest, "a room of", room, max_length)
    capacity = max(start + bucket_length(prompt.longest), start + prompt.longest + room)
    if cache is None or capacity > cache.capacity:
        cache = _with_room(decoder, cache, prompt.batch, capacity)
    return _extend(decoder, params, prompt, cache)[1]


def generate(
    decoder: Qwen3,
    params: Mapping[str, Any],
    embeddings: Array,
    lengths: Array | None = None,
    *,
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: DecoderCache | None = None,
    max_length: int | None = None,
) -> np.ndarray:
    """Answers to a batch of prompts.

    Args:
        decoder, params: a decoder and its parameters. With `decoder.clone(decoding=True)` and
            `decoding_params(params, decoder.dtype)` tokens take a third of the time on a CPU.
        embeddings: [B, L, D], of the prompts; rows of token ids become embeddings by `embed_prompts`.
        lengths: integers [B], how many of each row's embeddings count, one or more, from its first on; None: all.
        max_tokens: of an answer, its stop token included.
        stop_tokens: a row ends with the first of these that it says.
        temperature: 0 takes the likeliest token, the one of the smallest id among equals; else tokens are drawn from
            softmax(logits / temperature).
        top_p: they are drawn from the nucleus alone, see ops/sampling.py; it always holds the likeliest token.
        seed: of the draws: equal arguments give equal tokens.
        cache: what stands before the prompts, of `prefill` or of the decoder itself, for B rows; its tokens have
            segment 1, or 0 where they are padding: others would not be seen. It is copied, and stays good for further
            questions.
        max_length: of a row: the cache, the longest prompt and the answer; None: the decoder's.

    Returns:
        int32 [B, n], n <= max_tokens: the answers, each with its stop token, and `ENDED` behind it. n is the length of
        the longest.

    Raises:
        ValueError: naming the argument that does not fit; or the decoder gives logits that are not numbers.
    """
    limits = _Limits(max_tokens, decoder.config.max_length if max_length is None else max_length)
    options = _options(decoder, stop_tokens, temperature, top_p, seed)
    pieces = _start(decoder, params, embeddings, lengths, limits, options, cache, _TOKENS_A_CALL)
    return np.concatenate(list(pieces), axis=1)


def generate_stream(
    decoder: Qwen3,
    params: Mapping[str, Any],
    embeddings: Array,
    lengths: Array | None = None,
    *,
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: DecoderCache | None = None,
    max_length: int | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` as they come: int32 [B] at a time, `ENDED` in rows that have ended.

    Arguments and errors are those of `generate`, and errors in the arguments come at the call. The next token is
    computed while the caller has this one; a caller may leave at any time.
    """
    limits = _Limits(max_tokens, decoder.config.max_length if max_length is None else max_length)
    options = _options(decoder, stop_tokens, temperature, top_p, seed)
    pieces = _start(decoder, params, embeddings, lengths, limits, options, cache, 1)
    return (piece[:, 0] for piece in pieces)


@dataclasses.dataclass(frozen=True)
class _Limits:
    """How long an answer, and a row, may become."""

    max_tokens: int
    max_length: int

    def __post_init__(self):
        for name in ("max_tokens", "max_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """Checked embeddings [B, L, D] and lengths int32 [B]."""

    embeddings: Array
    lengths: np.ndarray

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @classmethod
    def check(cls, decoder: Qwen3, embeddings: Array, lengths: Array | None, cache: DecoderCache | None) -> "_Prompt":
        width, shape = decoder.config.width, np.shape(embeddings)
        if len(shape) != 3 or shape[-1] != width or 0 in shape:
            raise ValueError(f"embeddings: expected [B, L, {width}], got {list(shape)}")
        lengths = np.full(shape[0], shape[1]) if lengths is None else np.asarray(lengths)
        if lengths.shape != shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
            raise ValueError(f"lengths: expected integers [{shape[0]}], got {lengths.dtype}{list(lengths.shape)}")
        if lengths.min() < 1 or lengths.max() > shape[1]:
            raise ValueError(f"lengths: expected 1 to {shape[1]} tokens in each row, got {lengths.tolist()}")
        if cache is not None and cache.length.is_deleted():
            raise ValueError("cache: prefill has consumed it already; go on with the cache that it returned")
        if cache is not None and cache.segments.shape[0] != shape[0]:
            raise ValueError(f"cache: expected {shape[0]} rows as of embeddings, got {cache.segments.shape[0]}")
        return cls(embeddings, lengths.astype(np.int32))


@struct.dataclass
class _Options:
    """How tokens are chosen and what ends a row; a field that is None compiles a program without it.

    Attributes:
        stops: int32 [S], filled up with ENDED.
        key: of the draws.
        temperature, top_p: float32 scalars.
    """

    stops: np.ndarray
    key: jax.Array | None = None
    temperature: np.float32 | None = None
    top_p: np.float32 | None = None

    def choose(self, logits: jax.Array, step: jax.Array | int) -> jax.Array:
        """Logits [B, V] -> the answers' tokens of number `step`, int32 [B]."""
        if self.key is None:
            tokens = logits.argmax(-1).astype(jnp.int32)
        else:
            key = jax.random.fold_in(self.key, step)  # of the step alone: not of how many are made at once
            tokens = sample_tokens(key, logits, self.temperature, self.top_p)
        return jnp.where(jnp.isfinite(logits.max(-1)), tokens, _NOT_A_NUMBER)

    def goes_on(self, tokens: jax.Array) -> jax.Array:
        """Which rows do not end with these tokens: bool [B]."""
        return (tokens >= 0) & (tokens[:, None] != self.stops).all(1)


@struct.dataclass
class _State:
    """Attributes: the cache; each row's latest token, int32 [B], not yet in the cache; and the number of tokens."""

    cache: DecoderCache
    tokens: jax.Array
    step: jax.Array


def _options(decoder: Qwen3, stop_tokens: Sequence[int], temperature: float, top_p: float, seed: int) -> _Options:
    stop_tokens = _token_ids("stop_tokens", stop_tokens, decoder)
    stops = np.full(max(1, -(-len(stop_tokens) // _STOPS_BUCKET)) * _STOPS_BUCKET, ENDED, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and up to 1, got {top_p!r}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a whole number from 0 to 2^32 - 1, got {seed!r}")
    if temperature == 0:
        return _Options(stops)
    return _Options(stops, jax.random.key(seed), np.float32(temperature), None if top_p == 1 else np.float32(top_p))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _token_ids(name: str, tokens: Sequence[int], decoder: Qwen3) -> np.ndarray:
    ids, limit = np.asarray(tokens), decoder.config.vocabulary_size
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name}: expected a list of token ids, got {tokens!r}")
    wrong = ids[(ids < 0) | (ids >= limit)]
    if wrong.size:
        raise ValueError(f"{name}: expected ids 0 to {limit - 1}, got {wrong[0]}")
    return ids.astype(np.int32)


def _check_length(cached: int, longest: int, what: str, more: int, max_length: int) -> None:
    if cached + longest + more > max_length:
        before = f"{cached} tokens in the cache, " if cached else ""
        raise ValueError(
            f"max_length: {before}a prompt of {longest} and {what} {more} are too long, "
            f"expected at most {max_length} together"
        )


def _start(
    decoder: Qwen3,
    params: Mapping[str, Any],
    embeddings: Array,
    lengths: Array | None,
    limits: _Limits,
    options: _Options,
    cache: DecoderCache | None,
    tokens_a_call: int,
) -> Iterator[np.ndarray]:
    """Check the prompts and put them into a cache of their own; the tokens then come as `_pieces`."""
    prompt = _Prompt.check(decoder, embeddings, lengths, cache)
    start = 0 if cache is None else int(cache.length)
    _check_length(start, prompt.longest, "an answer of", limits.max_tokens, limits.max_length)
    # The last token of an answer is said and not fed.
    capacity = start + max(bucket_length(prompt.longest), prompt.longest + limits.max_tokens - 1)
    cache = _with_room(decoder, cache, prompt.batch, capacity)
    hidden, cache = _extend(decoder, params, prompt, cache)
    tokens = _first_program(decoder, params, hidden, options)
    return _pieces(decoder, params, _State(cache, tokens, np.int32(1)), options, limits.max_tokens, tokens_a_call)


def _pieces(
    decoder: Qwen3, params: Mapping[str, Any], state: _State, options: _Options, max_tokens: int, tokens_a_call: int
) -> Iterator[np.ndarray]:
    """Arrays [B, 1 to tokens_a_call] until all rows have ended; the state is consumed."""
    pending, left = state.tokens[:, None], max_tokens - 1
    while pending is not None:
        upcoming = None
        if left > 0:  # in hand before the host waits for the last ones; it does nothing where all rows have ended
            upcoming, state = _decode_program(decoder, params, state, options, np.int32(min(left, tokens_a_call)))
            left -= tokens_a_call
        piece = np.asarray(pending)
        if (piece == _NOT_A_NUMBER).any():
            row = int(np.argwhere(piece == _NOT_A_NUMBER)[0, 0])
            raise ValueError(f"decoder: its logits in row {row} are not finite numbers; its weights or prompt are not")
        piece = piece[:, (piece != ENDED).any(0)]
        if not piece.shape[1]:
            return
        yield piece
        pending = upcoming


def _with_room(decoder: Qwen3, cache: DecoderCache | None, batch: int, tokens: int) -> DecoderCache:
    """A cache of its own with room for `tokens` of a row, and in it what `cache` holds."""
    capacity = bucket_capacity(tokens)
    if cache is None:
        return empty_cache(decoder.config, batch, capacity, decoder.dtype)
    capacity = max(capacity, cache.capacity)
    if jax.default_backend() != "cpu":
        return _copy_program(cache, capacity)

    # Host memory already: copying there compiles nothing.
    def copy(leaf: jax.Array, axis: int) -> jax.Array:
        room = np.zeros((*leaf.shape[:axis], capacity, *leaf.shape[axis + 1 :]), leaf.dtype)
        room[(slice(None),) * axis + (slice(leaf.shape[axis]),)] = leaf
        return jax.device_put(room)

    keys, values, segments = copy(cache.keys, 2), copy(cache.values, 2), copy(cache.segments, 1)
    return DecoderCache(keys, values, segments, jax.device_put(np.array(cache.length)))


def _extend(
    decoder: Qwen3, params: Mapping[str, Any], prompt: _Prompt, cache: DecoderCache
) -> tuple[jax.Array, DecoderCache]:
    """The prompt's last hidden states [B, D], and the cache with it in; the cache is donated."""
    length, embeddings = bucket_length(prompt.longest), prompt.embeddings
    if embeddings.shape[1] != length:
        if jax.default_backend() == "cpu":  # as in `_with_room`
            embeddings = np.asarray(embeddings)
        filling = [(0, 0), (0, max(0, length - embeddings.shape[1])), (0, 0)]
        pad = np.pad if isinstance(embeddings, np.ndarray) else jnp.pad
        embeddings = pad(embeddings[:, :length], filling)
    return _extend_program(decoder, params, embeddings, prompt.lengths, cache)


@functools.partial(jax.jit, static_argnums=0)
def _embed_program(decoder: Qwen3, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    return decoder.apply({"params": params}, tokens, method="embed")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _extend_program(
    decoder: Qwen3, params: Mapping[str, Any], embeddings: jax.Array, lengths: jax.Array, cache: DecoderCache
) -> tuple[jax.Array, DecoderCache]:
    longest = lengths.max()
    source = jnp.arange(embeddings.shape[1]) - (longest - lengths)[:, None]  # of each place, in its row of embeddings
    valid = (source >= 0) & (source < lengths[:, None])
    embeddings = jnp.take_along_axis(embeddings, jnp.maximum(source, 0)[..., None], axis=1, mode="clip")
    embeddings = jnp.where(valid[..., None], embeddings, 0)  # a NaN in what does not count would leak
    positions = jnp.where(valid, _next_positions(cache)[:, None] + source, 0)
    start = cache.length
    hidden, cache = decoder.apply({"params": params}, embeddings, positions, valid.astype(jnp.int32), cache)
    last = jax.lax.dynamic_index_in_dim(hidden, longest - 1, axis=1, keepdims=False)
    return last, cache.replace(length=start + longest)


@functools.partial(jax.jit, static_argnums=0)
def _first_program(decoder: Qwen3, params: Mapping[str, Any], hidden: jax.Array, options: _Options) -> jax.Array:
    return options.choose(decoder.apply({"params": params}, hidden, method="logits"), 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_program(
    decoder: Qwen3, params: Mapping[str, Any], state: _State, options: _Options, limit: jax.Array
) -> tuple[jax.Array, _State]:
    """At most `limit` <= _TOKENS_A_CALL tokens more: int32 [B, _TOKENS_A_CALL], filled up with ENDED, and the state."""
    variables = {"params": params}

    def unfinished(carry: tuple[_State, jax.Array, jax.Array]) -> jax.Array:
        state, _, count = carry
        return (count < limit) & options.goes_on(state.tokens).any()

    def one_more(carry: tuple[_State, jax.Array, jax.Array]) -> tuple[_State, jax.Array, jax.Array]:
        state, said, count = carry
        goes_on = options.goes_on(state.tokens)
        embeddings = decoder.apply(variables, jnp.where(goes_on, state.tokens, 0)[:, None], method="embed")
        positions = jnp.where(goes_on, _next_positions(state.cache), 0)[:, None]
        segments = goes_on.astype(jnp.int32)[:, None]
        hidden, cache = decoder.apply(variables, embeddings, positions, segments, state.cache)
        logits = decoder.apply(variables, hidden[:, 0], method="logits")
        tokens = jnp.where(goes_on, options.choose(logits, state.step), ENDED)
        said = jax.lax.dynamic_update_slice(said, tokens[:, None], (0, count))
        return _State(cache, tokens, state.step + 1), said, count + 1

    said = jnp.full((len(state.tokens), _TOKENS_A_CALL), ENDED, jnp.int32)
    state, said, _ = jax.lax.while_loop(unfinished, one_more, (state, said, jnp.int32(0)))
    return said, state


def _next_positions(cache: DecoderCache) -> jax.Array:
    """Of each row's next token: int32 [B]."""
    written = jnp.arange(cache.capacity) < cache.length
    return ((cache.segments > 0) & written).sum(1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _copy_program(cache: DecoderCache, capacity: int) -> DecoderCache:
    def copy(leaf: jax.Array, axis: int) -> jax.Array:
        room = jnp.zeros((*leaf.shape[:axis], capacity, *leaf.shape[axis + 1 :]), leaf.dtype)
        return jax.lax.dynamic_update_slice(room, leaf, (0,) * leaf.ndim)

    return DecoderCache(copy(cache.keys, 2), copy(cache.values, 2), copy(cache.segments, 1), cache.length + 0)
