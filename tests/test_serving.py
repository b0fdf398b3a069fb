"""Many streams in the slots of one batch: each is as if it were alone, and their coming and going compiles nothing."""

import backbone_cases as cases
import jax
import numpy as np
import pytest

from omnistream_jax.serving import StreamPool
from omnistream_jax.snapshot import Snapshot

SIZE, LONGEST = 32, 24
KINDS = [{}, {"window": 4, "sinks": 1}]


@pytest.fixture(scope="module")
def model():
    return cases.random_model()


@pytest.fixture(scope="module")
def frames():
    return cases.random_frames(6, 16, SIZE, SIZE)


def open_pool(model, slots=4, **options):
    return StreamPool(model, slots, SIZE, SIZE, **options)


def offline(model, clips, options):
    """Features of clips [N, T, H, W, 3] in one pass."""

    @jax.jit
    def windowed(clips):
        return model.backbone.apply({"params": model.params}, clips, layers=None, **options)

    return windowed(clips) if options else model.encode(clips)


class Recorder:
    """What each stream was fed and gave, beside the pool."""

    def __init__(self, pool):
        self.pool = pool
        self.running = {}  # name -> (frames, outputs)
        self.finished = []

    def finish(self, name):
        self.finished.append(self.running.pop(name))

    def fork(self, name):
        clips, outputs = self.running[name]
        self.running[self.pool.fork(name)] = (list(clips), list(outputs))

    def step(self, clips):
        for name, out in self.pool.step(clips).items():
            self.running[name][0].append(clips[name])
            self.running[name][1].append(jax.tree.map(np.asarray, out))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_streams_that_come_and_go_equal_their_own_clips(options, model):
    """Sixty random events in four slots; every stream's features against one pass over its own frames."""
    generator = np.random.default_rng(6)
    pool = open_pool(model, **options)
    record = Recorder(pool)
    events = dict.fromkeys(["start", "end", "reset", "fork", "pause"], 0)
    for _ in range(60):
        names = list(pool.names)
        if pool.free and generator.random() < 0.6:
            event = "fork" if names and generator.random() < 0.4 else "start"
            if event == "fork":
                record.fork(names[generator.integers(len(names))])
            else:
                record.running[pool.start()] = ([], [])
            events[event] += 1
        for name in names:
            if generator.random() < 0.06 or sum(map(len, record.running[name][0])) > LONGEST - 2:
                record.finish(name)
                if generator.random() < 0.5:
                    pool.end(name)
                    events["end"] += 1
                else:
                    pool.reset(name)
                    record.running[name] = ([], [])
                    events["reset"] += 1
        count = int(generator.integers(1, 3))
        chosen = [name for name in pool.names if generator.random() < 0.7]
        events["pause"] += len(pool.names) - len(chosen)
        record.step({name: generator.normal(size=(count, SIZE, SIZE, 3)).astype(np.float32) for name in chosen})
    assert min(events.values()) >= 3, events

    histories = [history for history in [*record.finished, *record.running.values()] if history[0]]
    lengths = [sum(map(len, clips)) for clips, _ in histories]
    assert len(histories) > 8
    assert max(lengths) > 16  # beyond the first capacity, and through the ring several times
    padded = np.zeros((len(histories), LONGEST, SIZE, SIZE, 3), np.float32)  # frames after a stream's last are unseen
    for row, (clips, _) in zip(padded, histories, strict=True):
        joined = np.concatenate(clips)
        row[: len(joined)] = joined
    expected = offline(model, padded, options)
    for i, (length, (_, outputs)) in enumerate(zip(lengths, histories, strict=True)):
        streamed = jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)
        wanted = cases.rows(expected, np.s_[i, :length])
        for left, right in zip(jax.tree.leaves(streamed), jax.tree.leaves(wanted), strict=True):
            assert np.abs(left - right).max() <= 1e-4 * np.abs(right).max()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_streams_that_come_and_go_compile_nothing(options, model, frames, caplog):
    pool = open_pool(model, slots=16, layers=(), **options)

    def warm_up():
        first = pool.start()
        pool.step({first: frames[0, :1]})
        pool.end(pool.fork(first))
        pool.reset(first)
        pool.end(pool.start(snapshot=pool.snapshot(first)))
        pool.end(first)

    def come_and_go():
        saved = []
        for i in range(16):
            pool.start(f"camera {i}")
            pool.step({name: frames[0, :1] for j, name in enumerate(pool.names) if (i + j) % 3})
        for i in range(16):
            saved.append(pool.snapshot(f"camera {i}"))
            pool.end(f"camera {i}")
            pool.step(dict.fromkeys(pool.names[::2], frames[0, :1]))
        for i in range(8):
            pool.fork(pool.start(snapshot=saved[i]))
            pool.reset(pool.names[i])
        pool.step(dict.fromkeys(pool.names, frames[0, :1]))

    _, compiled = cases.compilations(caplog, warm_up)
    assert compiled["step_program"] == 1
    _, compiled = cases.compilations(caplog, come_and_go)
    assert compiled == {}


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_fork_and_a_saved_stream_go_on_bit_for_bit(cache_dtype, options, model, frames, tmp_path):
    options = {**options, "cache_dtype": cache_dtype}
    pool, other = open_pool(model, **options), open_pool(model, **options)
    for name in ("first", "second"):
        pool.start(name)
    for t in range(6):
        pool.step({"first": frames[0, t : t + 1], "second": frames[1, t : t + 1]})
    assert pool.fork("second", "third") == "third"
    pool.snapshot("second").save(tmp_path / "second")
    for name in ("occupied", "busy", "late"):
        other.start(name)
    other.end("busy")
    other.start("fourth", snapshot=Snapshot.load(tmp_path / "second"))
    assert other.slot("fourth") == 1

    for t in range(6, 9):
        out = pool.step(dict.fromkeys(("second", "third"), frames[1, t : t + 1]))
        restored = other.step({"fourth": frames[1, t : t + 1], "late": frames[2, t : t + 1]})
        cases.assert_same_bits(out["third"], out["second"])
        cases.assert_same_bits(restored["fourth"], out["second"])
    # From here on the two lead lives of their own.
    out = pool.step({"second": frames[1, 9:10], "third": frames[2, 9:10]})
    assert not np.array_equal(out["second"].cls, out["third"].cls)
    restored = other.step({"fourth": frames[2, 9:10]})
    cases.assert_same_bits(restored["fourth"], out["third"])


