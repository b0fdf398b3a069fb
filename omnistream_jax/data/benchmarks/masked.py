"""Videos in which every pixel of every frame belongs to an object or to none: what video object segmentation needs."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np

VOID = 255
"""The value of pixels that belong to nobody knows whom."""


class MaskedSequence(abc.ABC):
    """One video.

    Attributes:
      name: as the data set calls it; fits a file name.
      size: height and width of every frame and mask, in pixels.
      objects: those that are followed, 1 to this; the largest number in the first mask, as davis2017-evaluation counts.
    """

    name: str
    size: tuple[int, int]
    objects: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """Its frames."""

    @abc.abstractmethod
    def frame(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB. Raises DataError that names the file."""

    @abc.abstractmethod
    def mask(self, index: int) -> np.ndarray:
        """uint8 [H, W]: 0 no object, 1 and above the objects, VOID. Raises DataError that names the file."""

    @abc.abstractmethod
    def frame_name(self, index: int) -> str:
        """What the file of a frame's prediction is called, without its suffix."""

    @abc.abstractmethod
    def identity(self) -> list[Any]:
        """JSON values that are others where the frames or the masks are others, without decoding them."""

    def masks(self) -> np.ndarray:
        """uint8 [T, H, W], all of them."""
        return np.stack([self.mask(index) for index in range(len(self))])


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedVideos:
    """A data set of them.

    Attributes:
      name: of the data set.
      root: where it was found.
      sequences: in the order of the published list.
      counts: what was found and what was expected, JSON values; "complete": whether the result may be compared with
        published ones.
    """

    name: str
    root: str
    sequences: tuple[MaskedSequence, ...]
    counts: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What a result must say of its data, as JSON stores it."""
        names = [sequence.name for sequence in self.sequences]
        return {"benchmark": self.name, "root": self.root, "sequences": names, "counts": self.counts}
