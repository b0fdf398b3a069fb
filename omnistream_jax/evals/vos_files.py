"""What a run of video object segmentation leaves of each sequence, so that a run that was stopped goes on.

FOLDER/predictions/SEQUENCE/NNNNN.png   indexed masks, as davis2017-evaluation and others read them
FOLDER/results/SEQUENCE.json            its numbers, and the key of what they were made of
FOLDER/pictures/SEQUENCE.png            frames with the true and the predicted masks
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnistream_jax.data.benchmarks.mask_files import PALETTE, read_mask, write_mask
from omnistream_jax.data.benchmarks.masked import MaskedSequence
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals.result_files import key_of, read_row, write_row
from omnistream_jax.evals.rows import labelled_row
from omnistream_jax.utils.files import written_aside

_SHOWN, _TILE = 6, 240  # frames in a picture, and their width in pixels
_OPACITY = 0.6


@dataclasses.dataclass(frozen=True)
class VosFiles:
    """The files of one folder.

    Attributes:
      folder: made where it is missing.
      settings: JSON values, all that the masks and numbers depend on besides the data.
      pictures: whether a sequence without its picture counts as unfinished.
    """

    folder: Path
    settings: Mapping[str, Any]
    pictures: bool

    def read(self, sequence: MaskedSequence) -> dict[str, Any] | None:
        """What `write` stored; None unless it was made of the same settings and data and all files are there."""
        files = [self.prediction_path(sequence, index) for index in range(len(sequence))]
        files += [self.picture_path(sequence)] if self.pictures else []
        if not all(path.exists() for path in files):
            return None
        return read_row(self._result_path(sequence), self.key(sequence))

    def write(self, sequence: MaskedSequence, row: Mapping[str, Any]) -> dict[str, Any]:
        """Stores the numbers of a sequence, whose predictions and picture are there; returns them with the key."""
        return write_row(self._result_path(sequence), row, self.key(sequence))

    def write_prediction(self, sequence: MaskedSequence, index: int, mask: np.ndarray) -> None:
        """Stores the mask of a frame, uint8 [H, W]."""
        path = self.prediction_path(sequence, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mask(path, mask)

    def write_picture(self, sequence: MaskedSequence, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Stores a picture of some frames with masks uint8 [T, H, W]."""
        path = self.picture_path(sequence)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            Image.fromarray(masks_picture(sequence, prediction, truth)).save(aside, format="PNG")

    def prediction_path(self, sequence: MaskedSequence, index: int) -> Path:
        """Where the mask of a frame belongs."""
        return self.folder / "predictions" / sequence.name / f"{sequence.frame_name(index)}.png"

    def picture_path(self, sequence: MaskedSequence) -> Path:
        """Where the picture of a sequence belongs."""
        return self.folder / "pictures" / f"{sequence.name}.png"

    def key(self, sequence: MaskedSequence) -> str:
        """sha256 of the settings and of what the sequence is."""
        return key_of(dict(self.settings), sequence.name, sequence.identity())

    def _result_path(self, sequence: MaskedSequence) -> Path:
        return self.folder / "results" / f"{sequence.name}.json"


def read_predictions(folder: Path, sequence: MaskedSequence) -> np.ndarray:
    """uint8 [T, H, W], masks that a program stored as FOLDER/SEQUENCE/NNNNN.png; the first and last need not be there.

    Raises:
      DataError: one is missing, cannot be read, has another size than the frames, or shows an object that does not
        exist in a frame that is scored; the message names it.
    """
    masks = np.zeros((len(sequence), *sequence.size), np.uint8)
    for index in range(len(sequence)):
        path = folder / sequence.name / f"{sequence.frame_name(index)}.png"
        scored = 0 < index < len(sequence) - 1
        if not scored and not path.exists():
            continue  # some programs do not write them
        mask = read_mask(path)
        if mask.shape != sequence.size:
            expected = f"{sequence.size[1]} x {sequence.size[0]} as the frame has"
            raise DataError(f"{path}: {mask.shape[1]} x {mask.shape[0]} pixels, expected {expected}")
        if scored and mask.max() > sequence.objects:
            raise DataError(f"{path}: has object {mask.max()}, expected 0 to {sequence.objects}")
        masks[index] = mask
    return masks


def masks_picture(sequence: MaskedSequence, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: some frames from the first to the last, above with the true masks, below with the predicted."""
    shown = np.unique(np.linspace(0, len(sequence) - 1, _SHOWN).round().astype(int)).tolist()
    frames = [sequence.frame(index) for index in shown]
    rows = []
    for label, masks in (("truth", truth), ("prediction", prediction)):
        tiles = [_overlay(frame, masks[index]) for frame, index in zip(frames, shown, strict=True)]
        numbers = ", ".join(map(str, shown))
        rows.append(labelled_row(f"{sequence.name}: {label}, frames {numbers}", np.stack(tiles)))
    return np.concatenate(rows)


def _overlay(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A tile of a frame uint8 [H, W, 3] with its mask [H, W] in DAVIS's colours."""
    size = _TILE, max(1, round(_TILE * frame.shape[0] / frame.shape[1]))
    picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR), np.float32)
    mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    share = _OPACITY * (mask > 0)[..., None]
    return np.rint((1 - share) * picture + share * PALETTE[mask]).astype(np.uint8)
