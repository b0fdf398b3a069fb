"""What `encode`, `open_stream`, `step` and `load` accept, refuse and return."""

import inspect

import backbone_cases as cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omnistream_jax
from omnistream_jax.model import Model, build_model
from omnistream_jax.models.presets import PRESETS, BackboneConfig
from omnistream_jax.stream import Stream

CLIP = np.zeros((2, 3, 32, 16, 3), np.float32)


@pytest.fixture(scope="module")
def model():
    return cases.random_model()


@pytest.fixture(scope="module")
def model_without_camera():
    return cases.random_model(camera=False)


# The public interface. `time_unit=None` stands for the model's own, which is 16 unless config.json says
# otherwise; height and width have defaults because `batch` before them has one; `check` asks for finite frames.


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        (omnistream_jax.load, {"path": ..., "rope": None, "dtype": None}, {}),
        (
            Model.encode,
            {"frames": ...},
            {"layers": None, "camera_token": False, "aspect_ratio": None, "time_unit": None, "check": False},
        ),
        (
            Model.open_stream,
            {"batch": 1, "height": 224, "width": 224},
            {
                "window": None,
                "sinks": 1,
                "layers": None,
                "camera_token": False,
                "aspect_ratio": None,
                "time_unit": None,
                "cache_dtype": None,
            },
        ),
        (Model.step, {"stream": ..., "frames": ...}, {"active": None, "check": False}),
        (Model.save, {"directory": ...}, {}),
        (Stream.reset, {"index": ...}, {}),
    ],
)
def test_signatures_are_the_public_interface(function, positional, keywords):
    parameters = list(inspect.signature(function).parameters.values())
    parameters = [parameter for parameter in parameters if parameter.name != "self"]
    found = {
        kind: {p.name: ... if p.default is p.empty else p.default for p in parameters if p.kind is kind}
        for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    assert list(found.values()) == [positional, keywords]
    assert [list(group) for group in found.values()] == [list(positional), list(keywords)]


def test_time_unit_is_sixteen_unless_the_model_says_otherwise():
    assert {config.time_unit for config in PRESETS.values()} == {16.0}
    assert BackboneConfig(width=32, depth=1, heads=2, mlp_width=64).time_unit == 16.0


def test_a_model_has_its_public_attributes(model):
    assert isinstance(model.config, BackboneConfig)
    assert isinstance(model.backbone, nn.Module)
    assert set(model.params) > {"blocks", "cls_token"}


# What comes out.


def test_outputs_have_the_promised_shapes_and_nothing_else(model):
    out = model.encode(CLIP, layers=[1, 0], camera_token=True)
    assert out.patches.shape == (2, 3, 2, 1, 32)
    assert out.cls.shape == out.camera.shape == (2, 3, 32)
    assert out.registers.shape == (2, 3, 4, 32)
    assert [hidden.shape for hidden in out.hidden] == [(2, 3, 1 + 1 + 4 + 2, 32)] * 2
    leaves = jax.tree.leaves(out)
    assert len(leaves) == 6
    assert all(isinstance(leaf, jax.Array) and leaf.shape[:2] == (2, 3) for leaf in leaves)


def test_layers_choose_and_order_the_blocks(model):
    clip = cases.random_frames(1, 1, 16, 32)
    every, reverse, first = (model.encode(clip, layers=layers) for layers in (None, [1, 0], np.array([0])))
    assert len(every.hidden) == 2
    assert not np.allclose(every.hidden[0], every.hidden[1])
    cases.assert_close(reverse.hidden, every.hidden[::-1], 1e-5)
    cases.assert_close(first.hidden, every.hidden[:1], 1e-5)
    cases.assert_close(first.cls, every.cls, 1e-5)
    streamed, _ = model.step(model.open_stream(1, 16, 32, layers=[1, 0]), clip)
    cases.assert_close(streamed.hidden, every.hidden[::-1], 1e-5)


def test_without_layers_and_camera_token_a_step_returns_three_arrays(model):
    out, _ = model.step(model.open_stream(2, 32, 16, layers=()), CLIP)
    assert out.camera is None
    assert out.hidden == ()
    leaves = jax.tree.leaves(out)
    assert len(leaves) == 3
    assert all(isinstance(leaf, jax.Array) and leaf.shape[:2] == (2, 3) for leaf in leaves)


def test_the_tokens_of_hidden_stand_in_the_documented_order(model):
    """The last block's tokens through the final norm are the named outputs."""
    out = model.encode(cases.random_frames(1, 2, 32, 16), layers=(1,), camera_token=True)
    tokens = np.asarray(out.hidden[0], np.float64)
    tokens -= tokens.mean(-1, keepdims=True)
    tokens /= np.sqrt(np.square(tokens).mean(-1, keepdims=True) + model.config.norm_epsilon)
    tokens = tokens * np.asarray(model.params["norm"]["scale"]) + np.asarray(model.params["norm"]["bias"])
    named = [out.cls[:, :, None], out.camera[:, :, None], out.registers, out.patches.reshape(1, 2, -1, 32)]
    cases.assert_close(np.concatenate(named, 2), tokens, 1e-5)


def test_uint8_frames_are_normalised_by_the_imagenet_statistics(model):
    pixels = np.random.default_rng(3).integers(0, 256, (1, 2, 16, 16, 3), np.uint8)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    floats = ((pixels / 255 - mean) / deviation).astype(np.float32)
    expected = model.encode(floats)
    cases.assert_close(model.encode(pixels), expected, 1e-4)
    cases.assert_close(model.step(model.open_stream(1, 16, 16), pixels)[0], expected, 1e-4)
    assert np.abs(model.encode(pixels.astype(np.float32)).cls - expected.cls).max() > 0.1


@pytest.mark.parametrize("kind", [np.float64, jnp.asarray], ids=["float64", "jax"])
def test_other_floats_and_jax_arrays_give_the_same(kind, model):
    clip = cases.random_frames(1, 2, 16, 16)
    cases.assert_close(model.encode(kind(clip)), model.encode(clip), 1e-6)


# What is refused. The message begins with the argument's name.


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 2, 16, 16, 4), np.float32),
        np.zeros((1, 2, 3, 16, 16), np.float32),  # channels first
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((1, 2, 24, 16, 3), np.float32),
        np.zeros((1, 2, 16, 31, 3), np.float32),
        np.zeros((1, 2, 16, 16, 3), np.int64),
        np.zeros((1, 2, 16, 16, 3), bool),
        np.zeros((1, 2, 16, 16, 3), np.complex64),
        np.zeros((1, 0, 16, 16, 3), np.float32),
        np.zeros((0, 1, 16, 16, 3), np.float32),
        [[[[[0.0]]]]],
        None,
    ],
    ids=lambda frames: f"{frames.dtype}{list(frames.shape)}" if hasattr(frames, "shape") else str(frames),
)
def test_frames_that_do_not_fit_are_refused(frames, model):
    with pytest.raises(ValueError, match=r"^frames: "):
        model.encode(frames)
    with pytest.raises(ValueError, match=r"^frames: "):
        model.step(model.open_stream(1, 16, 16), frames)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_check_names_the_frame_that_is_not_finite(value, kind, model):
    clip = CLIP.copy()
    clip[1, 2, 5, 6, 0] = value
    with pytest.raises(ValueError, match=r"^frames: .*frame 2 of clip 1"):
        model.encode(kind(clip), check=True)
    with pytest.raises(ValueError, match=r"^frames: .*frame 2 of clip 1"):
        model.step(model.open_stream(2, 32, 16), kind(clip), check=True)


