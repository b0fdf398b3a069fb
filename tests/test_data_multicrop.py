"""Crops: the same for all frames of a clip, and each step against an independent computation."""

import colorsys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from omnistream_jax.data.multicrop import (
    FIRST_GLOBAL,
    LOCAL,
    SECOND_GLOBAL,
    Distortion,
    MultiCropSizes,
    View,
    distort,
    draw_distortion,
    draw_view,
    multicrop,
    render,
)

SIZES = MultiCropSizes(global_size=32, local_size=16, local_crops=3, gram_size=48)


def _picture(height=60, width=90, seed=0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_shapes_and_types():
    crops = multicrop(np.stack([_picture()] * 2), np.random.default_rng(0), SIZES)
    assert crops.global_crops.shape == (2, 2, 32, 32, 3)
    assert crops.local_crops.shape == (3, 2, 16, 16, 3)
    assert crops.gram_crops.shape == (2, 2, 48, 48, 3)
    assert {crops.global_crops.dtype, crops.local_crops.dtype, crops.gram_crops.dtype} == {np.dtype(np.uint8)}
    assert len(crops.views) == 5
    none = multicrop(_picture()[None], np.random.default_rng(0), MultiCropSizes(32, 16, 0))
    assert none.local_crops.shape == (0, 1, 16, 16, 3)
    assert none.gram_crops is None


def test_all_frames_of_a_clip_get_the_same_crops():
    for seed in range(30):
        crops = multicrop(np.stack([_picture()] * 3), np.random.default_rng(seed), SIZES)
        for clip in (crops.global_crops, crops.local_crops, crops.gram_crops):
            np.testing.assert_array_equal(clip, np.repeat(clip[:, :1], 3, axis=1))


def test_frames_do_not_mix():
    """The first frame of a crop does not depend on the others, but for the clip-wide mean of the contrast."""
    distortion = Distortion(jitter=(("brightness", 1.2), ("hue", 0.05)), grayscale=False, blur=1.5, solarise=True)
    clip = np.stack([_picture(seed=1), _picture(seed=2)])
    np.testing.assert_array_equal(distort(clip, distortion)[:1], distort(clip[:1], distortion))
    np.testing.assert_array_equal(distort(clip, distortion)[1:], distort(clip[1:], distortion))


def test_the_same_seed_gives_the_same_crops_and_another_other_ones():
    frames = _picture()[None]
    first, again, other = (multicrop(frames, np.random.default_rng(seed), SIZES) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.global_crops, again.global_crops)
    assert first.views == again.views
    assert not np.array_equal(first.global_crops, other.global_crops)


def test_gram_crops_are_the_global_boxes_undistorted():
    frames = _picture()[None]
    crops = multicrop(frames, np.random.default_rng(3), SIZES)
    for crop, view in zip(crops.gram_crops, crops.views, strict=False):
        np.testing.assert_array_equal(crop, render(frames, view, 48))


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_cover_the_asked_areas_and_aspects(scale):
    rng = np.random.default_rng(4)
    views = [draw_view(rng, 300, 400, scale) for _ in range(3000)]
    left, top, right, bottom = np.array([view.box for view in views]).T
    areas, aspects = (right - left) * (bottom - top) / (300 * 400), (right - left) / (bottom - top)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 400).all()
    assert (bottom <= 300).all()
    assert scale[0] * 0.999 <= areas.min() < scale[0] * 1.2
    assert scale[1] * 0.85 < areas.max() <= scale[1] * 1.001
    assert 0.749 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.334
    assert np.mean([view.flip for view in views]) == pytest.approx(0.5, abs=0.04)
    if scale[1] < 0.5:  # nearly every draw fits, so nothing is selected: areas uniform, aspects log-uniform
        assert areas.mean() == pytest.approx(np.mean(scale), abs=0.006)
        assert np.log(aspects).mean() == pytest.approx(0, abs=0.02)


