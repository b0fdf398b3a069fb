"""How stored frames become what players show: a container may tell that they are turned or mirrored."""

from __future__ import annotations

import dataclasses

import av
import numpy as np

from omnistream_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Orientation:
    """Rows and columns are swapped first, then mirrored.

    Attributes:
      swaps: rows become columns.
      upside_down: rows are shown in the opposite order.
      mirrored: columns are.
    """

    swaps: bool
    upside_down: bool
    mirrored: bool

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) shown of those stored, and the other way round."""
        return (width, height) if self.swaps else (height, width)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, ...] as it is shown; a view."""
        pixels = pixels.swapaxes(0, 1) if self.swaps else pixels
        return pixels[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


def orientation_of(frame: av.VideoFrame, path: str) -> Orientation:
    """From the frame's display matrix (ISO 14496-12, 6.2.2): x' = a x + c y, y' = b x + d y.

    Raises DataError, naming `path`, for an angle that is no quarter turn.
    """
    told = frame.side_data.get("DISPLAYMATRIX")
    if told is None:
        return Orientation(False, False, False)
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(told), np.int32)[:5])
    if b == c == 0 and a and d:
        return Orientation(False, d < 0, a < 0)
    if a == d == 0 and b and c:
        return Orientation(True, b < 0, c < 0)
    raise DataError(
        f"{path}: its display matrix ({a} {b} {c} {d}) / 65536 is no quarter turn", reason="turned by an odd angle"
    )