def test_outputs_have_no_axis_of_streams(model, frames):
    pool = open_pool(model, camera_token=True, layers=(1,))
    pool.start("a")
    out = pool.step({"a": frames[0, :3]})["a"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, (out.patches, out.cls, out.registers, out.camera, out.hidden))
    assert shapes == ((3, 2, 2, 32), (3, 32), (3, 4, 32), (3, 32), ((3, 10, 32),))


def test_uint8_frames_are_served(model):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, SIZE, SIZE, 3), np.uint8)
    pool = open_pool(model)
    pool.start("a")
    cases.assert_close(pool.step({"a": pixels[0]})["a"], cases.rows(model.encode(pixels), 0))


def test_each_stream_has_its_aspect_ratio(model, frames):
    pool = open_pool(model, camera_token=True, aspect_ratio=1.0)
    ratios = {"wide": 0.5, "square": 1.0, "tall": 2.0}
    pool.start("square")
    pool.start("gone", aspect_ratio=9.0)
    pool.end("gone")
    pool.start("wide", aspect_ratio=0.5)
    pool.start("tall", aspect_ratio=2.0)
    pool.step(dict.fromkeys(ratios, frames[0, 5:6]))
    for name in ratios:
        pool.reset(name)
    ratios["forked"], _ = 2.0, pool.fork("tall", "forked")
    out = pool.step(dict.fromkeys(ratios, frames[0, :2]))
    for name, ratio in ratios.items():
        alone = model.encode(frames[:1, :2], camera_token=True, aspect_ratio=[ratio])
        cases.assert_close(out[name], cases.rows(alone, 0))


# Slots.


def test_names_and_free_slots(model):
    pool = open_pool(model, slots=3)
    assert (pool.names, pool.free) == ((), 3)
    made = pool.start()
    pool.start("b")
    assert pool.fork("b") not in (made, "b")
    assert pool.free == 0
    assert pool.names[:2] == (made, "b")
    for start in (pool.start, lambda: pool.fork("b")):
        with pytest.raises(ValueError, match="the pool is full: all its 3 slots"):
            start()
    pool.end(made)
    assert pool.start("c") == "c"
    assert pool.names[0] == "b"


def test_a_name_that_was_given_is_not_made_again(model):
    pool = open_pool(model)
    pool.start("stream-0")
    assert pool.start() != "stream-0"


def test_an_ended_stream_leaves_nothing_to_the_next_one(model, frames):
    """Not even NaN, which would pass through the zero weights of hidden frames."""
    pool = open_pool(model, slots=1)
    pool.start("broken")
    pool.step({"broken": np.full((3, SIZE, SIZE, 3), np.nan, np.float32)})
    pool.end("broken")
    pool.start("next")
    cases.assert_close(pool.step({"next": frames[0, :2]})["next"], cases.rows(model.encode(frames[:1, :2]), 0))


