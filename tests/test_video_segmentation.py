"""Frames to the model's input, and features of a video, by both protocols."""

import dataclasses

import cv2
import numpy as np
import pytest
from backbone_cases import random_model
from PIL import Image
from vos_cases import world_sequences

from omnistream_jax.evals.propagation import Propagation
from omnistream_jax.evals.video_segmentation import FeatureReader, FrameRule, segment

pytestmark = pytest.mark.usefixtures("quick_compilation")
DINO = FrameRule(short_side=480, rounding="down", multiple=64, interpolation="bilinear", deviation="dino")
DINOV3 = FrameRule(short_side=480, rounding="up", multiple=0, interpolation="bicubic", deviation="imagenet")
PROPAGATION = Propagation(
    context=2,
    radius=12,
    neighbourhood="circle",
    top=5,
    temperature=0.2,
    upsampling="nearest",
    flat_channel="loses",
)


@pytest.fixture(scope="module")
def model():
    return random_model(patch_size=8)


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        (DINO, (480, 854), (480, 832)),
        (DINO, (480, 910), (480, 896)),
        (DINO, (480, 1152), (480, 1152)),
        (DINO, (854, 480), (832, 480)),
        (DINO, (480, 480), (480, 448)),  # the script's own quirk
        (DINOV3, (480, 854), (480, 864)),
        (DINOV3, (1080, 1920), (480, 864)),
        (DINOV3, (854, 480), (864, 480)),
        (DINOV3, (480, 480), (480, 480)),
        (dataclasses.replace(DINOV3, short_side=960), (480, 854), (960, 1712)),
        (dataclasses.replace(DINOV3, short_side=470), (480, 854), (480, 864)),
    ],
)
def test_sizes_are_those_of_the_programs(rule, size, expected):
    assert rule.size(*size, patch=16) == expected


def test_colours_are_those_of_the_programs():
    frame = np.random.default_rng(0).integers(0, 256, size=(60, 101, 3), dtype=np.uint8)
    mean = np.array([0.485, 0.456, 0.406])
    rule = dataclasses.replace(DINO, short_side=32, multiple=16)
    # as the script does: in OpenCV's order of colours, reversed after resizing
    resized = cv2.resize(frame[..., ::-1], (48, 32))[..., ::-1]
    np.testing.assert_allclose(rule.prepare(frame, 16), (resized / 255 - mean) / [0.228, 0.224, 0.225], atol=1e-5)
    rule = dataclasses.replace(DINOV3, short_side=32)
    resized = np.asarray(Image.fromarray(frame).resize((64, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(rule.prepare(frame, 16), (resized / 255 - mean) / [0.229, 0.224, 0.225], atol=1e-5)


def frames_of(count=5, seed=3):
    return list(np.random.default_rng(seed).normal(size=(count, 16, 24, 3)).astype(np.float32))


@pytest.mark.parametrize("frames_per_step", [1, 2, 5])
def test_a_video_is_one_stream(model, frames_per_step):
    frames = frames_of()
    whole = model.encode(np.stack(frames)[None], layers=(), time_unit=3.0).patches[0]
    reader = FeatureReader(model, "stream", time_unit=3.0, frames_per_step=frames_per_step)
    features = list(reader.read(iter(frames)))
    assert len(features) == 5
    np.testing.assert_allclose(features, whole, atol=2e-4)


def test_frames_alone_know_nothing_of_each_other(model):
    frames = frames_of()
    alone = [model.encode(frame[None, None], layers=()).patches[0, 0] for frame in frames]
    for frames_per_step in (1, 2):
        reader = FeatureReader(model, "frame", frames_per_step=frames_per_step)
        np.testing.assert_allclose(list(reader.read(frames)), alone, atol=2e-4)
    streamed = list(FeatureReader(model, "stream").read(frames))
    np.testing.assert_allclose(streamed[0], alone[0], atol=2e-4)
    assert np.abs(streamed[-1] - alone[-1]).max() > 1e-2


def test_a_window_forgets(model):
    frames = frames_of()
    whole, windowed = (
        list(FeatureReader(model, "stream", window=window, sinks=0).read(frames)) for window in (None, 2)
    )
    np.testing.assert_allclose(whole[1], windowed[1], atol=2e-4)
    assert np.abs(whole[4] - windowed[4]).max() > 1e-2


def test_masks_come_one_a_frame_and_the_first_is_the_true_one(model):
    sequence = world_sequences(1, frames=4, size=32)[0]
    masks = list(segment(FeatureReader(model), dataclasses.replace(DINOV3, short_side=48), PROPAGATION, sequence))
    assert len(masks) == 4
    np.testing.assert_array_equal(masks[0], sequence.mask(0))
    for mask in masks:
        assert (mask.shape, mask.dtype) == ((32, 32), np.uint8)
        assert mask.max() <= sequence.objects


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_side": 0}, "short_side: expected 1 or more, got 0"),
        ({"multiple": -1}, "multiple: expected 0 or more, got -1"),
        ({"rounding": "off"}, "rounding: expected one of down, up, got 'off'"),
        ({"interpolation": "area"}, "interpolation: expected one of bilinear, bicubic"),
        ({"deviation": "none"}, "deviation: expected one of imagenet, dino"),
        ({"multiple": 24}, "multiple: expected a multiple of the model's patch, 16 pixels, got 24"),
        ({"short_side": 40}, "short_side: expected a multiple of the model's patch, 16 pixels, with rounding down"),
        ({"short_side": 16}, "short_side: expected 64 or more with rounding down, got 16"),
    ],
)
def test_a_rule_that_cannot_work_is_one_clear_error(fields, message):
    def use():
        rule = dataclasses.replace(DINO, **fields)
        rule.check(16)
        rule.size(30, 40, 16)

    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": "clip"}, "features: expected one of stream, frame, got 'clip'"),
        ({"frames_per_step": 0}, "frames_per_step: expected 1 or more, got 0"),
        ({"window": 1, "sinks": 1}, "window: 1 frames cannot hold 1 sinks"),
        ({"features": "frame", "window": 4}, "window: frames that are encoded alone have none, got 4"),
        ({"features": "frame", "time_unit": 8.0}, "time_unit: frames that are encoded alone have no time, got 8.0"),
    ],
)
def test_a_reader_that_cannot_work_is_one_clear_error(model, fields, message):
    with pytest.raises(ValueError, match=message):
        FeatureReader(model, **fields)