def test_a_very_long_picture_gives_its_centre():
    view = draw_view(np.random.default_rng(5), 10, 1000, (0.9, 1.0))
    np.testing.assert_allclose(view.box, (500 - 20 / 3, 0, 500 + 20 / 3, 10))


def test_render_cuts_and_mirrors():
    frames = _picture(64, 96)[None]
    whole = render(frames, View((32, 16, 64, 48), False), 32)
    np.testing.assert_array_equal(whole, frames[:, 16:48, 32:64])
    mirrored = render(frames, View((32, 16, 64, 48), True), 32)
    np.testing.assert_array_equal(mirrored, frames[:, 16:48, 32:64][:, :, ::-1])


def test_render_is_antialiased():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = render(np.repeat(board[None, :, :, None], 3, axis=3), View((0, 0, 64, 64), False), 16)
    assert np.abs(small.astype(float) - 127.5).max() < 2  # a sampling without a low pass gives 0 or 255


def test_brightness_saturation_and_contrast_are_the_usual_blends():
    frame = _picture().astype(float)
    luma = frame @ [0.299, 0.587, 0.114]

    def changed(name, value):
        return distort(frame.astype(np.uint8)[None], Distortion(jitter=((name, value),)))[0]

    np.testing.assert_allclose(changed("brightness", 1.3), np.clip(frame * 1.3, 0, 255), atol=1)
    np.testing.assert_allclose(
        changed("saturation", 0.8), np.clip(0.8 * frame + 0.2 * luma[..., None], 0, 255), atol=1.5
    )
    np.testing.assert_allclose(
        changed("contrast", 1.4), np.clip(luma.mean() + 1.4 * (frame - luma.mean()), 0, 255), atol=1.5
    )
    gray = distort(frame.astype(np.uint8)[None], Distortion(grayscale=True))[0]
    np.testing.assert_allclose(gray, np.repeat(luma[..., None], 3, axis=2), atol=1)


def test_hue_turns_the_colour_circle():
    frame = _picture(12, 18)
    shifted = distort(frame[None], Distortion(jitter=(("hue", 0.1),)))[0]
    expected = np.empty(frame.shape)
    for place in np.ndindex(frame.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(frame[place] / 255))
        expected[place] = colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value)
    assert np.abs(shifted - expected * 255).mean() < 2  # 8-bit hue and saturation
    assert np.abs(shifted - frame.astype(float)).mean() > 5


def test_solarise_inverts_bright_values():
    frame = _picture()
    solarised = distort(frame[None], Distortion(solarise=True))[0]
    np.testing.assert_array_equal(solarised, np.where(frame < 128, frame, 255 - frame))


def test_blur_is_gaussian():
    frame = _picture()
    blurred = distort(frame[None], Distortion(blur=1.5))[0]
    expected = ndimage.gaussian_filter(frame.astype(float), (1.5, 1.5, 0), mode="nearest")
    assert np.abs(blurred - expected).max() < 4
    assert np.abs(frame - expected).max() > 15


def test_distortions_come_as_often_as_dinov3_says():
    rng = np.random.default_rng(6)
    for rates, blur, solarise in ((FIRST_GLOBAL, 1, 0), (SECOND_GLOBAL, 0.1, 0.2), (LOCAL, 0.5, 0)):
        draws = [draw_distortion(rng, rates) for _ in range(2000)]
        assert np.mean([draw.blur is not None for draw in draws]) == pytest.approx(blur, abs=0.04)
        assert np.mean([draw.solarise for draw in draws]) == pytest.approx(solarise, abs=0.03)
        assert np.mean([draw.grayscale for draw in draws]) == pytest.approx(0.2, abs=0.03)
        assert np.mean([len(draw.jitter) > 0 for draw in draws]) == pytest.approx(0.8, abs=0.03)
        ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
        for name, (low, high) in ranges.items():
            values = [dict(draw.jitter)[name] for draw in draws if draw.jitter]
            assert low <= min(values) < low + 0.02 < high - 0.02 < max(values) <= high
        assert len({tuple(name for name, _ in draw.jitter) for draw in draws}) == 25  # none, or any order of four
