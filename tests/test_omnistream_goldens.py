"""The backbone against outputs of the released OmniStream (float32, CPU)."""

import functools

import backbone_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import NOT_SHIPPED, golden_path, load_golden, relative_error

import omnistream_jax
from omnistream_jax.convert import layouts, omnistream
from omnistream_jax.convert.rules import to_tensors
from omnistream_jax.ops.rope import apply_rope, rope_tables

TOLERANCE = 2e-4


def load_case(name, tmp_path, dtype="float32", **options):
    golden = load_golden(name)
    directory = cases.write_model(tmp_path / name, golden.weights, golden.config)
    frames = cases.channels_last(golden.inputs["pixel_values"])
    return golden, omnistream_jax.load(directory, dtype=dtype, **options), frames


@pytest.mark.parametrize("name", ["01a_omnistream_offline", "01h_omnistream_swiglu"])
def test_encode_matches_the_released_clip_pass(name, tmp_path):
    golden, model, frames = load_case(name, tmp_path)
    cases.assert_fields(cases.omnistream_fields(model.encode(frames)), golden.outputs, TOLERANCE)


def test_time_unit_matches(tmp_path):
    golden, model, frames = load_case("01a_omnistream_offline", tmp_path)
    expected = golden.outputs["pooler_output_total_length_32"]
    assert relative_error(model.encode(frames, time_unit=32).cls, expected) <= TOLERANCE


def test_camera_token_and_aspect_ratio_match(tmp_path):
    golden, model, frames = load_case("01b_omnistream_camera", tmp_path)
    out = model.encode(frames, camera_token=True, aspect_ratio=golden.inputs["aspect_ratio"])
    cases.assert_fields(cases.omnistream_fields(out), golden.outputs, TOLERANCE)
    without = cases.omnistream_fields(model.encode(frames, camera_token=True))
    expected = {k.removeprefix("no_aspect_ratio/"): v for k, v in golden.outputs.items() if "no_aspect_ratio/" in k}
    cases.assert_fields(without, expected, TOLERANCE)


def test_streaming_matches_the_released_cache(tmp_path):
    golden, model, frames = load_case("01c_omnistream_streaming", tmp_path)
    ratio = golden.inputs["aspect_ratio"]
    out = cases.stream_through(model, frames, [1] * frames.shape[1], camera_token=True, aspect_ratio=ratio)
    cases.assert_fields(cases.omnistream_fields(out), golden.outputs, TOLERANCE)
    without = cases.stream_through(model, frames, [1] * frames.shape[1])
    expected = {k.removeprefix("no_camera/"): v for k, v in golden.outputs.items() if k.startswith("no_camera/")}
    cases.assert_fields(cases.omnistream_fields(without), expected, TOLERANCE)


def test_window_with_sinks_matches_at_true_time(tmp_path):
    golden, model, frames = load_case("01d_omnistream_window_w4s1", tmp_path)
    window = golden.meta["window_size"] + 1  # the released size is what it keeps after a frame
    sinks = golden.meta["attention_sink_size"]
    out = cases.stream_through(model, frames, [1] * frames.shape[1], window=window, sinks=sinks)
    cases.assert_fields(cases.omnistream_fields(out), golden.derived["logical_time"], TOLERANCE)


def test_more_than_sixteen_frames_match_at_both_time_units(tmp_path):
    golden, model, frames = load_case("01e_omnistream_offline_gt16", tmp_path)
    time = frames.shape[1]
    cases.assert_fields(cases.omnistream_fields(model.encode(frames, time_unit=time)), golden.outputs, TOLERANCE)
    streamed = {
        k.removeprefix("stream_total16/"): v for k, v in golden.outputs.items() if k.startswith("stream_total16/")
    }
    cases.assert_fields(cases.omnistream_fields(cases.stream_through(model, frames, [1] * time)), streamed, TOLERANCE)
    cases.assert_fields(cases.omnistream_fields(model.encode(frames)), streamed, TOLERANCE)


def test_chunks_match_with_first_frame_tokens_only_at_the_start(tmp_path):
    golden, model, frames = load_case("01g_omnistream_chunked", tmp_path)
    out = cases.stream_through(model, frames, golden.inputs["chunks"].tolist(), camera_token=True)
    cases.assert_fields(cases.omnistream_fields(out), golden.derived["first_token_fix"], TOLERANCE)


def test_rope_jitter_matches(tmp_path):
    golden, model, frames = load_case("01i_omnistream_train_rope_rescale", tmp_path)
    scale = (golden.inputs["rescale_t"], golden.inputs["rescale_hw"])
    apply = jax.jit(functools.partial(model.backbone.apply, layers=None))
    out = apply({"params": model.params}, frames, rope_scale=scale)
    cases.assert_fields(cases.omnistream_fields(out), golden.outputs, TOLERANCE)


