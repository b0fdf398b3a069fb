"""MVS-Synth (Huang et al. 2018, DeepMVS), pictures of the game GTA V; root is the folder of one resolution, GTAV_720:

    0000/images/0000.png     120 sequences of 100 frames
    0000/depths/0000.exr     float32 z-depth, one channel; infinite in the sky
    0000/poses/0000.json     "f_x", "f_y", "c_x", "c_y" in pixels; "extrinsic" 4 x 4, world-to-camera

The camera's axes are OpenCV's, but the world is left-handed: its first two axes are exchanged here, as CUT3R does.
Pixel centres lie at + 0.5 [M]. Units are the game's. As in CUT3R, depth is not valid beyond 1000 units, nor among the
farthest 2 % of an image, where the game draws stand-ins. The frame rate was not published; cars and people move [M].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.base import SequenceReader, posed_frame, require_some
from omnistream_jax.data.readers.cameras import intrinsics_matrix, invert
from omnistream_jax.data.readers.files import read_exr, read_json, reading
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

MAX_DEPTH = 1000.0
KEPT_PERCENT = 98.0
_EXCHANGE_XY = np.eye(4)[[1, 0, 2, 3]]


class MvsSynth(SequenceReader):
    """Rendered video of a town, by a camera that walks and drives."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=False, dynamic=True)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 120}

    @classmethod
    def open(cls, root: Path, split: str = "train") -> MvsSynth:
        """The sequences that are there. Raises DataError where the layout is another."""
        if split != "train":
            raise DataError(f"MVS-Synth has no split {split!r}: all of it is train")
        found = [path.parent.name for path in root.glob("*/poses")]
        return cls(
            "mvs-synth", root, require_some(found, root, "SEQUENCE/poses; expected the folder of one resolution")
        )

    def _frame_names(self, sequence: str) -> Sequence[str]:
        poses = sorted((self.root / sequence / "poses").glob("*.json"))
        return [path.stem for path in poses if all(np.isfinite(part).all() for part in _camera(path))]

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        folder = self.root / sequence
        frames = []
        for name in names:
            path = folder / "images" / f"{name}.png"
            intrinsics, pose = _camera(folder / "poses" / f"{name}.json")
            depth = read_exr(folder / "depths" / f"{name}.exr")
            sky = np.isposinf(depth)
            frames.append(
                posed_frame(read_image(path), intrinsics, depth, pose, str(path), sky=sky, hidden=_far(depth))
            )
        return frames


def _far(depth: np.ndarray) -> np.ndarray:
    known = depth[np.isfinite(depth) & (depth > 0)]
    return depth > min(MAX_DEPTH, np.percentile(known, KEPT_PERCENT) if len(known) else MAX_DEPTH)


def _camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics [3, 3] and camera-to-world [4, 4], of a right-handed world."""
    with reading(path, 'a JSON object with "f_x", "f_y", "c_x", "c_y" and "extrinsic", a 4 x 4 matrix'):
        camera = read_json(path)
        intrinsics = intrinsics_matrix(*(float(camera[key]) for key in ("f_x", "f_y", "c_x", "c_y")))
        return intrinsics, _EXCHANGE_XY @ invert(np.array(camera["extrinsic"], np.float64).reshape(4, 4))
