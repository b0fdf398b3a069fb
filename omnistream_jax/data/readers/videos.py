"""Videos for self-supervision: Kinetics, Something-Something V2 and PE-Video, as `data/sources.py` wants its sources.

Kinetics-400/600/700 [from memory, not verified on it], in one of three forms:

    SPLIT/CLASS NAME/YTID_000010_000020.mp4    labels are the folders; or flat, without labels: SPLIT/YTID_....mp4
    ANNOTATIONS.csv                            header label,youtube_id,time_start,time_end,split; test has no label
    ANNOTATIONS.csv or .txt                    `path,label_id` or `path label_id` a line, without a header

Something-Something V2 [from memory, not verified on it]:

    20bn-something-something-v2/ID.webm
    labels/{train,validation,test,labels}.json, or in root something-something-v2-{train,validation,test,labels}.json:
        [{"id": "78687", "label": ..., "template": "Holding [something] next to [something]", "placeholders": [...]}]
        and {"Holding something next to something": "45", ...}, templates without brackets

PE-Video (Bolya et al. 2025; Hub facebook/PE-Video): {train,test,extended}/000000.tar, records of .mp4 and .json.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.base import require
from omnistream_jax.data.readers.files import read_csv, read_json, read_lines
from omnistream_jax.data.readers.webdataset import TarRecords, find_tars, index_tars
from omnistream_jax.data.schema import Sample
from omnistream_jax.data.sources import VIDEO_SUFFIXES, VideoSource, read_clip, video_source
from omnistream_jax.data.video import open_video

EXPECTED_SSV2 = {"train": 168_913, "validation": 24_777, "test": 27_157}
EXPECTED_KINETICS400 = {"train": 246_534, "val": 19_906, "test": 39_805}
"""As listed; videos that are gone from the net are missing everywhere."""

_SSV2_FOLDER = "20bn-something-something-v2"


@dataclasses.dataclass(frozen=True)
class LabelledVideos(VideoSource):
    """Videos with classes.

    Attributes:
      labels: the classes' names; () where only numbers are published.
      label_ids: the class of each video, None where it is not published; () if that holds for all.
      missing: listed videos that are not there.
      EXPECTED: split -> videos that are published, where it is known.
    """

    labels: tuple[str, ...] = ()
    label_ids: tuple[int | None, ...] = ()
    missing: int = 0
    EXPECTED: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def label(self, index: int) -> int | None:
        """The video's class, an index into `labels` where there are names; None where it is not published."""
        return self.label_ids[index] if self.label_ids else None


@dataclasses.dataclass(frozen=True, eq=False)
class TarVideos:
    """Videos in WebDataset tars, a `sources.Source`; see `sources.VideoSource` for short_side and frame_rate."""

    name: str
    records: TarRecords
    short_side: int | None = None
    frame_rate: float | None = None
    max_frames: ClassVar[int | None] = None

    def __len__(self) -> int:
        return len(self.records)

    def describe(self, index: int) -> str:
        """The tar's path and the record's name in it."""
        return self.records.describe(index)

    def annotation(self, index: int) -> dict[str, Any]:
        """What the record's JSON says of the video. Raises DataError if there is none."""
        return self.records.read_json(index)

    def sample(self, index: int, rng: np.random.Generator, frames: int, stride: tuple[int, int]) -> Sample:
        """Reads a random clip of a video; see `sources.VideoSource.sample`."""
        path = self.describe(index)
        with self.records.open(index, "video") as file, open_video(path, file=file) as video:
            return Sample(read_clip(video, rng, frames, stride, self, video.frame_rate), path)


def open_kinetics(
    root: str | os.PathLike,
    split: str = "train",
    annotations: str | os.PathLike | None = None,
    short_side: int | None = None,
    frame_rate: float | None = None,
) -> LabelledVideos:
    """Kinetics in any of its three forms.

    Args:
      root: the folder that holds the split's folder; for a list of paths, the folder that these are relative to.
      split: "train", "val" or "test": the folder below root, and the rows of a CSV that are taken.
      annotations: the CSV or the list; None takes labels from folders.
      short_side, frame_rate: see `sources.VideoSource`.

    Raises:
      DataError: the layout is another, a row is malformed, or nothing that is listed is there.
    """
    root = require(Path(root), expected="the folder of Kinetics")
    rows = [] if annotations is None else read_lines(annotations)
    if annotations is None:
        found = _from_folders(require(root, split, expected="the split's folder of classes"))
    elif rows and "youtube_id" in rows[0]:
        folder = require(root, split, expected="the split's folder of videos")
        found = _from_table(folder, Path(annotations), split)
    else:
        return open_video_list(annotations, root, f"kinetics ({split})", short_side, frame_rate)
    expected = EXPECTED_KINETICS400 if len(found.labels) == 400 else {}
    return _videos(f"kinetics ({split})", found, short_side, frame_rate, expected)


def open_video_list(
    path: str | os.PathLike,
    root: str | os.PathLike,
    name: str,
    short_side: int | None = None,
    frame_rate: float | None = None,
) -> LabelledVideos:
    """Videos of a list, `path,label` or `path label` a line with whole numbers as labels; paths relative to root.

    The files are not looked for here: a list may name millions on a slow disk.

    Raises:
      DataError: a line is malformed; the message gives its number.
    """
    paths, label_ids = [], []
    for number, line in enumerate(read_lines(path), start=1):
        match = re.fullmatch(r"(.+?)(?:\s*,\s*|\s+)(\d+)", line)
        if not match or not match[1].lower().endswith(VIDEO_SUFFIXES):
            raise DataError(f"{path}, line {number}: {line!r}; expected a video's path and a whole number")
        paths.append(os.path.join(root, match[1]))
        label_ids.append(int(match[2]))
    if not paths:
        raise DataError(f"{path}: is empty; expected a video's path and a whole number a line")
    return _videos(name, _Found(tuple(paths), (), tuple(label_ids)), short_side, frame_rate)