@pytest.mark.parametrize(("rope", "patch"), [("released", None), ("dinov3", "yxyx_time"), ("dinov3_2d", "yxyx_notime")])
def test_rope_layouts_match(rope, patch, tmp_path):
    golden, model, frames = load_case("01k_omnistream_rope_variants", tmp_path, rope=rope)
    expected = golden.outputs if patch is None else golden.derived[patch]
    cases.assert_fields(cases.omnistream_fields(model.encode(frames)), expected, TOLERANCE)


def test_bfloat16_stays_close(tmp_path):
    golden, model, frames = load_case("01l_omnistream_bf16", tmp_path, dtype=jnp.bfloat16)
    fields = cases.omnistream_fields(model.encode(frames))
    for kind in ("autocast_bf16/", "pure_bf16/"):
        expected = {k.removeprefix(kind): v for k, v in golden.outputs.items() if k.startswith(kind)}
        cases.assert_fields(fields, expected, 3e-2)


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_rope_alone_matches(case):
    golden = load_golden("01j_omnistream_rope_unit")
    setting = golden.config[case]
    tokens = golden.inputs[f"{case}/tokens"]  # [B, heads, T * P, D]
    batch, heads, _, width = tokens.shape
    frames, (rows, columns) = setting["T"], setting["grid"]
    cos, sin = rope_tables(
        setting["time_shift"] + jnp.arange(frames)[None],
        rows,
        columns,
        head_width=width,
        special_tokens=setting["prefix_per_frame"],
        layout="released",
        time_unit=setting["total_length"],
    )
    by_frame = tokens.reshape(batch, heads, frames, -1, width).transpose(0, 2, 3, 1, 4)
    rotated = np.asarray(apply_rope(jnp.asarray(by_frame), cos, sin)).transpose(0, 3, 1, 2, 4).reshape(tokens.shape)
    assert relative_error(rotated, golden.outputs[f"{case}/rotated"]) <= 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "01a_omnistream_offline",
        "01b_omnistream_camera",
        "01f_omnistream_masks",
        "01i_omnistream_train_rope_rescale",
    ],
)
def test_outputs_and_parameter_gradients_match(name, tmp_path):
    golden, model, frames = load_case(name, tmp_path)
    inputs, cotangents = golden.inputs, golden.cotangents

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(variables):
        params, frames = variables
        out = model.backbone.apply(
            {"params": params},
            frames,
            masks=inputs.get("masks"),
            rope_scale=(inputs.get("rescale_t", 1.0), inputs.get("rescale_hw", 1.0)),
            layers=None,
            camera_token="aspect_ratio" in inputs,
            aspect_ratio=None if "aspect_ratio" not in inputs else jnp.asarray(inputs["aspect_ratio"]),
        )
        named = {
            "last_hidden_state": out.patches.reshape(*out.patches.shape[:2], -1, out.patches.shape[-1]),
            "pooler_output": out.cls,
            "register_tokens": out.registers,
            "camera_token": out.camera,
            **{f"hidden_states.{i}": hidden for i, hidden in enumerate(out.hidden)},
        }
        return sum(jnp.vdot(cotangents[key], named[key]) for key in cotangents), out

    (value, out), (gradient, frames_gradient) = loss((model.params, frames))
    cases.assert_fields(cases.omnistream_fields(out), golden.outputs, TOLERANCE)
    assert abs(value - golden.grads["loss"]) <= 1e-4 * abs(golden.grads["loss"])
    ours = to_tensors(gradient, omnistream.rules(model.config), model.config.depth)
    for key, expected in golden.grads.items():
        if key == "loss":
            continue
        if key == "input:pixel_values":
            assert relative_error(frames_gradient, cases.channels_last(expected)) <= 1e-3
            continue
        if np.any(expected):
            assert relative_error(ours[key], expected) <= 1e-3, key
        else:
            assert not np.any(ours[key]), key
    for key in golden.meta.get("params_zero_grad", []) + golden.meta.get("params_without_grad", []):
        assert not np.any(ours[key]), key


def test_a_directory_as_the_hub_has_it(tmp_path):
    golden = load_golden("official_tiny_hf/io")
    model = omnistream_jax.load(golden_path("official_tiny_hf/io").parent, dtype="float32")
    frames = cases.channels_last(golden.inputs["pixel_values"])
    cases.assert_fields(cases.omnistream_fields(model.encode(frames)), golden.outputs, TOLERANCE)
    out = model.encode(frames, camera_token=True, aspect_ratio=golden.inputs["aspect_ratio"])
    expected = {k.removeprefix("camera/"): v for k, v in golden.outputs.items() if k.startswith("camera/")}
    cases.assert_fields(cases.omnistream_fields(out), expected, TOLERANCE)
    assert layouts.read(golden_path("official_tiny_hf/io").parent).config.rope == "released"


def test_only_the_goldens_that_are_not_shipped_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("goldens.FOLDERS", (tmp_path, tmp_path))
    for name in NOT_SHIPPED:
        with pytest.raises(pytest.skip.Exception, match=name):
            golden_path(name)
    with pytest.raises(FileNotFoundError, match=r"01b_omnistream_camera\.safetensors is neither in"):
        golden_path("01b_omnistream_camera")
