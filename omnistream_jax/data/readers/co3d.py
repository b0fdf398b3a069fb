"""CO3Dv2, Common Objects in 3D (Reizenstein et al. 2021), as facebookresearch/co3d unpacks it:

    CATEGORY/SEQUENCE/images/frame000001.jpg       51 categories, each filmed around one object
    CATEGORY/SEQUENCE/depths/*.jpg.geometric.png   float16 in a 16-bit PNG, times depth.scale_adjustment
    CATEGORY/SEQUENCE/depth_masks/*.png            0 where depth must not be trusted
    CATEGORY/frame_annotations.jgz                 see readers/pytorch3d.py; paths are relative to root
    CATEGORY/sequence_annotations.jgz              [{"sequence_name", "viewpoint_quality_score", ...}]
    CATEGORY/set_lists/set_lists_fewview_{train,dev}.json   {"train": [[SEQUENCE, frame_number, path], ...], ...}

Poses, and with them depth, have a scale of their own in each sequence. The splits are those of the few-view task:
"train" is the list "train" of fewview_train, "dev" the list "test" of fewview_dev. Sequences whose cameras were found
badly (viewpoint_quality_score below 0.5) are left out, as CUT3R does.
Reading the annotations of a category takes seconds and about a kilobyte a frame in each process: whoever trains on
all of it should prepare it first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.base import SequenceReader, require, require_some
from omnistream_jax.data.readers.files import read_json, reading
from omnistream_jax.data.readers.pytorch3d import AnnotatedFrame, read_annotated, read_annotations
from omnistream_jax.data.schema import PosedFrame, SequenceInfo

MIN_QUALITY = 0.5
_LISTS = {"train": ("set_lists_fewview_train.json", "train"), "dev": ("set_lists_fewview_dev.json", "test")}


@dataclasses.dataclass(frozen=True)
class Co3D(SequenceReader):
    """Video of a walk around an object; `split` is the one that it was opened with."""

    split: str
    INFO: ClassVar[SequenceInfo] = SequenceInfo(metric=False, dynamic=False)
    EXPECTED: ClassVar[Mapping[str, int]] = {}  # published for all splits together only: some 36,000 [M]

    @classmethod
    def open(cls, root: Path, split: str = "train") -> Co3D:
        """The sequences of a split that are there. Raises DataError where the layout is another."""
        if split not in _LISTS:
            raise DataError(f"CO3D has no split {split!r}, expected one of {', '.join(_LISTS)}")
        categories = [path.parent.name for path in root.glob("*/sequence_annotations.jgz")]
        found = []
        for category in require_some(categories, root, "CATEGORY/sequence_annotations.jgz"):
            require(root, category, "frame_annotations.jgz", expected="the cameras of the category's frames")
            listed, good = _listed(_list_of(root, category, split), _LISTS[split][1]), _good(root / category)
            found += [f"{category}/{name}" for name in listed if name in good and (root / category / name).is_dir()]
        expected = f"CATEGORY/SEQUENCE of the split's sequences with a viewpoint quality of {MIN_QUALITY:g} or more"
        return cls(f"co3d ({split})", root, require_some(found, root, expected), split)

    def _frame_names(self, sequence: str) -> Sequence[str]:
        return list(self._frames(sequence))

    def _read_frames(self, sequence: str, names: Sequence[str]) -> list[PosedFrame]:
        frames = self._frames(sequence)
        return [read_annotated(self.root, frames[name]) for name in names]

    def _frames(self, sequence: str) -> dict[str, AnnotatedFrame]:
        category, name = sequence.split("/")
        listed = _listed(_list_of(self.root, category, self.split), _LISTS[self.split][1])[name]
        annotated = read_annotations(self.root / category / "frame_annotations.jgz").get(sequence, ())
        return {frame.image: frame for frame in annotated if frame.number in listed}


def _list_of(root: Path, category: str, split: str) -> Path:
    return require(root, category, "set_lists", _LISTS[split][0], expected=f"the list of the split {split}")


@functools.lru_cache(maxsize=128)  # lists of all categories
def _listed(path: Path, part: str) -> Mapping[str, frozenset[int]]:
    """The numbers of the frames by sequence that are listed in a part of a set list."""
    with reading(path, f'a set list: {{"{part}": [[SEQUENCE, frame_number, path], ...]}}'):
        numbers = defaultdict(set)
        for sequence, number, _ in read_json(path)[part]:
            numbers[sequence].add(int(number))
        return {sequence: frozenset(found) for sequence, found in numbers.items()}


def _good(folder: Path) -> set[str]:
    path = folder / "sequence_annotations.jgz"
    with reading(path, "SequenceAnnotations: [{sequence_name, viewpoint_quality_score, ...}]"):
        scores = {entry["sequence_name"]: entry.get("viewpoint_quality_score") for entry in read_json(path)}
        return {name for name, score in scores.items() if score is not None and score >= MIN_QUALITY}
