"""A window that slides over a picture, and how what it sees becomes the picture's pixels (mmsegmentation's "slide").

starts of a side of 683 pixels, window 512, stride 341:   0, 171        the last one ends at the border
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from omnistream_jax.models.probes import bilinear_matrix


@dataclasses.dataclass(frozen=True)
class Windows:
    """Square windows of one picture, row by row.

    Attributes:
        height, width: of the picture, in pixels.
        window: side.
        rows, columns: first pixels of the windows.
    """

    height: int
    width: int
    window: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.rows) * len(self.columns)

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each window."""
        for top, left in itertools.product(self.rows, self.columns):
            yield slice(top, top + self.window), slice(left, left + self.window)

    def row_matrix(self, cells: int, height: int) -> np.ndarray:
        """float32 [height, len(rows) * cells]: from cells of the windows, top to bottom, to rows of a resized picture.

        Cells are spread bilinearly over their window, windows averaged where they overlap, and the picture resized
        bilinearly, as `bilinear_matrix` has it. Rows sum to one.

        Args:
            cells: of a window along this side.
            height: of the resized picture.
        """
        return _matrix(self.height, self.window, self.rows, cells, height)

    def column_matrix(self, cells: int, width: int) -> np.ndarray:
        """The same of the columns: float32 [width, len(columns) * cells]."""
        return _matrix(self.width, self.window, self.columns, cells, width)


def plan_windows(height: int, width: int, window: int, stride: int) -> Windows:
    """The windows of a picture whose sides are at least `window`.

    Args:
        height: in pixels.
        width: in pixels.
        window: side, in pixels.
        stride: from window to window; the last one is moved back to end at the border.

    Raises:
        ValueError: the picture is smaller than the window.
    """
    if min(height, width) < window:
        raise ValueError(f"window: expected at most the picture's {width} x {height} pixels, got {window}")
    rows, columns = (
        tuple(min(stride * number, side - window) for number in range(-(-(side - window) // stride) + 1))
        for side in (height, width)
    )
    return Windows(height, width, window, rows, columns)


def _matrix(side: int, window: int, starts: tuple[int, ...], cells: int, new_side: int) -> np.ndarray:
    spread, counts = np.zeros((side, len(starts), cells)), np.zeros((side, 1, 1))
    for number, start in enumerate(starts):
        spread[start : start + window, number] += bilinear_matrix(cells, window)
        counts[start : start + window] += 1
    whole = (spread / counts).reshape(side, -1)
    return (bilinear_matrix(side, new_side) @ whole).astype(np.float32)
