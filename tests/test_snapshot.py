"""A stream taken out of its batch, put into another place, saved and read back."""

import dataclasses
import json

import backbone_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from omnistream_jax.model import build_model
from omnistream_jax.ops.cache import CACHE_DTYPES
from omnistream_jax.snapshot import Snapshot, put, take, weights_fingerprint
from omnistream_jax.utils.trees import named_leaves

BATCH, SIZE = 3, 32
KINDS = [{}, {"window": 4, "sinks": 1}]


@pytest.fixture(scope="module")
def model():
    return cases.random_model()


@pytest.fixture(scope="module")
def weights(model):
    return weights_fingerprint(model)


@pytest.fixture(scope="module")
def frames():
    return cases.random_frames(BATCH, 12, SIZE, SIZE)


def open_stream(model, **options):
    return model.open_stream(BATCH, SIZE, SIZE, **options)


def opened(model, frames, count, **options):
    """Streams that stand after `count` frames."""
    return cases.step_through(model, open_stream(model, **options), frames[:, :count], [1] * count)[1]


def assert_same_snapshot(left, right):
    for field in ("options", "weights", "frame_index", "aspect_ratio"):
        assert getattr(left, field) == getattr(right, field)
    leaves = [named_leaves(snapshot.cache) for snapshot in (left, right)]
    assert list(leaves[0]) == list(leaves[1])
    for name, leaf in leaves[0].items():
        assert (leaf.dtype, leaf.shape) == (leaves[1][name].dtype, leaves[1][name].shape)
        assert leaf.tobytes() == leaves[1][name].tobytes()


@pytest.fixture
def saved(model, weights, frames, tmp_path):
    path = tmp_path / "stream.safetensors"
    take(opened(model, frames, 3), 0, weights).save(path)
    return path


# Going on.


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_saved_stream_goes_on_bit_for_bit_in_another_place(
    cache_dtype, options, count, model, weights, frames, tmp_path
):
    """Three frames fill a part of the window's ring, seven turn it."""
    options = {**options, "cache_dtype": cache_dtype}
    stream = opened(model, frames, count, **options)
    taken = take(stream, 1, weights)
    taken.save(tmp_path / "stream.safetensors")
    expected, _ = cases.step_through(model, stream, frames[:, count : count + 4], [1] * 4)

    loaded = Snapshot.load(tmp_path / "stream.safetensors")
    assert_same_snapshot(loaded, taken)
    others = opened(model, frames + 1, 5, **options)
    clip = np.roll(frames, 1, axis=0)[:, count : count + 4]  # stream 1's frames in place 2
    out, after = cases.step_through(model, put(others, 2, loaded, weights), clip, [1] * 4)
    cases.assert_same_bits(cases.rows(out, [2]), cases.rows(expected, [1]))
    assert after.frame_index.tolist() == np.asarray(after.state.frame_index).tolist() == [9, 9, count + 4]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_other_streams_keep_every_bit(options, model, weights, frames):
    clip = frames[:, 5:8]
    taken = take(opened(model, frames, 7, **options), 1, weights)
    expected, _ = cases.step_through(model, opened(model, frames, 5, **options), clip, [1] * 3)
    out, _ = cases.step_through(model, put(opened(model, frames, 5, **options), 2, taken, weights), clip, [1] * 3)
    cases.assert_same_bits(cases.rows(out, [0, 1]), cases.rows(expected, [0, 1]))
    assert not np.array_equal(out.cls[2], expected.cls[2])


def test_what_is_taken_holds_only_the_frames_that_exist(model, weights, frames):
    for options, count, held in (({}, 3, 3), ({"window": 6}, 3, 3), ({"window": 6}, 9, 6), ({}, 0, 0)):
        stream = opened(model, frames, count, **options) if count else open_stream(model, **options)
        taken = take(stream, 0, weights)
        assert taken.frame_index == count
        assert {leaf.shape[0] for leaf in jax.tree.leaves(taken.cache)} == {held}


def test_a_stream_without_frames_is_saved_too(model, weights, frames, tmp_path):
    take(open_stream(model), 0, weights).save(tmp_path / "empty")
    stream = put(opened(model, frames, 2), 1, Snapshot.load(tmp_path / "empty"), weights)
    assert stream.frame_index.tolist() == [2, 0, 2]
    out, _ = cases.step_through(model, stream, frames[:, :2], [1] * 2)
    fresh = cases.stream_through(model, frames[:, :2], [1] * 2)
    cases.assert_same_bits(cases.rows(out, [1]), cases.rows(fresh, [1]))


