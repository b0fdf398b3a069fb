"""Streams against whole clips, and what a stream promises: clocks of its own, few compilations, nothing left behind."""

import dataclasses
import functools
import itertools
import math

import backbone_cases as cases
import jax
import numpy as np
import pytest

from omnistream_jax.ops.attention import frame_causal_attention
from omnistream_jax.stream import bucket_capacity

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, TIME, HEIGHT, WIDTH = 3, 24, 32, 48
RATIO = np.array([0.5, 1.0, 2.0], np.float32)


@pytest.fixture(scope="module")
def model():
    return cases.random_model()


@pytest.fixture(scope="module")
def frames():
    return cases.random_frames(BATCH, TIME, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def offline(model, frames):
    return model.encode(frames)


def open_stream(model, **options):
    return model.open_stream(BATCH, HEIGHT, WIDTH, **options)


# Streamed equals offline.


@pytest.mark.parametrize("chunks", [[1] * 24, [24], [7, 1, 16]], ids=str)
def test_any_chunking_equals_the_whole_clip(model, frames, offline, chunks):
    """[7, 1, 16] crosses the first capacity bucket inside a chunk, [24] opens beyond it."""
    cases.assert_close(cases.stream_through(model, frames, chunks), offline)


def test_any_chunking_equals_the_whole_clip_with_camera_token(model, frames, offline):
    options = {"camera_token": True, "aspect_ratio": RATIO, "layers": (1,)}
    clip = model.encode(frames, **options)
    assert clip.camera.shape == (BATCH, TIME, 32)
    for chunks in ([1] * 24, [1, 23]):
        cases.assert_close(cases.stream_through(model, frames, chunks, **options), clip)
    assert np.abs(clip.cls - offline.cls).max() > 0.1


@pytest.mark.parametrize("rope", ["released", "dinov3_2d"])
def test_every_rope_layout_and_time_unit_streams(rope, frames, offline):
    """The other tests use "dinov3", 16 frames and longer clips, for which attention takes another path."""
    model = cases.random_model(rope=rope)
    expected = model.encode(frames[:, :3], time_unit=2)
    cases.assert_close(cases.stream_through(model, frames[:, :3], [1] * 3, time_unit=2), expected)
    assert np.abs(expected.cls - offline.cls[:, :3]).max() > 0.1

    changed = frames[:, :3].copy()
    changed[:, 2] = np.nan
    after = model.encode(changed, time_unit=2)
    cases.assert_same_bits(cases.rows(after, np.s_[:, :2]), cases.rows(expected, np.s_[:, :2]))


# Windows.


def visible_frames(frame, window, sinks):
    """The definition, as sets: the first `sinks` frames and the newest `window - sinks`."""
    past = list(range(frame + 1))
    return past if window is None else sorted(set(past[:sinks]) | set(past[sinks:][-(window - sinks) :]))


def dense_attention(query, key, value, window, sinks):
    """Softmax attention under a dense mask in float64; arrays [B, T, P, H, D]."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    batch, time, tokens, heads, width = query.shape
    mask = np.zeros((time, tokens, time, tokens), bool)
    for frame in range(time):
        mask[frame, :, visible_frames(frame, window, sinks)] = True
    scores = np.einsum("btphd,bsqhd->bhtpsq", query, key) / math.sqrt(width)
    scores = np.where(mask, scores, -np.inf).reshape(batch, heads, time, tokens, time * tokens)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).reshape(batch, heads, time, tokens, time, tokens)
    return np.einsum("bhtpsq,bsqhd->btphd", weights, value)


def random_heads(time):
    generator = np.random.default_rng(2)
    return (2 * generator.normal(size=(3, 2, time, 3, 2, 8))).astype(np.float32)


@pytest.mark.parametrize(
    ("time", "window", "sinks"),
    [
        (6, None, 1), (6, 4, 1), (6, 3, 0), (6, 3, 2), (6, 1, 0), (6, 9, 2),  # one frame after the other
        (10, None, 1), (10, 5, 2), (10, 4, 0), (10, 6, 5),  # in groups of three, the last of one
    ],
)  # fmt: skip
def test_clip_attention_equals_a_dense_mask(time, window, sinks, monkeypatch):
    if time == 10:  # fewer groups than in earnest compile in a quarter of the time
        monkeypatch.setattr("omnistream_jax.ops.attention._UNROLLED_GROUPS", 4)
    query, key, value = random_heads(time)
    attend = jax.jit(functools.partial(frame_causal_attention, window=window, sinks=sinks))
    difference = np.abs(attend(query, key, value) - dense_attention(query, key, value, window, sinks))
    assert difference.max() <= 1e-5


@pytest.fixture(scope="module")
def windowed_pass(model):
    """Offline features under a window, at true time indices, through an attention held to the dense mask above."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def encode(frames, window, sinks):
        return model.backbone.apply({"params": model.params}, frames, layers=None, window=window, sinks=sinks)

    return encode


@pytest.mark.parametrize(("window", "sinks", "chunks"), [(4, 1, [1] * 8), (3, 0, [4, 4]), (3, 2, [8])], ids=str)
def test_a_window_equals_the_clip_under_the_same_mask(window, sinks, chunks, model, frames, offline, windowed_pass):
    """Eight frames turn the ring of three or fewer slots more than twice."""
    clip = frames[:, :8]
    expected = windowed_pass(clip, window, sinks)
    cases.assert_close(cases.stream_through(model, clip, chunks, window=window, sinks=sinks), expected)
    assert np.abs(expected.cls - offline.cls[:, :8]).max() > 0.1


def test_a_window_longer_than_the_stream_changes_nothing(model, frames, offline):
    streamed = cases.stream_through(model, frames[:, :5], [1] * 5, window=40, sinks=2)
    cases.assert_close(streamed, cases.rows(offline, np.s_[:, :5]))


# Causality.


@pytest.mark.parametrize("later", [np.nan, 100.0])
@pytest.mark.parametrize("last", [0, 10, 22])
def test_later_frames_change_no_bit_of_a_clip(last, later, model, frames, offline):
    changed = frames.copy()
    changed[:, last + 1 :] = later
    out = model.encode(changed)
    cases.assert_same_bits(cases.rows(out, np.s_[:, : last + 1]), cases.rows(offline, np.s_[:, : last + 1]))
    assert not np.array_equal(out.cls[:, last + 1], offline.cls[:, last + 1])


def test_later_frames_change_no_bit_of_a_chunk(model, frames):
    changed = frames.copy()
    changed[:, 11:] = np.nan
    before, after = (cases.stream_through(model, clip, [24]) for clip in (frames, changed))
    cases.assert_same_bits(cases.rows(after, np.s_[:, :11]), cases.rows(before, np.s_[:, :11]))
    assert np.isnan(after.cls[:, 11:]).all()


# Clocks.

WINDOWS = [{}, {"window": 4, "sinks": 1}]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("index", "restarted"),
    [(1, [1]), (np.int32(0), [0]), (np.array([0, 2]), [0, 2]), ([True, False, True], [0, 2]), ([], [])],
    ids=str,
)
def test_reset_restarts_the_named_streams_and_keeps_every_bit_of_the_others(index, restarted, options, model, frames):
    first, second = frames[:, :6], frames[:, 6:9]
    _, stream = cases.step_through(model, open_stream(model, **options), first, [1] * 6)
    stream = stream.reset(index)
    clock = [0 if b in restarted else 6 for b in range(BATCH)]
    assert stream.frame_index.tolist() == np.asarray(stream.state.frame_index).tolist() == clock
    out, stream = cases.step_through(model, stream, second, [1] * 3)
    assert np.asarray(stream.state.frame_index).tolist() == [time + 3 for time in clock]

    fresh = cases.stream_through(model, second, [1] * 3, **options)
    running = cases.rows(cases.stream_through(model, frames[:, :9], [1] * 9, **options), np.s_[:, 6:])
    others = [b for b in range(BATCH) if b not in restarted]
    cases.assert_same_bits(cases.rows(out, restarted), cases.rows(fresh, restarted))
    cases.assert_same_bits(cases.rows(out, others), cases.rows(running, others))
    assert not np.array_equal(fresh.cls, running.cls)


