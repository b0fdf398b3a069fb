"""What a stream keeps: every type of cache against the whole clip, pauses, and thousands of frames in one window."""

import functools

import backbone_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import relative_error

from omnistream_jax.ops.cache import empty_cache, frame_slot, grow_cache, read_frames, write_frame

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2, "int8": 6e-2}
WINDOWS = [{}, {"window": 4, "sinks": 1}]


@pytest.fixture(scope="module")
def model():
    return cases.random_model()


@pytest.fixture(scope="module")
def frames():
    return cases.random_frames(3, 20, 32, 32)


# Types of the cache.


@pytest.fixture(scope="module")
def offline(model, frames):
    @functools.partial(jax.jit, static_argnums=0)
    def encode(options, clip):
        return model.backbone.apply({"params": model.params}, clip, layers=None, **dict(options))

    return {str(options): encode(tuple(options.items()), frames[:, :14]) for options in WINDOWS}


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("cache_dtype", TOLERANCE)
def test_every_cache_type_streams_what_the_clip_gives(cache_dtype, options, model, frames, offline):
    streamed = cases.stream_through(model, frames[:, :14], [7, 7], cache_dtype=cache_dtype, **options)
    expected = jax.tree.leaves(offline[str(options)])
    errors = [relative_error(a, b) for a, b in zip(jax.tree.leaves(streamed), expected, strict=True)]
    assert max(errors) <= TOLERANCE[cache_dtype]
    if cache_dtype != "float32":
        assert max(errors) > 1e-6  # what is stored is no longer float32


def test_an_int8_cache_takes_a_quarter_of_the_memory(model):
    def cache_bytes(cache_dtype):
        stream = model.open_stream(1, 224, 224, cache_dtype=cache_dtype)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(stream.state.cache))

    assert cache_bytes("bfloat16") == cache_bytes("float32") / 2
    assert cache_bytes("int8") < 0.26 * cache_bytes("float32") + 201 * 16 * 2 * 2 * 4  # value scales: heads are 16 wide


def test_int8_keys_bear_channels_far_larger_than_the_rest():
    """Rounding errs by half a unit of each channel's (keys) or token's (values) largest magnitude over 127."""
    generator = np.random.default_rng(0)
    key, value = generator.normal(size=(2, 3, 10, 2, 16)).astype(np.float32)
    key[..., 5] *= 1000
    value[:, 4] *= 1000
    key[..., 6] = 0
    cache = empty_cache(3, 4, 10, 2, 16, jnp.int8)
    cache = write_frame(cache, key, value, np.array([0, 1, 3]))
    for stream, slot in enumerate([0, 1, 3]):
        keys, values = (array[stream, 0] for array in read_frames(cache, slot, 1, jnp.float32))
        allowed = np.abs(key[stream]).max(0) / 127 / 2
        assert np.all(np.abs(keys - key[stream]) <= 1.001 * allowed)
        allowed = np.abs(value[stream]).max(-1, keepdims=True) / 127 / 2
        assert np.all(np.abs(values - value[stream]) <= 1.001 * allowed)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_growing_keeps_what_is_stored(dtype):
    generator = np.random.default_rng(0)
    cache = empty_cache(1, 2, 3, 2, 8, jnp.dtype(dtype))
    for slot in range(2):
        cache = write_frame(cache, *generator.normal(size=(2, 1, 3, 2, 8)), np.array([slot]))
    grown = grow_cache(cache, 5)
    assert grown.capacity == 5
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(grown), strict=True):
        np.testing.assert_array_equal(after[:, :2], before)
        assert not np.any(after[:, 2:])


def test_a_ring_keeps_its_sinks_and_reuses_the_other_slots():
    slots = frame_slot(jnp.arange(9), window=4, sinks=1).tolist()
    assert slots == [0, 1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("cache_dtype", ["int4", "f32", 8])
def test_an_unknown_cache_type_is_refused(cache_dtype, model):
    with pytest.raises(ValueError, match=r"cache_dtype: expected one of float32, bfloat16, float16, int8, got"):
        model.open_stream(1, 32, 32, cache_dtype=cache_dtype)


# Pauses.


@pytest.mark.parametrize("options", [*WINDOWS, {"cache_dtype": "int8"}], ids=str)
def test_a_stream_that_pauses_goes_on_as_if_it_had_not(options, model, frames):
    """The frames offered to a paused stream are NaN: not one may reach it. Frame 16 crosses the first bucket."""
    pattern = np.random.default_rng(3).random((34, 3)) < 0.6
    stream = model.open_stream(3, 32, 32, **options)
    seen: list[list] = [[], [], []]
    for active in pattern:
        clock = stream.frame_index.tolist()
        active = active & (stream.frame_index < 20)
        offered = np.stack([frames[b, min(clock[b], 19)] for b in range(3)])[:, None].copy()
        offered[~active] = np.nan
        out, stream = model.step(stream, offered, active=active)
        assert stream.frame_index.tolist() == np.asarray(stream.state.frame_index).tolist()
        for b in np.flatnonzero(active):
            seen[b].append(cases.rows(out, np.s_[b : b + 1]))
    assert min(map(len, seen)) > 16
    for b, outputs in enumerate(seen):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *outputs)
        clip = frames[b : b + 1, : len(outputs)]
        expected = cases.stream_through(model, clip, [len(outputs)], **options)
        # One stream alone sums in another order than in a batch, and int8 then rounds to another unit now and then.
        errors = [relative_error(x, y) for x, y in zip(jax.tree.leaves(joined), jax.tree.leaves(expected), strict=True)]
        assert max(errors) <= (1e-2 if "cache_dtype" in options else 1e-5)


@pytest.mark.parametrize("active", [[True], [1, 0, 1], [[True, True, True]]], ids=str)
def test_a_mask_of_another_shape_is_refused(active, model, frames):
    with pytest.raises(ValueError, match=r"active: expected a bool mask of shape \(3,\)"):
        model.step(model.open_stream(3, 32, 32), frames[:, :1], active=active)


# Without end.


def test_two_thousand_frames_in_a_window_equal_the_clip_and_leave_nothing_behind(model):
    frames = cases.random_frames(1, 2000, 32, 32)
    stream = model.open_stream(1, 32, 32, window=8, sinks=2, layers=())
    outputs, alive = [], []
    for start in range(0, 2000, 50):
        out, stream = model.step(stream, frames[:, start : start + 50])
        outputs.append(jax.tree.map(np.array, out))
        del out
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(set(alive[2:])) == 1  # after the first 100 frames
    clip = model.backbone.apply({"params": model.params}, frames, layers=(), window=8, sinks=2)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *outputs)
    cases.assert_close(joined, clip, tolerance=5e-4)
