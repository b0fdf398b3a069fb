"""Label propagation against float64 NumPy written apart, and against the two original programs."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from omnistream_jax.evals.propagation import Propagation, advance, begin, first_labels, object_mask
from omnistream_jax.evals.region_boundary import mean_scores, score_sequence

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = Path(__file__).parent / "data" / "label_propagation.safetensors"
DINO = Propagation(
    context=7,
    radius=12,
    neighbourhood="square",
    top=5,
    temperature=0.1,
    upsampling="bilinear",
    flat_channel="wins",
)
DINOV3 = Propagation(
    context=7,
    radius=12,
    neighbourhood="circle",
    top=5,
    temperature=0.2,
    upsampling="nearest",
    flat_channel="loses",
)


def changed(settings, **fields):
    return Propagation(**{**vars(settings), **fields})


def propagated(settings, features, labels):
    """Labels [T - 1, h, w, C] of the frames after the first."""
    memory, rows = begin(settings, jnp.asarray(features[0]), labels), []
    for frame in features[1:]:
        out, memory = advance(settings, memory, jnp.asarray(frame))
        rows.append(np.asarray(out))
    return np.stack(rows)


def reference(settings, features, labels):
    """The protocol patch by patch, in float64."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    frames, height, width, _ = unit.shape
    known = [labels.astype(np.float64)]
    for t in range(1, frames):
        recent = range(max(1, t - settings.context), t)
        out = np.zeros_like(known[0])
        for y in range(height):
            for x in range(width):
                found = []
                for s in [0, *recent]:
                    for v in range(height):
                        for u in range(width):
                            far = max(abs(v - y), abs(u - x))
                            if settings.neighbourhood == "circle":
                                far = np.hypot(v - y, u - x)
                            if settings.radius and far > settings.radius:
                                continue
                            found.append((float(unit[t, y, x] @ unit[s, v, u]), known[s][v, u]))
                last = sorted((likeness for likeness, _ in found), reverse=True)[: settings.top][-1]
                kept = [
                    (np.exp(likeness / settings.temperature), label) for likeness, label in found if likeness >= last
                ]
                out[y, x] = sum(weight * label for weight, label in kept) / sum(weight for weight, _ in kept)
        known.append(out)
    return np.stack(known[1:])


def drifting(frames=6, height=5, width=4, dimension=6, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(height, width, dimension))
    noise = rng.normal(size=(frames, height, width, dimension))
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, size=(height, width))]
    return (base + 0.7 * noise).astype(np.float32), labels


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (DINO, {"radius": 2, "context": 2}),
        (DINO, {"radius": 1, "context": 7}),
        (DINO, {"radius": 12}),
        (DINOV3, {"radius": 2, "context": 3}),
        (DINOV3, {"radius": 0, "context": 1, "top": 3}),
        (DINOV3, {"radius": 1, "context": 0, "top": 1}),
    ],
)
def test_labels_equal_the_protocol_in_float64(settings, fields):
    features, labels = drifting(width=5)  # a square: its corners lie further apart than its sides are long
    settings = changed(settings, **fields)
    actual = propagated(settings, features, labels)
    np.testing.assert_allclose(actual, reference(settings, features, labels), atol=2e-5)
    np.testing.assert_allclose(actual.sum(-1), 1, atol=1e-5)


def test_patches_as_similar_as_the_last_of_the_top_count_too():
    """Features of three kinds: nearly all likenesses are equal, far more than five are the largest."""
    rng = np.random.default_rng(3)
    features = np.eye(3, dtype=np.float32)[rng.integers(0, 3, size=(5, 5, 4))]
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, size=(5, 4))]
    settings = changed(DINOV3, radius=3)
    np.testing.assert_allclose(propagated(settings, features, labels), reference(settings, features, labels), atol=1e-5)


def test_the_settings_matter():
    features, labels = drifting(frames=8)
    base = changed(DINO, radius=2, context=3)
    outcomes = [base, *(changed(base, **fields) for fields in ({"neighbourhood": "circle"}, {"temperature": 0.2}))]
    outcomes += [changed(base, **fields) for fields in ({"top": 4}, {"radius": 1}, {"context": 2})]
    last = [propagated(settings, features, labels)[-1] for settings in outcomes]
    for place, one in enumerate(last):
        assert all(np.abs(one - other).max() > 1e-3 for other in last[:place])