def test_the_oldest_stream_decides_when_the_cache_grows(model, frames, offline):
    """The first stream starts anew at frame 14; the others cross the first bucket without it."""
    _, stream = cases.step_through(model, open_stream(model), frames[:, :14], [1] * 14)
    out, stream = cases.step_through(model, stream.reset(0), frames[:, 14:20], [1] * 6)
    assert stream.frame_index.tolist() == [6, 20, 20]
    cases.assert_close(cases.rows(out, np.s_[1:]), cases.rows(offline, np.s_[1:, 14:20]))
    fresh = cases.stream_through(model, frames[:, 14:20], [1] * 6)
    cases.assert_close(cases.rows(out, np.s_[:1]), cases.rows(fresh, np.s_[:1]))


def test_a_stream_reset_by_a_jax_array(model):
    stream = open_stream(model)
    stream = dataclasses.replace(stream, frame_index=np.array([5, 5, 5]))
    assert stream.reset(jax.numpy.array([2])).frame_index.tolist() == [5, 5, 0]


@pytest.mark.parametrize("index", [3, -1, [0, 3], 1.0, [True, False], [[True, False, True]], "1"], ids=str)
def test_reset_refuses_what_names_no_stream(index, model):
    with pytest.raises(ValueError, match="reset: expected"):
        open_stream(model).reset(index)


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_a_nan_frame_stays_in_its_stream_until_that_is_reset(options, model, frames):
    broken = frames[:, :5].copy()
    broken[1, 1] = np.nan
    out, stream = cases.step_through(model, open_stream(model, **options), broken, [1] * 5)
    clean = cases.stream_through(model, frames[:, :5], [1] * 5, **options)
    cases.assert_same_bits(cases.rows(out, [0, 2]), cases.rows(clean, [0, 2]))
    assert np.isnan(out.cls[1, 1:]).all()
    out, _ = cases.step_through(model, stream.reset(1), frames[:, 5:8], [1] * 3)
    fresh = cases.stream_through(model, frames[:, 5:8], [1] * 3, **options)
    cases.assert_same_bits(cases.rows(out, [1]), cases.rows(fresh, [1]))
    assert np.isfinite(out.cls).all()


