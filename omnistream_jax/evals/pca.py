"""A picture of patch features: their first three principal components as red, green and blue."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from omnistream_jax.evals.rows import enlarge, labelled_row


def pca_picture(frames: np.ndarray, feature_maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draws a row of frames and, below it, one row per feature map, each with its name above.

    Args:
        frames: uint8 [T, H, W, 3], the frames of one clip.
        feature_maps: name -> features [T, h, w, D] of those frames; h, w and D may differ between maps.

    Returns:
        uint8 [Hp, Wp, 3]: the picture; the same input gives the same bytes.

    Raises:
        ValueError: frames that are not uint8 [T, H, W, 3], or a map of another shape or not finite.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames: expected uint8 [T, H, W, 3], T >= 1, got {frames.dtype} {frames.shape}")
    rows = [labelled_row("frames", frames)]
    for name, features in feature_maps.items():
        features = np.asarray(features, np.float32)
        if features.ndim != 4 or len(features) != len(frames) or min(features.shape) == 0:
            raise ValueError(f"feature_maps[{name!r}]: expected [{len(frames)}, h, w, D], got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"feature_maps[{name!r}]: expected finite features, got NaN or infinity")
        colours = principal_colours(features)
        rows.append(labelled_row(name, np.stack([enlarge(tile, frames.shape[1:3]) for tile in colours])))
    return np.concatenate(rows, axis=0)


@dataclasses.dataclass(frozen=True)
class ColourBasis:
    """Maps features to colours by fixed principal components, so that a thing keeps its colour over time.

    Attributes:
        mean: [D], subtracted first.
        axes: [D, 3], the components for red, green and blue; zeros where there is none.
        low: [3], the scores along each axis that are drawn as 0.
        high: [3], and those drawn as 255.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def colours(self, features: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] of finite features [..., D]; scores beyond low and high are cut off there."""
        scores = (np.asarray(features, np.float64) - self.mean) @ self.axes
        return np.rint(255 * np.clip((scores - self.low) / (self.high - self.low), 0, 1)).astype(np.uint8)


def fit_colours(features: np.ndarray) -> ColourBasis:
    """The first three principal components of all vectors together, each with its sign and its range.

    Each component is stretched from its 1st to its 99th percentile over 0 to 255. Its sign is such that the
    loading of largest absolute value is positive. A component that does not exist or carries
    no variance, as all do for constant features, is a flat 128.

    Args:
        features: [..., D], finite.
    """
    vectors = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    variances, axes = variances[::-1][:3], axes[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    # Below this the variance is rounding, of the features themselves or of the decomposition.
    floor = max(1e-10 * variances[0], 1e-12 * np.mean(np.square(vectors)))
    basis = ColourBasis(mean, np.zeros((len(mean), 3)), np.full(3, -1.0), np.full(3, 1.0))
    for component in np.flatnonzero(variances > floor):
        low, high = np.percentile(centred @ axes[:, component], (1, 99))
        if high > low:
            basis.axes[:, component], basis.low[component], basis.high[component] = axes[:, component], low, high
    return basis


def principal_colours(features: np.ndarray) -> np.ndarray:
    """Maps features [T, h, w, D], finite, to colours uint8 [T, h, w, 3] by their own basis (`fit_colours`)."""
    return fit_colours(features).colours(features)


def side_by_side(frame: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] and its patches' colours [h, w, 3] to its right, uint8 [H, 2 W, 3]."""
    return np.concatenate([frame, enlarge(colours, frame.shape[:2])], axis=1)