def test_a_refused_step_leaves_the_stream_as_it_was(model):
    stream = model.open_stream(2, 32, 16, layers=())
    with pytest.raises(ValueError, match=r"^frames: "):
        model.step(stream, np.full_like(CLIP, np.nan), check=True)
    out, _ = model.step(stream, CLIP, check=True)
    assert np.isfinite(out.cls).all()


@pytest.mark.parametrize("shape", [(1, 1, 32, 16, 3), (3, 1, 32, 16, 3), (2, 1, 16, 32, 3), (2, 1, 32, 32, 3)])
def test_a_stream_takes_only_frames_of_its_size(shape, model):
    with pytest.raises(ValueError, match=r"^frames: the stream was opened for \[2, n, 32, 16, 3\]"):
        model.step(model.open_stream(2, 32, 16), np.zeros(shape, np.float32))


BAD_OPTIONS = [
    ("layers", {"layers": [2]}),
    ("layers", {"layers": (0, -1)}),
    ("layers", {"layers": 1}),
    ("layers", {"layers": [0.5]}),
    ("aspect_ratio", {"aspect_ratio": [1.0, 1.0]}),  # without camera_token
    ("aspect_ratio", {"aspect_ratio": [1.0], "camera_token": True}),
    ("aspect_ratio", {"aspect_ratio": 1.0, "camera_token": True}),
    ("aspect_ratio", {"aspect_ratio": [1.0, -1.0], "camera_token": True}),
    ("aspect_ratio", {"aspect_ratio": [1.0, 0.0], "camera_token": True}),
    ("aspect_ratio", {"aspect_ratio": [1.0, np.nan], "camera_token": True}),
    ("aspect_ratio", {"aspect_ratio": "wide", "camera_token": True}),
    ("time_unit", {"time_unit": 0}),
    ("time_unit", {"time_unit": -16}),
    ("time_unit", {"time_unit": float("nan")}),
    ("time_unit", {"time_unit": float("inf")}),
    ("time_unit", {"time_unit": "fast"}),
]