# Compilations and memory.


def small_stream(model, **options):
    """Of options that no other test uses: nothing is compiled for it yet."""
    return model.open_stream(1, 16, 16, layers=(), time_unit=15, **options)


def test_a_windowed_stream_compiles_once(model, caplog):
    stream = small_stream(model, window=5, sinks=2)
    clip = cases.random_frames(1, 40, 16, 16)
    _, compiled = cases.compilations(caplog, lambda: cases.step_through(model, stream, clip, [1] * 40))
    assert compiled == {"step_program": 1}


def test_an_unbounded_stream_compiles_once_per_capacity_bucket(model, caplog):
    stream = small_stream(model)
    first_bucket = stream.state.capacity
    clip = cases.random_frames(1, 100, 16, 16)
    _, compiled = cases.compilations(caplog, lambda: cases.step_through(model, stream, clip, [1] * 100))
    buckets = {bucket_capacity(frames) for frames in range(1, 101)}
    assert compiled == {"step_program": len(buckets)}
    assert len(buckets) <= 1 + math.log2(100 / first_bucket)


def test_buckets_hold_their_frames_and_at_least_double():
    buckets = sorted({bucket_capacity(frames) for frames in range(1, 2000)})
    assert all(bucket_capacity(frames) >= frames for frames in range(1, 2000))
    assert all(larger >= 2 * smaller for smaller, larger in itertools.pairwise(buckets))


def test_a_step_consumes_the_stream_it_was_given(model, frames):
    stream = open_stream(model)
    model.step(stream, frames[:, :1])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stream.state))
    with pytest.raises(ValueError, match="stream: a step has consumed it"):
        model.step(stream, frames[:, :1])
    with pytest.raises(ValueError, match="stream: a step has consumed it"):
        stream.reset(0)


def test_a_stream_keeps_its_own_copy_of_the_aspect_ratio(model):
    ratio = np.ones(64, np.float32)
    stream = model.open_stream(64, 16, 16, camera_token=True, aspect_ratio=ratio, window=1, sinks=0)
    ratio[:] = 3
    assert np.asarray(stream.state.aspect_ratio).max() == 1