def open_ssv2(
    root: str | os.PathLike, split: str = "train", short_side: int | None = None, frame_rate: float | None = None
) -> LabelledVideos:
    """Something-Something V2; split "train", "validation" or "test" (without labels).

    Raises:
      DataError: the layout is another, a row's template is not among the labels, or no listed video is there.
    """
    root = require(Path(root), expected="the folder of Something-Something V2")
    folder = require(root, _SSV2_FOLDER, expected="the folder of ID.webm")
    numbers = {str(text): int(number) for text, number in read_json(_ssv2_file(root, "labels")).items()}
    labels = tuple(sorted(numbers, key=numbers.__getitem__))
    if [numbers[label] for label in labels] != list(range(len(labels))):
        raise DataError(f"{_ssv2_file(root, 'labels')}: its numbers are not 0 to {len(labels) - 1}, each once")
    listing = _ssv2_file(root, split)
    there = {entry.name for entry in os.scandir(folder)}
    paths, label_ids, missing = [], [], 0
    for number, row in enumerate(read_json(listing)):
        identity, label = _ssv2_row(row, numbers, f"{listing}, row {number}")
        if (file := f"{identity}.webm") not in there:
            missing += 1
            continue
        paths.append(str(folder / file))
        label_ids.append(label)
    if not paths:
        raise DataError(f"{folder}: holds none of the {missing} videos (ID.webm) that {listing} names")
    found = _Found(tuple(paths), labels, tuple(label_ids), missing)
    return _videos(f"ssv2 ({split})", found, short_side, frame_rate, EXPECTED_SSV2)


def open_pe_video(
    root: str | os.PathLike, split: str = "train", short_side: int | None = None, frame_rate: float | None = None
) -> TarVideos:
    """PE-Video; split "train", "test" or "extended".

    Raises:
      DataError: the layout is another; the message says what was expected.
    """
    folder = require(Path(root), split, expected="the split's folder of 000000.tar")
    tars = find_tars(folder, "PE-Video's 000000.tar")
    records = index_tars(tars, {"video": VIDEO_SUFFIXES, "json": (".json",)}, required="video")
    if not len(records):
        raise DataError(f"{folder}: its tars hold no video; expected records of .mp4 and .json")
    return TarVideos(f"pe_video ({split})", records, short_side, frame_rate)


class _Found(NamedTuple):
    """The fields of LabelledVideos that a data set's layout tells."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    label_ids: tuple[int | None, ...]
    missing: int = 0


def _videos(
    name: str,
    found: _Found,
    short_side: int | None,
    frame_rate: float | None,
    expected: Mapping[str, int] = MappingProxyType({}),
) -> LabelledVideos:
    return LabelledVideos(
        name, short_side=short_side, frame_rate=frame_rate, **found._asdict(), EXPECTED=dict(expected)
    )


def _from_folders(folder: Path) -> _Found:
    paths = video_source(folder).paths
    parents = [os.path.relpath(os.path.dirname(path), folder) for path in paths]
    labels = tuple(sorted(set(parents) - {"."}))
    if not labels:
        return _Found(paths, (), ())
    numbers = {label: number for number, label in enumerate(labels)}
    return _Found(paths, labels, tuple(numbers.get(parent) for parent in parents))


def _from_table(folder: Path, table: Path, split: str) -> _Found:
    """The videos of the split's rows in a CSV as published, wherever they lie below the folder."""
    there = {Path(path).stem: path for path in video_source(folder).paths}
    names, labels, missing = [], [], 0
    for number, row in enumerate(read_csv(table, "youtube_id", "time_start", "time_end")):
        if row.get("split", split) not in (split, {"val": "validate"}.get(split)):
            continue
        try:
            stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except (TypeError, ValueError):
            raise DataError(
                f"{table}, row {number}: {row}; expected time_start and time_end in whole seconds"
            ) from None
        if stem not in there:
            missing += 1
            continue
        names.append(stem)
        labels.append(row.get("label"))
    if not names:
        raise DataError(f"{folder}: holds none of the {missing} videos (YTID_000010_000020.mp4) that {table} lists")
    classes = tuple(sorted({label for label in labels if label}))
    numbers = {label: number for number, label in enumerate(classes)}
    ids = tuple(numbers.get(label) for label in labels) if classes else ()
    return _Found(tuple(there[stem] for stem in names), classes, ids, missing)


def _ssv2_file(root: Path, part: str) -> Path:
    """Where a JSON file of the data set lies, in the older or in the newer layout."""
    older = root / f"something-something-v2-{part}.json"
    return older if older.exists() else require(root, "labels", f"{part}.json", expected=f"that, or {older.name}")


def _ssv2_row(row: Any, numbers: dict[str, int], where: str) -> tuple[str, int | None]:
    """A video's id and class; the test split has no class."""
    if not isinstance(row, dict) or not re.fullmatch(r"\d+", str(row.get("id"))):
        raise DataError(f"{where}: {row!r}; expected an object with a whole number as id")
    if "template" not in row:
        return str(row["id"]), None
    template = str(row["template"]).replace("[", "").replace("]", "")
    if template not in numbers:
        raise DataError(f"{where}: the template {template!r} is not among the {len(numbers)} labels")
    return str(row["id"]), numbers[template]
