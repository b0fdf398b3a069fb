"""Dynamic Replica (Karaev et al. 2023), as facebookresearch/dynamic_stereo unpacks it:

    {train,valid,test}/frame_annotations_SPLIT.jgz     see readers/pytorch3d.py; paths are relative to the split
    {train,valid,test}/VIDEO_{left,right}/images/*.png   1280 x 720, 30 frames a second
    {train,valid,test}/VIDEO_{left,right}/depths/*.geometric.png   float16 metres in a 16-bit PNG

Rendered people and animals in rooms, 300 frames a video (test: 900 [M]). Each of a video's two cameras is a sequence.
The names of the folders VIDEO_left are from memory: they are taken from where the annotations say that pictures lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from omnistream_jax.data.readers.base import SequenceReader, require, require_some
from omnistream_jax.data.readers.pytorch3d import AnnotatedFrame, read_annotated, read_annotations
from omnistream_jax.data.schema import PosedFrame, SequenceInfo


class DynamicReplica(SequenceReader):
    """Rendered video of moving people and animals, by a camera that moves."""

    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=True, dynamic=True, frames_per_second=30.0)
    EXPECTED: ClassVar[Mapping[str, int]] = {"train": 968, "valid": 40, "test": 40}  # 484, 20 and 20 videos [M]

    @classmethod
    def open(cls, root: Path, split: str = "train") -> DynamicReplica:
        """The sequences of a split that are there. Raises DataError where the layout is another."""
        folder = require(root, split, expected="the folder of a split: train, valid or test")
        require(folder, f"frame_annotations_{split}.jgz", expected="the cameras of the split's frames")
        found = [f"{split}/{path.parent.name}" for path in folder.glob("*/images")]
        return cls(f"dynamic replica ({split})", root, require_some(found, folder, "VIDEO_CAMERA/images"))

    def _frame_names(self, sequence: str) -> Sequence[str]:
        return list(self._frames(sequence))

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        frames = self._frames(sequence)
        split = sequence.split("/")[0]
        return [read_annotated(self.root / split, frames[name]) for name in names]

    def _frames(self, sequence: str) -> dict[str, AnnotatedFrame]:
        split, folder = sequence.split("/")
        annotated = read_annotations(self.root / split / f"frame_annotations_{split}.jgz").get(folder, ())
        return {frame.image: frame for frame in annotated}
