"""Videos with one class each, as V-JEPA 2's attentive probes see them: Kinetics-400, Something-Something v2.

    FOLDER/{train,val}.csv        lines "path label": a video, relative to FOLDER or absolute, and a number from 0 on

or as the data sets are published (data/readers/videos.py): FOLDER/{train,val}/CLASS NAME/*.mp4 for Kinetics, FOLDER/
20bn-something-something-v2/*.webm with the JSON files of its labels for the other.

S: segments of a video, each a clip of T frames; V: spatial views. Clips and views lie one after the other along the
axis of the frames: [V S T, H, W, 3].
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omnistream_jax.data.errors import DataError, because, require_field
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.probes.clip_views import Sampling, SpatialViews, TrainingView, segment_indices
from omnistream_jax.data.readers.videos import (
    EXPECTED_KINETICS400,
    EXPECTED_SSV2,
    LabelledVideos,
    open_kinetics,
    open_ssv2,
    open_video_list,
)
from omnistream_jax.data.video import open_video

CLASSES = {"k400": 400, "ssv2": 174}
EXPECTED = {
    "k400": {split: EXPECTED_KINETICS400[split] for split in ("train", "val")},
    "ssv2": {"train": EXPECTED_SSV2["train"], "val": EXPECTED_SSV2["validation"]},
}
"""Videos that are published of each split."""


class ActionSource(Protocol):
    """Videos with a class each."""

    name: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the path of a video."""

    def label(self, index: int) -> int:
        """The place of a video's class in `classes`."""

    def clips(self, index: int, sampling: Sampling, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The S clips of a video, one after the other: uint8 [T, H, W, 3]. Raises DataError that names the file."""

    def settings(self) -> dict[str, Any]:
        """JSON values: where they come from, how many there are, and "complete", as of `evals.probes.base`."""


@dataclasses.dataclass(frozen=True)
class ActionVideos:
    """Video files, made by `open_action_videos`.

    Attributes:
      videos: where they lie, and their labels.
      classes: names of those that are there; all numbers where no names are published.
      folder: of the data set.
      expected: how many videos and classes are published.
    """

    videos: LabelledVideos
    classes: tuple[str, ...]
    folder: str
    expected: tuple[int, int]

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.videos.name

    def __len__(self) -> int:
        return len(self.videos)

    def describe(self, index: int) -> str:
        """The path of a file."""
        return self.videos.describe(index)

    def label(self, index: int) -> int:
        """As `ActionSource.label`."""
        return self.videos.label(index)

    def clips(self, index: int, sampling: Sampling, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """As `ActionSource.clips`: in the videos' own size, a clip decoded when it is asked for."""
        with open_video(self.describe(index)) as video:
            for indices in segment_indices(video.frame_count, sampling, rng):
                yield video.read(indices.tolist())

    def settings(self) -> dict[str, Any]:
        """As `ActionSource.settings`."""
        counts = {"videos": len(self), "missing": self.videos.missing, "expected_videos": self.expected[0]}
        counts |= {"classes": len(self.classes), "complete": _found(self.videos) == self.expected}
        return {"name": self.name, "folder": self.folder, **counts}


def open_action_videos(
    folder: str | os.PathLike, dataset: str, split: str, classes: int, allow_incomplete: bool = False
) -> ActionVideos:
    """One split of a data set; see the module for the layouts.

    Args:
      folder: of the data set.
      dataset: "k400" or "ssv2".
      split: "train" or "val".
      classes: how many a head tells apart; labels are below it.
      allow_incomplete: accept other numbers of videos and classes than are published; `settings` says so.

    Raises:
      DataError: the layout is another, a label is out of range, or the counts are not the published ones.
    """
    if dataset not in CLASSES:
        raise DataError(f"dataset: {dataset!r}, expected one of {', '.join(CLASSES)}")
    folder = Path(folder)
    listing = folder / f"{split}.csv"
    if listing.exists():
        videos = open_video_list(listing, folder, f"{dataset} ({split})")
    elif dataset == "k400":
        videos = open_kinetics(folder, split)
    else:
        videos = open_ssv2(folder, {"val": "validation"}.get(split, split))
    where = listing if listing.exists() else folder
    _check_labels(videos, classes, where)
    found, expected = _found(videos), (EXPECTED[dataset][split], CLASSES[dataset])
    if found != expected and not allow_incomplete:
        counts = [f"{videos:,} videos of {classes} classes" for videos, classes in (found, expected)]
        raise DataError(f"{where}: {counts[0]}, expected {counts[1]}; allow_incomplete=True takes them as they are")
    names = videos.labels or tuple(map(str, range(classes)))
    return ActionVideos(videos, names, str(folder), expected)


def _found(videos: LabelledVideos) -> tuple[int, int]:
    """How many videos and classes there are."""
    return len(videos), len(set(videos.label_ids))


def _check_labels(videos: LabelledVideos, classes: int, where: Path) -> None:
    unknown = [index for index in range(len(videos)) if videos.label(index) is None]
    if unknown:
        raise DataError(f"{where}: {len(unknown)} videos have no class, the first is {videos.describe(unknown[0])}")
    above = [index for index in range(len(videos)) if videos.label(index) >= classes]
    if above:
        first = f"{videos.describe(above[0])} has {videos.label(above[0])}"
        raise DataError(f"{where}: {len(above)} labels are not below {classes}; {first}")


def check_same_names(train: ActionSource, validation: ActionSource) -> None:
    """Raises DataError where two splits number their classes differently."""
    if train.classes != validation.classes:
        odd = sorted(set(train.classes) ^ set(validation.classes))[:3]
        what = f"have other classes, such as {', '.join(odd)}" if odd else "have their classes in another order"
        raise DataError(f"{train.name} and {validation.name} {what}; expected the same, so that labels mean the same")


def shuffled(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frames of a clip [T, ...] in a random order: what is left without time."""
    return clip[rng.permutation(len(clip))]


@dataclasses.dataclass(frozen=True)
class ActionData(MixtureData[ActionSource]):
    """Batches to train on: "frames" float16 [B, S T, H, H, 3], normalised, and "label" int32 [B].

    Each clip is changed on its own, as in V-JEPA 2; the frames of a clip alike.

    Attributes:
      sampling: which frames.
      view: how they are changed and cut.
      shuffle_frames: whether the frames of each clip come in a random order.
    """

    sampling: Sampling = dataclasses.field(kw_only=True)
    view: TrainingView = dataclasses.field(kw_only=True)
    shuffle_frames: bool = False

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source = self.sources[place]
        with because("video cannot be decoded"):
            clips = [self.view.draw(clip, rng) for clip in source.clips(index, self.sampling, rng)]
        if self.shuffle_frames:
            clips = [shuffled(clip, rng) for clip in clips]
        return {"frames": np.concatenate(clips), "label": np.int32(source.label(index))}


@dataclasses.dataclass(frozen=True)
class ActionViews:
    """Samples that are always the same: "frames" uint8 [V S T, H, H, 3], "label" int32.

    Attributes:
      source: of the videos.
      sampling: which frames; a random window is drawn by (seed, index).
      views: how they are cut.
      shuffle_frames: whether the frames of each clip come in another order, drawn by (seed, index) too.
      seed: 0 or more.
    """

    source: ActionSource
    sampling: Sampling
    views: SpatialViews
    shuffle_frames: bool = False
    seed: int = 0

    def __post_init__(self):
        require_field(self.seed >= 0, "seed", self.seed, "0 or more")

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """One video. Raises DataError that names its file."""
        rng, cut = np.random.default_rng([self.seed, index]), []
        order_rng = np.random.default_rng([self.seed, index, 1])  # the same windows, shuffled or not
        for clip in self.source.clips(index, self.sampling, rng):
            clip = self.views.cut(clip)  # [V, T, H, H, 3]
            cut.append(clip[:, order_rng.permutation(clip.shape[1])] if self.shuffle_frames else clip)
        frames = np.stack(cut, axis=1)  # [V, S, T, H, H, 3]
        return {"frames": frames.reshape(-1, *frames.shape[3:]), "label": np.int32(self.source.label(index))}

    def settings(self) -> dict[str, Any]:
        """Where they come from, how many there are, and all that determines the frames."""
        return {
            **self.source.settings(),
            "sampling": dataclasses.asdict(self.sampling),
            "views": dataclasses.asdict(self.views),
            "shuffle_frames": self.shuffle_frames,
            "seed": self.seed,
        }
