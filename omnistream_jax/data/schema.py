"""Shapes and units of everything that data/ hands out; the one place where they are written down.

Legend: B samples of a batch (of this process), T frames, H x W pixels, p patch side, S and s sides of a global
and of a local crop, L local crops, h = w = S / p patches.
Pixels are uint8 RGB in sRGB, 0 to 255, not normalised: the model does that. Arrays are NumPy, C-contiguous.
"""

from __future__ import annotations

import dataclasses
from typing import NotRequired, TypedDict

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image or clip as a source gives it, decoded and not augmented.

    Attributes:
      frames: uint8 [T, H, W, 3], RGB; an image has T = 1.
      path: the file that it came from, for error messages.
    """

    frames: np.ndarray
    path: str


class SelfSupervisedBatch(TypedDict):
    """One step's batch of image or video self-supervision (SPEC 4).

    Keys:
      global_crops: uint8 [B, 2, T, S, S, 3].
      local_crops: uint8 [B, L, T, s, s, 3].
      masks: bool [B, 2, T, h, w], True where the student's patch is replaced by the mask token.
      gram_crops: uint8 [B, 2, 1, G, G, 3], the boxes and flips of the global crops at the Gram teacher's size G,
        without colour distortions; only where the task has a gram_size.
      record: int64 [B], which record of the task's sources each sample came from; `task.describe` names them.
    """

    global_crops: np.ndarray
    local_crops: np.ndarray
    masks: np.ndarray
    gram_crops: NotRequired[np.ndarray]
    record: np.ndarray
