"""Shapes and units of everything that data/ hands out; the one place where they are written down.

Legend: B samples of a batch (of this process), T frames, H x W pixels, p patch side, S and s sides of a global
and of a local crop, L local crops, h = w = S / p patches.
Pixels are uint8 RGB in sRGB, 0 to 255, not normalised: the model does that. Arrays are NumPy, C-contiguous.

Cameras are pinholes with OpenCV's axes: x right, y down, z forward. The pixel of column u and row v covers
[u, u + 1) x [v, v + 1): its centre lies at (u + 0.5, v + 0.5), so that resizing an image scales its intrinsics. The
point at depth d in a pixel is cam_to_world @ (d * inverse(intrinsics) @ (u + 0.5, v + 0.5, 1)).
Depth is z-depth, along the camera's axis and not along the ray.
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


@dataclasses.dataclass(frozen=True)
class PosedFrame:
    """One frame of an RGB-D sequence, with its camera.

    Attributes:
      image: uint8 [H, W, 3], RGB.
      intrinsics: float32 [3, 3], in pixels of `image`; [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].
      depth: float32 [H, W], metres, or the scene's own units where the sequence is not metric; 0 where not valid.
        None: the data set publishes none.
      valid: bool [H, W], where depth is known, finite and positive; None without depth.
      sky: bool [H, W], infinitely far: never valid, but known to be far; None where that is not told.
      cam_to_world: float32 [4, 4], a rotation and a translation in the units of depth; None: not known.
      path: the file that the image came from, for messages.
    """

    image: np.ndarray
    intrinsics: np.ndarray
    depth: np.ndarray | None
    valid: np.ndarray | None
    sky: np.ndarray | None
    cam_to_world: np.ndarray | None
    path: str


@dataclasses.dataclass(frozen=True)
class SequenceInfo:
    """What is the same for all frames of a sequence.

    Attributes:
      metric: depth and poses are in metres.
      dynamic: things move besides the camera.
      ordered: frames follow each other in time; else they are photographs of one place in no order.
      frames_per_second: of ordered frames where it is known, else None.
    """

    metric: bool
    dynamic: bool
    ordered: bool = True
    frames_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """An image, what is asked about it, and the answer.

    Attributes:
      image: uint8 [H, W, 3], RGB.
      instruction: what is asked.
      answer: the text to be learned, not empty.
      boxes: float32 [N, 4], corners (x1, y1, x2, y2) of what the text speaks of, as shares of width and height from
        the top left; [0, 4] where it names no place.
      phrases: the part of the answer or of the instruction that each box belongs to, as long as boxes.
      path: the file that the image came from, for messages.
      others: (instruction, answer) of what else can be asked about the image, from which a row takes some
        (`captions.CaptionData.texts_per_image`).
    """

    image: np.ndarray
    instruction: str
    answer: str
    boxes: np.ndarray
    phrases: tuple[str, ...]
    path: str
    others: tuple[tuple[str, str], ...] = ()


class SelfSupervisedBatch(TypedDict):
    """One step's batch of image or video self-supervision.

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


class PosedBatch(TypedDict):
    """One step's batch of posed RGB-D clips. Cropped and resized without changing the pixels' proportions.

    Keys:
      frames: uint8 [B, T, H, W, 3].
      depth: float32 [B, T, H, W], as in PosedFrame; 0 where not valid.
      valid: bool [B, T, H, W], where depth is known.
      sky: bool [B, T, H, W], known to be infinitely far; False also where nobody told.
      intrinsics: float32 [B, T, 3, 3], in pixels of `frames`.
      cam_to_world: float32 [B, T, 4, 4], the world being the data set's; the identity without poses.
      has_pose: bool [B], poses of all frames are known.
      has_depth: bool [B], the data set publishes depth.
      metric: bool [B], depth and poses are in metres.
      dynamic: bool [B], things move besides the camera.
      record: int64 [B], as in SelfSupervisedBatch; a record is a sequence.
    """

    frames: np.ndarray
    depth: np.ndarray
    valid: np.ndarray
    sky: np.ndarray
    intrinsics: np.ndarray
    cam_to_world: np.ndarray
    has_pose: np.ndarray
    has_depth: np.ndarray
    metric: np.ndarray
    dynamic: np.ndarray
    record: np.ndarray


class CaptionBatch(TypedDict):
    """One step's batch of captioned images: rows of L tokens, in each the texts about K images.

    Texts of a row have nothing to do with each other, also where they are about one image: a token may see its own
    image and the tokens before it in its own text. Every image has one text or more, in the order of the images.

    Keys:
      image: uint8 [B, K, S, S, 3], the picture in the top left corner, as large as fits in its own proportions, and
        grey beside or below it. Boxes in the text are in thousandths of this square.
      tokens: int32 [B, L], of each text the user's turn and the assistant's; 0 at the end of the row is padding.
      segment: int32 [B, L], which text a token is of: k * SHARED + t for text t about image[:, k - 1], both from 1
        on (utils/segments.py); 0: padding.
      position: int32 [B, L], of a token in its text, from 0 on; 0 in padding.
      target_mask: bool [B, L], tokens to be learned: the answers and the tokens that end them.
      cut: bool [B, K], an answer about the image was too long: its end is missing.
      texts: int32 [B, K], how many texts are about the image.
      record: int64 [B, K], as in SelfSupervisedBatch.
    """

    image: np.ndarray
    tokens: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    target_mask: np.ndarray
    cut: np.ndarray
    texts: np.ndarray
    record: np.ndarray
