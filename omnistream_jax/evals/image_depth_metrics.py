"""Depth of single images as AdaBins and DINOv3 score it on NYU Depth v2: metrics of each image, then their mean.

NumPy float64 throughout; the evaluators themselves compute in float32.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

DELTA = 1.25
EIGEN_ROWS, EIGEN_COLUMNS = (45, 471), (41, 601)  # of 480 x 640; the last one is outside


@dataclasses.dataclass(frozen=True)
class ImageDepthMetrics:
    """The numbers of one image, or their mean over images.

    Attributes:
        rmse: root of the mean of (p - g)^2, metres.
        abs_rel: mean of |p - g| / g.
        a1: share, 0 to 1, of pixels with max(p / g, g / p) < 1.25.
    """

    rmse: float
    abs_rel: float
    a1: float


def eigen_crop(height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of an image that Eigen et al. (2014) score, scaled from 480 x 640 and rounded down."""
    rows = slice(*(int(row / 480 * height) for row in EIGEN_ROWS))
    return rows, slice(*(int(column / 640 * width) for column in EIGEN_COLUMNS))


def image_depth_metrics(
    prediction: np.ndarray, target: np.ndarray, *, min_depth: float, max_depth: float, crop: str
) -> ImageDepthMetrics | None:
    """Scores the depth map of one image, without any alignment.

    Valid are the pixels of the crop whose target lies strictly between min_depth and max_depth; the prediction is
    clamped to that range.

    Args:
        prediction: [H, W], z-depth in metres.
        target: [H, W], true z-depth; 0 (or NaN) where it is not known.
        min_depth: metres, > 0.
        max_depth: metres.
        crop: "eigen" or "none".

    Returns:
        The metrics; None if no pixel is valid: such images do not enter the mean.

    Raises:
        ValueError: shapes that do not fit, an unknown crop, or a prediction that is not finite at a valid pixel.
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(f"expected prediction and target of one shape [H, W], got {prediction.shape}, {target.shape}")
    if crop not in ("eigen", "none"):
        raise ValueError(f"crop: expected eigen or none, got {crop!r}")
    if crop == "eigen":
        place = eigen_crop(*target.shape)
        prediction, target = prediction[place], target[place]
    valid = (target > min_depth) & (target < max_depth)
    if not valid.any():
        return None
    predicted, true = prediction[valid].astype(np.float64), target[valid].astype(np.float64)
    if not np.isfinite(predicted).all():
        raise ValueError("prediction: expected finite depth at the valid pixels, got NaN or infinity")
    predicted = predicted.clip(min_depth, max_depth)
    error = np.abs(predicted - true)
    return ImageDepthMetrics(
        rmse=float(np.sqrt(np.mean(error**2))),
        abs_rel=float(np.mean(error / true)),
        a1=float(np.mean(np.maximum(predicted / true, true / predicted) < DELTA)),
    )


def mean_of_images(images: Iterable[ImageDepthMetrics | None]) -> ImageDepthMetrics:
    """The plain mean over images (of RMSE too: the mean of roots), without those that have no valid pixel.

    Raises:
        ValueError: there is no image with a valid pixel.
    """
    table = np.array([dataclasses.astuple(image) for image in images if image is not None], np.float64)
    if table.size == 0:
        raise ValueError("images: expected at least one with a valid pixel of depth, got none")
    return ImageDepthMetrics(*(float(mean) for mean in table.mean(0)))
