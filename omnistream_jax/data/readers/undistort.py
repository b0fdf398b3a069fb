"""Photographs of lenses turned into those of pinholes, through cv2 (OpenCV's two models of lenses)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from omnistream_jax.data.opencv import cv2
from omnistream_jax.data.readers.cameras import intrinsics_matrix


@dataclasses.dataclass(frozen=True)
class Undistortion:
    """A pinhole camera that sees what a lens sees, and where in the lens's image each of its pixels lies.

    Attributes:
      intrinsics: float64 [3, 3] of the pinhole, pixel centres at + 0.5; its image has the size of the lens's.
      columns: float32 [H, W], in the lens's image, pixel centres at + 0.5.
      rows: float32 [H, W], likewise.
    """

    intrinsics: np.ndarray
    columns: np.ndarray
    rows: np.ndarray

    def image(self, image: np.ndarray) -> np.ndarray:
        """The pinhole's image [H, W, C] of the lens's [H, W, C], between pixels in straight lines."""
        columns, rows = self.columns - 0.5, self.rows - 0.5  # cv2 has pixel centres at whole numbers
        return cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def nearest(self, array: np.ndarray) -> np.ndarray:
        """The pinhole's view [H, W] of what is stored in the lens's view in any size [h, w], by the nearest pixel.

        For depth, which must not be mixed over edges; what the lens does not see is 0.
        """
        (height, width), (stored_height, stored_width) = self.columns.shape, array.shape
        column = np.floor(self.columns * (stored_width / width)).astype(int)
        row = np.floor(self.rows * (stored_height / height)).astype(int)
        inside = (column >= 0) & (column < stored_width) & (row >= 0) & (row < stored_height)
        return np.where(inside, array[row.clip(0, stored_height - 1), column.clip(0, stored_width - 1)], 0)


@functools.lru_cache(maxsize=4)  # 16 MB each for two million pixels
def undistortion(
    size: tuple[int, int], pinhole: tuple[float, ...], lens: tuple[float, ...], fisheye: bool
) -> Undistortion:
    """The largest pinhole view in which every pixel was seen through the lens.

    Args:
      size: (width, height) of the lens's image.
      pinhole: (fx, fy, cx, cy) of the lens, in pixels, centres at + 0.5.
      lens: (k1, k2, p1, p2), the radial and tangential model; of a fisheye (k1, k2, k3, k4), Kannala and Brandt's.
      fisheye: which of the two.
    """
    fx, fy, cx, cy = pinhole
    stored, coefficients = intrinsics_matrix(fx, fy, cx - 0.5, cy - 0.5), np.asarray(lens, np.float64)
    if fisheye:
        new = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(stored, coefficients, size, np.eye(3), balance=0.0)
        maps = cv2.fisheye.initUndistortRectifyMap(stored, coefficients, np.eye(3), new, size, cv2.CV_32FC1)
    else:
        new, _ = cv2.getOptimalNewCameraMatrix(stored, coefficients, size, 0.0)
        maps = cv2.initUndistortRectifyMap(stored, coefficients, np.eye(3), new, size, cv2.CV_32FC1)
    intrinsics = intrinsics_matrix(new[0, 0], new[1, 1], new[0, 2], new[1, 2], centre=0.0)
    return Undistortion(intrinsics, maps[0] + 0.5, maps[1] + 0.5)
