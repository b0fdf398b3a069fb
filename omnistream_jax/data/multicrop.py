"""Multi-crop of a clip: two global crops and some local ones, each with its own distortions (DINOv3's constants).

A crop's box, flip and colour changes are the same for all frames of the clip. An image is a clip with T = 1.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image, ImageFilter

from omnistream_jax.data.opencv import cv2

GLOBAL_CROPS = 2
CROP_TRIES = 10
ASPECT = (3 / 4, 4 / 3)  # width / height, log-uniform
FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.8
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # factors 1 ± x; hue ± x of the colour circle
GRAYSCALE_PROBABILITY = 0.2
BLUR_SIGMA = (0.1, 2.0)  # pixels of the crop
SOLARISE_THRESHOLD = 128

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class DistortionRates:
    """How often a kind of crop is blurred and solarised (colour jitter and greyscale are the same for all)."""

    blur: float
    solarise: float


FIRST_GLOBAL = DistortionRates(blur=1.0, solarise=0.0)
SECOND_GLOBAL = DistortionRates(blur=0.1, solarise=0.2)
LOCAL = DistortionRates(blur=0.5, solarise=0.0)


@dataclasses.dataclass(frozen=True)
class MultiCropSizes:
    """What crops to make: square sides in pixels, the count of local crops, and the areas that crops cover.

    Attributes:
      global_size: side of the two global crops.
      local_size: side of the local crops.
      local_crops: how many local crops.
      gram_size: side of the undistorted copies of the global crops for the Gram teacher; None makes none.
      global_scale: smallest and largest share of the picture's area in a global crop.
      local_scale: the same for a local crop.
    """

    global_size: int
    local_size: int
    local_crops: int
    gram_size: int | None = None
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)


@dataclasses.dataclass(frozen=True)
class View:
    """Where a crop lies: box (left, top, right, bottom) in pixels of the picture, then perhaps mirrored."""

    box: Box
    flip: bool


@dataclasses.dataclass(frozen=True)
class Distortion:
    """The colour changes of one crop; () and None and False mean none.

    Attributes:
      jitter: (name, value) of brightness, contrast, saturation (factors) and hue (shift, turns), in their order.
      grayscale: whether colour is dropped.
      blur: standard deviation in pixels.
      solarise: whether values from 128 on are inverted.
    """

    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    blur: float | None = None
    solarise: bool = False


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """The crops of one clip, and where its global and local crops lie.

    Attributes:
      global_crops: uint8 [2, T, S, S, 3].
      local_crops: uint8 [L, T, s, s, 3].
      gram_crops: uint8 [2, T, G, G, 3], or None without a gram_size.
      views: 2 + L boxes and flips, the global ones first.
    """

    global_crops: np.ndarray
    local_crops: np.ndarray
    gram_crops: np.ndarray | None
    views: tuple[View, ...]


def multicrop(frames: np.ndarray, rng: np.random.Generator, sizes: MultiCropSizes) -> MultiCrop:
    """Makes all crops of one clip.

    Args:
      frames: uint8 [T, H, W, 3], RGB.
      rng: all randomness comes from it.
      sizes: what to make.
    """
    height, width = frames.shape[1:3]
    pictures = [Image.fromarray(frame) for frame in frames]
    global_views = [draw_view(rng, height, width, sizes.global_scale) for _ in range(GLOBAL_CROPS)]
    local_views = [draw_view(rng, height, width, sizes.local_scale) for _ in range(sizes.local_crops)]
    global_crops = [
        distort(_render(pictures, view, sizes.global_size), draw_distortion(rng, rates))
        for view, rates in zip(global_views, (FIRST_GLOBAL, SECOND_GLOBAL), strict=True)
    ]
    local_crops = [
        distort(_render(pictures, view, sizes.local_size), draw_distortion(rng, LOCAL)) for view in local_views
    ]
    gram_crops = None
    if sizes.gram_size is not None:
        gram_crops = np.stack([_render(pictures, view, sizes.gram_size) for view in global_views])
    local_shape = (0, len(frames), sizes.local_size, sizes.local_size, 3)
    return MultiCrop(
        global_crops=np.stack(global_crops),
        local_crops=np.stack(local_crops) if local_crops else np.zeros(local_shape, np.uint8),
        gram_crops=gram_crops,
        views=(*global_views, *local_views),
    )


def draw_view(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> View:
    """A random box of `scale` of the area and an aspect of 3/4 to 4/3, mirrored half of the time.

    When no box fits in ten tries (a very long picture), it is the largest central one of an allowed aspect.
    """
    flip = bool(rng.random() < FLIP_PROBABILITY)
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
            return View(_box(left, top, box_width, box_height, height, width), flip)
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    box_width, box_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return View(_box(left, top, box_width, box_height, height, width), flip)


def _box(left: float, top: float, box_width: float, box_height: float, height: int, width: int) -> Box:
    """The box, cut at the picture's edge: rounding can put it 1e-13 beyond, which Pillow refuses."""
    return left, top, min(left + box_width, width), min(top + box_height, height)