def test_a_long_stream_makes_a_young_batch_grow(model, weights):
    clip = cases.random_frames(BATCH, 24, SIZE, SIZE, seed=3)
    taken = take(opened(model, clip, 20), 1, weights)
    young = opened(model, clip, 2)
    small = young.state.capacity
    stream = put(young, 1, taken, weights)
    assert small < 20 <= stream.state.capacity
    out, _ = cases.step_through(model, stream, clip[:, 20:], [1] * 4)
    whole = model.encode(clip)
    cases.assert_close(cases.rows(out, np.s_[1:2]), cases.rows(whole, np.s_[1:2, 20:]))


def test_the_aspect_ratio_travels(model, weights, frames, tmp_path):
    options = {"camera_token": True, "aspect_ratio": np.array([0.3, 1.0, 2.0], np.float32)}
    stream = opened(model, frames, 2, **options)
    take(stream, 0, weights).save(tmp_path / "stream")
    expected, _ = cases.step_through(model, stream, frames[:, 2:4], [1] * 2)
    other = put(open_stream(model, **options), 1, Snapshot.load(tmp_path / "stream"), weights)
    assert np.asarray(other.state.aspect_ratio).tolist() == [np.float32(0.3), np.float32(0.3), 2]
    out, _ = cases.step_through(model, other, np.roll(frames, 1, axis=0)[:, 2:4], [1] * 2)
    cases.assert_same_bits(cases.rows(out, [1]), cases.rows(expected, [0]))


def test_taking_consumes_nothing_and_putting_does(model, weights, frames):
    stream = opened(model, frames, 2)
    taken = take(stream, 0, weights)
    before = [leaf.tobytes() for leaf in jax.tree.leaves(taken.cache)]
    after = put(stream, 1, taken, weights)
    with pytest.raises(ValueError, match="consumed"):
        take(stream, 0, weights)
    with pytest.raises(ValueError, match="consumed"):
        put(stream, 0, taken, weights)
    model.step(after, frames[:, :1])
    assert [leaf.tobytes() for leaf in jax.tree.leaves(taken.cache)] == before


# What does not fit.


@pytest.mark.parametrize(
    ("field", "options", "changes"),
    [
        ("height", {"height": 48}, {}),
        ("width", {"width": 48}, {}),
        ("window", {"window": 4}, {}),
        ("window", {"window": 5}, {"window": 4}),
        ("sinks", {"window": 4, "sinks": 2}, {"window": 4}),
        ("camera_token", {"camera_token": True}, {}),
        ("time_unit", {"time_unit": 8}, {}),
        ("cache_dtype", {"cache_dtype": "int8"}, {}),
        ("aspect_ratio", {"camera_token": True, "aspect_ratio": [1.0] * 3}, {"camera_token": True}),
    ],
)
def test_a_stream_of_another_kind_is_refused(field, options, changes, model, weights, frames):
    taken = take(open_stream(model, **changes), 0, weights)
    stream = model.open_stream(BATCH, **{"height": SIZE, "width": SIZE, **options})
    with pytest.raises(ValueError, match=f"snapshot: {field}: expected"):
        put(stream, 0, taken, weights)
    stream.check_alive()


@pytest.mark.parametrize(
    ("field", "changes"),
    [("depth", {"depth": 1}), ("heads", {"heads": 4}), ("tokens", {"registers": 2}), ("head_width", {"width": 16})],
)
def test_a_model_of_another_shape_is_refused(field, changes, model, weights):
    taken = take(open_stream(model), 0, weights)
    with pytest.raises(ValueError, match=f"snapshot: {field}: expected"):
        put(open_stream(cases.random_model(**changes)), 0, taken, weights)


def test_layers_may_differ_and_sinks_mean_nothing_without_a_window(model, weights, frames):
    taken = take(opened(model, frames, 2, layers=(0,), sinks=3), 0, weights)
    assert put(open_stream(model, layers=(1,)), 0, taken, weights).frame_index.tolist() == [2, 0, 0]