@pytest.mark.parametrize(("name", "settings"), [("dino", DINO), ("dinov3", DINOV3)])
def test_labels_and_masks_equal_the_original_program(name, settings):
    """More frames than the context holds; features that drift; an object that nearly vanishes."""
    golden = load_file(GOLDEN)
    features, labels = golden["features"], golden["first_labels"]
    soft = propagated(changed(settings, radius=3), features, labels)
    np.testing.assert_allclose(soft, golden[f"{name}/labels"], atol=2e-6)
    masks = np.stack([object_mask(settings, jnp.asarray(each), 8, (61, 83)) for each in soft])
    assert masks.dtype == np.uint8
    # Two ways to interpolate in float32 may differ where two labels are equal.
    different = masks != golden[f"{name}/masks"]
    assert different.mean() <= (1e-4 if name == "dino" else 0), different.sum()


def moving_objects(frames=10, height=12, width=16):
    """Two boxes that walk over a background: numbers [T, h, w]."""
    numbers = np.zeros((frames, height, width), np.uint8)
    for t in range(frames):
        numbers[t, 2:5, 1 + t : 4 + t] = 1
        numbers[t, 7:11, 13 - t : 16 - t] = 2
    return numbers


@pytest.mark.parametrize("settings", [DINO, DINOV3])
def test_perfect_features_propagate_perfectly_and_random_ones_do_not(settings):
    truth = moving_objects()
    patch, random = 4, np.random.default_rng(0).normal(size=(*truth.shape, 3)).astype(np.float32)
    pixels = truth.repeat(patch, 1).repeat(patch, 2)
    grid = truth.shape[1:]
    scores = {}
    for name, features in (("perfect", np.eye(3, dtype=np.float32)[truth]), ("random", random)):
        labels = first_labels(pixels[0], grid, 2)
        soft = propagated(settings, features, labels)
        masks = [pixels[0], *(object_mask(settings, jnp.asarray(each), patch, pixels.shape[1:]) for each in soft)]
        scores[name] = mean_scores([score_sequence(np.stack(masks), pixels)])
    assert scores["perfect"].both > (0.99 if settings.upsampling == "nearest" else 0.9)
    assert scores["random"].both < 0.4


def test_memory_holds_the_first_frame_and_the_last_ones():
    features, labels = drifting(frames=7)
    settings = changed(DINO, context=2)
    memory = begin(settings, jnp.asarray(features[0]), labels)
    outs = []
    for frame in features[1:]:
        out, memory = advance(settings, memory, jnp.asarray(frame))
        outs.append(np.asarray(out))
    held = {tuple(np.round(row, 4)) for row in np.moveaxis(np.asarray(memory.labels), 1, 0).reshape(3, -1)}
    expected = [labels, outs[-1], outs[-2]]
    assert held == {tuple(np.round(np.asarray(row, np.float32), 4)) for row in (each.reshape(-1) for each in expected)}


# Masks


def bilinear(labels, patch):
    """Half-pixel centres, clamped at the edges, in float64."""
    for axis in (0, 1):
        count = labels.shape[axis]
        place = np.clip((np.arange(count * patch) + 0.5) / patch - 0.5, 0, count - 1)
        low = np.floor(place).astype(int)
        high, share = np.minimum(low + 1, count - 1), place - low
        share = share.reshape([-1 if each == axis else 1 for each in range(3)])
        labels = (1 - share) * labels.take(low, axis) + share * labels.take(high, axis)
    return labels


def stretched(labels):
    low, high = labels.min((0, 1)), labels.max((0, 1))
    return (labels - low) / np.where(high > 0, high - low, 1)


