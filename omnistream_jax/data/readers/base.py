"""What the readers of posed RGB-D sequences share: the interface, and the checks that every frame passes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.schema import PosedFrame, SequenceInfo


class PosedSource(Protocol):
    """Posed sequences, by index. It lists sequences when it is made, and opens files only in `frames` and `read`."""

    name: str

    def __len__(self) -> int:
        """How many sequences there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the sequence's path."""

    def info(self, index: int) -> SequenceInfo:
        """What is the same for all frames of a sequence."""

    def frame_count(self, index: int) -> int:
        """How many frames of a sequence can be read. May open its annotations."""

    def neighbours(self, index: int, frame: int) -> Sequence[int] | None:
        """For sequences that are not ordered: the frames that see what this one sees, most first; None if ordered."""

    def read(self, index: int, frames: Sequence[int]) -> list[PosedFrame]:
        """Reads some frames of a sequence.

        Args:
          index: which sequence.
          frames: 0-based numbers below `frame_count`, in any order.

        Raises:
          DataError: a file is missing, damaged or not as published; the message names it.
        """


@dataclasses.dataclass(frozen=True)
class SequenceReader:
    """A PosedSource over named sequences of one data set; readers override `_frame_names` and `_read_frames`.

    Attributes:
      name: how messages call it.
      root: the data set's folder.
      sequences: their paths relative to root, sorted.
    """

    name: str
    root: Path
    sequences: tuple[str, ...]
    INFO: ClassVar[SequenceInfo]
    EXPECTED: ClassVar[Mapping[str, int]]  # split -> sequences that the data set has as published

    @classmethod
    def open(cls, root: Path, split: str) -> SequenceReader:
        """The sequences of a split that are there. Raises DataError that says what was expected where."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.sequences)

    def describe(self, index: int) -> str:
        """The sequence's path."""
        return str(self.root / self.sequences[index])

    def info(self, index: int) -> SequenceInfo:
        """The same for all sequences of most data sets."""
        return self.INFO

    def frame_count(self, index: int) -> int:
        """How many frames of a sequence can be read."""
        return len(_names_of(self, self.sequences[index]))

    def neighbours(self, index: int, frame: int) -> Sequence[int] | None:
        """None: the frames are in order."""
        return None

    def read(self, index: int, frames: Sequence[int]) -> list[PosedFrame]:
        """Reads some frames of a sequence; see `PosedSource.read`."""
        sequence = self.sequences[index]
        names = _names_of(self, sequence)
        return self._read_frames(sequence, [names[frame] for frame in frames])

    def _frame_names(self, sequence: str) -> Sequence[str]:
        """Of the frames that can be read, in order: those without a pose or with a broken one are left out."""
        raise NotImplementedError

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        raise NotImplementedError


@functools.lru_cache(maxsize=256)  # finding them may mean reading a file a frame
def _names_of(reader: SequenceReader, sequence: str) -> Sequence[str]:
    return reader._frame_names(sequence)


def posed_frame(
    image: np.ndarray,
    intrinsics: np.ndarray,
    depth: np.ndarray | None,
    cam_to_world: np.ndarray | None,
    path: str,
    *,
    sky: np.ndarray | None = None,
    hidden: np.ndarray | None = None,
) -> PosedFrame:
    """A PosedFrame after the checks that all data sets share.

    Args:
      image: uint8 [H, W, 3].
      intrinsics: [3, 3], pixel centres at + 0.5.
      depth: [H, W]; zero, negative and not finite values are not valid. None: there is none.
      cam_to_world: [4, 4], or None.
      path: names the frame in messages.
      sky: bool [H, W], infinitely far.
      hidden: bool [H, W], where depth must not be trusted although it has a value.

    Raises:
      DataError: sizes that do not fit each other, a focal length that is not positive, a pose that is no rigid motion.
    """
    height, width = image.shape[:2]
    for what, array in (("depth", depth), ("sky", sky), ("mask", hidden)):
        if array is not None and array.shape != (height, width):
            raise DataError(f"{path}: its {what} has shape {array.shape}, the image is {height} x {width}")
    intrinsics = np.asarray(intrinsics, np.float32)
    if not (np.isfinite(intrinsics).all() and intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
        raise DataError(
            f"{path}: focal lengths {intrinsics[0, 0]:g} and {intrinsics[1, 1]:g}, expected positive ones",
            reason="focal length is not positive",
        )
    if cam_to_world is not None:
        cam_to_world = np.asarray(cam_to_world, np.float32)
        rotation = cam_to_world[:3, :3]
        rigid = np.isfinite(cam_to_world).all() and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2)
        if not (rigid and np.linalg.det(rotation) > 0):
            reason = "pose is not rigid" if np.isfinite(cam_to_world).all() else "pose is not finite"
            raise DataError(f"{path}: its pose is no rotation and translation", reason=reason)
    valid = None
    if depth is not None:
        valid = np.isfinite(depth) & (depth > 0)
        for mask in (sky, hidden):
            if mask is not None:
                valid &= ~mask
        depth = np.where(valid, depth, 0).astype(np.float32)
    return PosedFrame(image, intrinsics, depth, valid, sky, cam_to_world, path)


def require(root: Path, *parts: str, expected: str) -> Path:
    """The path root / parts, if it is there. Raises DataError that says what was expected where."""
    path = root.joinpath(*parts)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; expected {expected}")
    return path


def require_some(found: Sequence[str], root: Path, expected: str) -> tuple[str, ...]:
    """The names, sorted. Raises DataError, saying what was expected below root, if there are none."""
    if not found:
        raise DataError(f"{root}: holds no {expected}")
    return tuple(sorted(found))