def draw_distortion(rng: np.random.Generator, rates: DistortionRates) -> Distortion:
    """Random colour changes of one crop."""
    jitter: list[tuple[str, float]] = []
    if rng.random() < JITTER_PROBABILITY:
        jitter = [
            ("brightness", rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
            ("contrast", rng.uniform(1 - CONTRAST, 1 + CONTRAST)),
            ("saturation", rng.uniform(1 - SATURATION, 1 + SATURATION)),
            ("hue", rng.uniform(-HUE, HUE)),
        ]
        jitter = [jitter[index] for index in rng.permutation(len(jitter))]
    grayscale = bool(rng.random() < GRAYSCALE_PROBABILITY)
    blur = float(rng.uniform(*BLUR_SIGMA)) if rng.random() < rates.blur else None
    return Distortion(tuple(jitter), grayscale, blur, bool(rng.random() < rates.solarise))


def render(frames: np.ndarray, view: View, size: int) -> np.ndarray:
    """Cuts a view out of each frame and resizes it (bicubic, antialiased).

    Args:
      frames: uint8 [T, H, W, 3].
      view: box and flip.
      size: side of the result in pixels.

    Returns:
      uint8 [T, size, size, 3].
    """
    return _render([Image.fromarray(frame) for frame in frames], view, size)


def _render(pictures: list[Image.Image], view: View, size: int) -> np.ndarray:
    crops = [picture.resize((size, size), Image.Resampling.BICUBIC, box=view.box) for picture in pictures]
    if view.flip:
        crops = [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
    return np.stack([np.asarray(crop) for crop in crops])


def distort(frames: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Applies the same colour changes to all frames: uint8 [T, H, W, 3] to uint8 [T, H, W, 3].

    Contrast is stretched about the mean of the whole clip, so a clip does not flicker.
    """
    count, height, width = frames.shape[:3]
    # Colour changes work pixel by pixel: all frames at once, one below the other.
    pixels = np.ascontiguousarray(frames).reshape(count * height, width, 3)
    for name, value in distortion.jitter:
        pixels = _JITTER[name](pixels, value)
    if distortion.grayscale:
        pixels = _gray(pixels)
    pixels = pixels.reshape(frames.shape)
    if distortion.blur is not None:
        kernel = ImageFilter.GaussianBlur(distortion.blur)
        pixels = np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in pixels])
    if distortion.solarise:
        pixels = np.where(pixels < SOLARISE_THRESHOLD, pixels, 255 - pixels)
    return pixels


def _gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _stretch(pixels: np.ndarray, factor: float, about: float) -> np.ndarray:
    table = np.clip(np.rint(about + factor * (np.arange(256) - about)), 0, 255)
    return cv2.LUT(pixels, table.astype(np.uint8))


def _shift_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    pixels[..., 0] += np.uint8(round(turns * 256) % 256)
    return cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB_FULL)


_JITTER = {
    "brightness": lambda pixels, value: _stretch(pixels, value, 0.0),
    "contrast": lambda pixels, value: _stretch(pixels, value, cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).mean()),
    "saturation": lambda pixels, value: cv2.addWeighted(pixels, value, _gray(pixels), 1 - value, 0.0),
    "hue": _shift_hue,
}