@pytest.mark.parametrize("name", ["dino", "dinov3"])
def test_masks_follow_the_protocol(name):
    labels = np.random.default_rng(2).dirichlet([1, 0.3, 0.1], size=(6, 9)).astype(np.float32)
    size = (100, 151)
    if name == "dino":
        small = stretched(bilinear(labels.astype(np.float64), 16)).argmax(-1)
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, small.shape, strict=True))
    else:
        small = stretched(labels.astype(np.float64)).argmax(-1)
        rows, columns = ((np.arange(n) * m / n).astype(int) for n, m in zip(size, small.shape, strict=True))
    actual = object_mask(DINO if name == "dino" else DINOV3, jnp.asarray(labels), 16, size)
    assert (actual != small[rows][:, columns]).mean() <= 1e-3  # float32 where two labels are equal


@pytest.mark.parametrize("settings", [DINO, DINOV3])
def test_a_weak_label_shows_where_it_is_strongest(settings):
    """Every label is stretched to 0 to 1 over the frame before they are compared."""
    labels = np.zeros((4, 6, 2), np.float32)
    labels[..., 0], labels[1, 2] = 1, (0.7, 0.3)
    mask = object_mask(settings, jnp.asarray(labels), 8, (32, 48))
    assert mask[12, 20] == 1
    assert 0 < (mask == 1).sum() <= 64


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_labels_that_are_the_same_everywhere(upsampling):
    """A label that never is stays away; one that is 1 everywhere wins or loses as each program has it."""
    labels = np.zeros((2, 4, 3), np.float32)
    labels[..., 1] = 1
    wins = changed(DINO, upsampling=upsampling)
    assert (object_mask(wins, jnp.asarray(labels), 4, (9, 16)) == 1).all()
    assert (object_mask(changed(wins, flat_channel="loses"), jnp.asarray(labels), 4, (9, 16)) == 0).all()
    gone = np.zeros((2, 4, 3), np.float32)
    gone[..., 0], gone[:, 2:, 0], gone[:, 2:, 1] = 1, 0.4, 0.6
    for flat in ("wins", "loses"):
        mask = object_mask(changed(wins, flat_channel=flat), jnp.asarray(gone), 4, (9, 16))
        assert set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((480, 854), (30, 52)),
        ((480, 854), (30, 54)),
        ((480, 910), (30, 57)),
        ((480, 1152), (60, 144)),
        ((96, 96), (12, 12)),
    ],
)
def test_first_labels_are_those_at_the_patches_centres(size, grid):
    mask = np.random.default_rng(0).integers(0, 4, size=size).astype(np.uint8)
    mask[:20] = 255
    # PyTorch's "nearest-exact", and Pillow's NEAREST
    rows, columns = (
        np.floor((np.arange(small, dtype=np.float32) + 0.5) * np.float32(large / small)).astype(int)
        for small, large in zip(grid, size, strict=True)
    )
    expected = mask[rows][:, columns]
    actual = first_labels(mask, grid, 3)
    assert actual.shape == (*grid, 4)
    assert (actual.sum(-1) == 1).all()
    np.testing.assert_array_equal(actual.argmax(-1), np.where(expected == 255, 0, expected))


def test_a_wide_frame_needs_little_memory():
    """At 480p with the paper's sizes: far below the likenesses of all pairs, 84 MB."""
    shape = jax.ShapeDtypeStruct((30, 54, 64), jnp.float32)
    memory = jax.eval_shape(functools.partial(begin, DINOV3), shape, jax.ShapeDtypeStruct((30, 54, 3), jnp.float32))
    compiled = advance.lower(DINOV3, memory, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 30e6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": -1}, "context: expected 0 or more, got -1"),
        ({"radius": -1}, "radius: expected 0 or more, got -1"),
        ({"top": 0}, "top: expected 1 or more, got 0"),
        ({"temperature": 0.0}, r"temperature: expected a positive number, got 0\.0"),
        ({"neighbourhood": "disk"}, "neighbourhood: expected one of square, circle, got 'disk'"),
        ({"upsampling": "cubic"}, "upsampling: expected one of bilinear, nearest, got 'cubic'"),
        ({"flat_channel": "nan"}, "flat_channel: expected one of wins, loses, got 'nan'"),
    ],
)
def test_a_setting_that_cannot_work_is_one_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(DINO, **fields)