@pytest.mark.parametrize(("name", "options"), BAD_OPTIONS, ids=str)
def test_options_that_do_not_fit_are_refused(name, options, model):
    with pytest.raises(ValueError, match=f"^{name}: "):
        model.encode(CLIP, **options)
    with pytest.raises(ValueError, match=f"^{name}: "):
        model.open_stream(2, 32, 16, **options)


def test_weights_without_camera_token_refuse_it(model_without_camera):
    with pytest.raises(ValueError, match=r"^camera_token: "):
        model_without_camera.encode(CLIP, camera_token=True)
    with pytest.raises(ValueError, match=r"^camera_token: "):
        model_without_camera.open_stream(2, 32, 16, camera_token=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"window": 1}),
        ("window", {"window": 0, "sinks": 0}),
        ("window", {"window": 3, "sinks": 3}),
        ("window", {"window": 4.0}),
        ("sinks", {"sinks": -1}),
        ("sinks", {"window": 4, "sinks": -1}),
        ("sinks", {"window": 4, "sinks": 1.0}),
        ("batch", {"batch": 0}),
        ("batch", {"batch": 1.0}),
        ("height", {"height": 20}),
        ("height", {"height": 0}),
        ("height", {"width": 17}),
        ("height", {"height": 16.0}),
    ],
    ids=str,
)
def test_streams_that_cannot_be_are_refused(name, options, model):
    with pytest.raises(ValueError, match=rf"^({name}\b|frames: {name}\b)"):
        model.open_stream(**{"batch": 1, "height": 16, "width": 16, **options})


@pytest.mark.parametrize("dtype", ["int32", "float8_e4m3fn", "float64", "half a float", np.uint8])
def test_unknown_types_of_activations_are_refused(dtype, model):
    with pytest.raises(ValueError, match=r"^dtype: expected float32, bfloat16, float16"):
        build_model(model.config, model.params, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", np.float16, jnp.bfloat16, np.dtype("float32")])
def test_activations_have_the_type_asked_for(dtype, model):
    assert build_model(model.config, model.params, dtype=dtype).backbone.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "changes",
    [{"rope": "4d"}, {"time_unit": 0.0}, {"rope_base": -1.0}, {"heads": 3}, {"mlp": "relu"}, {"depth": 0}],
    ids=str,
)
def test_configurations_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: "):
        cases.random_model(**changes)