def test_an_ended_stream_makes_the_capacity_grow_no_further(model, frames):
    pool = open_pool(model, slots=2)
    pool.start("long")
    pool.start("short")
    pool.step({"long": frames[0, :15], "short": frames[0, :15]})
    pool.reset("short")
    pool.end("long")
    capacity = pool.stream.state.capacity
    pool.step({"short": frames[1, :3]})
    assert pool.stream.state.capacity == capacity == 16
    assert pool.stream.frame_index.tolist() == np.asarray(pool.stream.state.frame_index).tolist() == [0, 3]


# Errors.


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, SIZE, SIZE), np.float32), "'b': expected frames .n, 32, 32, 3., got .1, 32, 32."),
        (np.zeros((1, SIZE, 48, 3), np.float32), "'b': expected frames"),
        (np.zeros((0, SIZE, SIZE, 3), np.float32), "'b': expected frames"),
        (np.zeros((2, SIZE, SIZE, 3), np.float32), "'b': expected 1 frames of float32 as of 'a', got 2 of float32"),
        (np.zeros((1, SIZE, SIZE, 3), np.uint8), "'b': expected 1 frames of float32 as of 'a', got 1 of uint8"),
        (np.zeros((1, SIZE, SIZE, 3), np.int32), "'b': expected frames of uint8 or normalised floats, got int32"),
        (np.full((1, SIZE, SIZE, 3), np.nan, np.float32), "'b': some of its frames are not finite"),
        (None, "'b': expected frames"),
    ],
    ids=range(8),
)
def test_bad_frames_name_their_stream_and_move_none(bad, message, model, frames):
    pool = open_pool(model)
    for name in ("a", "b"):
        pool.start(name)
    pool.step({"a": frames[0, :1], "b": frames[1, :1]})
    with pytest.raises(ValueError, match=message):
        pool.step({"a": frames[0, 1:2], "b": bad}, check=True)
    out = pool.step({"a": frames[0, 1:2], "b": frames[1, 1:2]})
    whole = model.encode(frames[:2, :2])
    for i, name in enumerate("ab"):
        cases.assert_close(out[name], cases.rows(whole, np.s_[i, 1:]))


def test_a_step_without_frames_does_nothing(model):
    pool = open_pool(model)
    stream = pool.stream
    assert pool.step({}) == {}
    assert pool.stream is stream


def test_bad_requests_leave_the_pool_as_it_was(model, frames):
    pool = open_pool(model, slots=2)
    pool.start("a")
    other = StreamPool(model, 2, 48, SIZE)
    snapshot = other.snapshot(other.start())
    foreign = open_pool(cases.random_model(seed=1))
    for request, message in [
        (lambda: pool.start("a"), "'a': the pool has a stream of that name"),
        (lambda: pool.start(7), "name: expected text, got 7"),
        (lambda: pool.start(""), "name: expected text"),
        (lambda: pool.start("b", aspect_ratio=1.0), "aspect_ratio: only streams of a pool that was made with one"),
        (lambda: pool.start("b", snapshot=snapshot), "snapshot: height: expected 32"),
        (lambda: pool.start("b", snapshot=foreign.snapshot(foreign.start())), "snapshot: weights"),
        (lambda: pool.start("b", snapshot=pool.snapshot("a"), aspect_ratio=1.0), "a snapshot has its own"),
        (lambda: pool.fork("a", "a"), "'a': the pool has a stream of that name"),
        (lambda: pool.fork("b"), "'b': no such stream; the pool has 'a'"),
        (lambda: pool.end("b"), "'b': no such stream"),
        (lambda: pool.reset("b"), "'b': no such stream"),
        (lambda: pool.snapshot("b"), "'b': no such stream"),
        (lambda: pool.step({"b": frames[0, :1]}), "'b': no such stream"),
    ]:
        with pytest.raises(ValueError, match=message):
            request()
    assert (pool.names, pool.free) == (("a",), 1)
    pool.step({"a": frames[0, :1]})


@pytest.mark.parametrize("slots", [0, -1, 2.0, True, None], ids=str)
def test_a_pool_without_slots_is_refused(slots, model):
    with pytest.raises(ValueError, match="slots: expected a whole number"):
        open_pool(model, slots=slots)


@pytest.mark.parametrize("ratio", [0.0, -1.0, np.nan, "wide", [1.0]], ids=str)
def test_a_bad_aspect_ratio_is_refused(ratio, model):
    pool = open_pool(model, camera_token=True, aspect_ratio=1.0)
    with pytest.raises(ValueError, match="aspect_ratio: expected a positive"):
        pool.start(aspect_ratio=ratio)
    assert pool.free == 4