def test_other_weights_are_refused(model, weights):
    taken = take(open_stream(model), 0, weights)
    for other in (cases.random_model(seed=1), cases.random_model(rope="released")):
        with pytest.raises(ValueError, match=r"snapshot: weights: .* other weights"):
            put(open_stream(other), 0, taken, weights_fingerprint(other))


def test_the_fingerprint_sees_one_bit_and_no_way_of_holding_the_same_weights(model, weights, tmp_path):
    assert weights_fingerprint(dataclasses.replace(model, params=jax.tree.map(np.array, model.params))) == weights
    assert weights_fingerprint(build_model(model.config, model.params, dtype=jnp.bfloat16)) == weights
    bias = np.array(model.params["patch_bias"])
    bias[3] = np.nextafter(bias[3], np.inf)
    assert weights_fingerprint(dataclasses.replace(model, params={**model.params, "patch_bias": bias})) != weights


@pytest.mark.parametrize("index", [3, -1, 0.0, True, "0", [0]], ids=str)
def test_an_index_that_names_no_stream_is_refused(index, model, weights):
    stream = open_stream(model)
    with pytest.raises(ValueError, match="index: expected a stream from 0 to 2"):
        take(stream, index, weights)
    with pytest.raises(ValueError, match="index: expected a stream from 0 to 2"):
        put(stream, index, take(stream, 0, weights), weights)


# Files.


def test_saving_leaves_one_file_and_replaces_an_older_one(saved, model, weights, frames):
    first = saved.read_bytes()
    take(opened(model, frames, 2), 0, weights).save(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() != first
    assert Snapshot.load(saved).frame_index == 2


def test_a_save_that_fails_leaves_the_older_file(saved, model, weights, frames, monkeypatch):
    first = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("omnistream_jax.utils.tensor_file.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        take(opened(model, frames, 2), 0, weights).save(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == first


def test_a_file_that_is_cut_off_foreign_or_missing_is_named(saved, tmp_path):
    whole = saved.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"stream\.safetensors: not the whole of a stream"):
            Snapshot.load(saved)
    save_file({"a": np.zeros(3)}, saved)
    with pytest.raises(ValueError, match=r"stream\.safetensors: not .* no entry of omnistream_jax"):
        Snapshot.load(saved)
    saved.write_bytes(b"\x80\x04 no such format" * 9)
    with pytest.raises(ValueError, match=r"stream\.safetensors: not the whole"):
        Snapshot.load(saved)
    with pytest.raises(ValueError, match="missing: no such file"):
        Snapshot.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="not the whole"):
        Snapshot.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: expected 1, got 2"),
        ({"frame_index": 4}, r"expected float32\[4,9,2,16\], got float32\[3,9,2,16\]"),
        ({"frame_index": -1}, "frame_index: expected a whole number, got -1"),
        ({"frame_index": "3"}, "frame_index: expected"),
        ({"options.cache_dtype": "float64"}, "cache_dtype: expected one of"),
        ({"options.cache_dtype": "bfloat16"}, r"expected bfloat16\[3,9,2,16\]"),
        ({"options.cache_dtype": "int8"}, "missing tensors .*key_scale"),
        ({"options.novelty": 1}, "novelty"),
        ({"options": None}, "not the whole"),
        ({"sizes.depth": 1}, "unexpected .'1/key', '1/value'"),
        ({"sizes.heads": 0}, "heads: expected"),
        ({"aspect_ratio": "wide"}, "aspect_ratio: expected"),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_tensors_is_refused(change, message, saved):
    with safe_open(saved, framework="np") as file:
        ((key, text),) = file.metadata().items()
    header = json.loads(text)
    ((path, value),) = change.items()
    *parents, last = path.split(".")
    node = header
    for parent in parents:
        node = node[parent]
    node[last] = value
    save_file(load_file(saved), saved, metadata={key: json.dumps(header)})
    with pytest.raises(ValueError, match=message) as caught:
        Snapshot.load(saved)
    assert str(caught.value).startswith(str(saved))


def test_a_header_that_lacks_a_field_is_refused(saved):
    save_file(load_file(saved), saved, metadata={"omnistream_jax.stream": '{"version": 1}'})
    with pytest.raises(ValueError, match=r"stream\.safetensors: .*its header lacks 'sizes'|lacks 'options'"):
        Snapshot.load(saved)
