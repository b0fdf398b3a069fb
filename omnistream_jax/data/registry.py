"""The data sets by name: where the reader of each lives. A reader is imported only when its data set is opened."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omnistream_jax.data.errors import DataError

Kind = Literal["posed", "images", "videos", "captions"]
_READERS = "omnistream_jax.data.readers."


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a data set's reader lives.

    Attributes:
      kind: what it gives: "posed" a `readers.base.PosedSource`; "images" and "videos" a `sources.Source`; "captions" a
        source of `schema.CaptionedImage`.
      target: "module:attribute". A class is opened by its `open(root, split, ...)`, a function is called likewise.
      options: arguments by name that belong to the name.
    """

    kind: Kind
    target: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def module(self) -> str:
        """The reader's module, with its package."""
        return self.target.partition(":")[0]

    def load(self) -> Any:
        """The class or function. Raises ImportError or AttributeError where there is none."""
        return getattr(importlib.import_module(self.module), self.target.partition(":")[2])


def _entry(kind: Kind, target: str, **options: Any) -> Entry:
    return Entry(kind, _READERS + target, options)


ENTRIES: Mapping[str, Entry] = {
    # 3D and 4D
    "co3d": _entry("posed", "co3d:Co3D"),
    "wildrgbd": _entry("posed", "wildrgbd:WildRGBD"),
    "blendedmvs": _entry("posed", "blendedmvs:BlendedMVS"),
    "megadepth": _entry("posed", "megadepth:MegaDepth"),
    "mvs_synth": _entry("posed", "mvs_synth:MvsSynth"),
    "point_odyssey": _entry("posed", "point_odyssey:PointOdyssey"),
    "hypersim": _entry("posed", "hypersim:Hypersim"),
    "tartanair": _entry("posed", "tartanair:TartanAir"),
    "dl3dv": _entry("posed", "dl3dv:DL3DV"),
    "scannet": _entry("posed", "scannet:ScanNet"),
    "scannetpp": _entry("posed", "scannetpp:ScanNetPP"),
    "arkitscenes": _entry("posed", "arkitscenes:ARKitScenes"),
    "vkitti2": _entry("posed", "vkitti2:VKitti2"),
    "mapfree": _entry("posed", "mapfree:MapFree"),
    "dynamic_replica": _entry("posed", "dynamic_replica:DynamicReplica"),
    "spring": _entry("posed", "spring:Spring"),
    "omniworld_game": _entry("posed", "omniworld:OmniWorldGame"),
    "ase": _entry("posed", "ase:AriaSynthetic"),
    "waymo": _entry("posed", "waymo:Waymo"),
    "prepared": _entry("posed", "prepared:Prepared"),  # what data/prepare.py wrote of any of these
    # images
    "datacomp": _entry("images", "images:open_datacomp"),
    "imagenet21k": _entry("images", "images:open_imagenet21k"),
    "tfds": _entry("images", "tfds:open_tfds"),
    "prepared_images": _entry("images", "prepared_images:PreparedImages"),  # what data/prepare.py wrote of these
    # videos
    "kinetics": _entry("videos", "videos:open_kinetics"),
    "ssv2": _entry("videos", "videos:open_ssv2"),
    "pe_video": _entry("videos", "videos:open_pe_video"),
    "prepared_videos": _entry("videos", "prepared_videos:PreparedVideos"),  # what data/prepare.py wrote of these
    # images with text
    "grit": _entry("captions", "grit:open_grit"),
    "refcoco": _entry("captions", "refcoco:open_refcoco", which="refcoco"),
    "refcoco+": _entry("captions", "refcoco:open_refcoco", which="refcoco+"),
    "refcocog": _entry("captions", "refcoco:open_refcoco", which="refcocog"),
    "blip3_ocr": _entry("captions", "blip3_ocr:open_blip3_ocr"),
    "sa1b_caption": _entry("captions", "sa1b:open_sa1b_caption"),
    "prepared_captions": _entry("captions", "prepared_captions:PreparedCaptions"),  # prepare.py's of these
    # the embedded world, which has no folder: "train" or "heldout" stands in its place
    "world": _entry("posed", "world:open_world"),
    "world_videos": _entry("videos", "world:open_world_videos"),
    "world_captions": _entry("captions", "world:open_world_captions"),
}


def find_entry(name: str) -> Entry:
    """The entry of a name. Raises DataError, with a suggestion, where there is none."""
    if name in ENTRIES:
        return ENTRIES[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), ENTRIES, 1, 0.6)
    meant = f"did you mean {near[0]}? " if near else ""
    raise DataError(f"dataset: {name!r} is not known; {meant}There are {', '.join(sorted(ENTRIES))}")


def open_dataset(name: str, root: str | os.PathLike, /, split: str = "train", **options: Any) -> Any:
    """Opens a data set in its published layout; see `Entry.kind` for what comes back.

    Args:
      name: of ENTRIES.
      root: the folder that holds the layout which the reader's module describes; of the world, which has none, its
        split.
      split: as the data set calls it.
      options: further arguments of its reader.

    Raises:
      DataError: the name is not known, the reader takes no such option, or the layout is another; the message says
        what was expected where.
    """
    entry = find_entry(name)
    try:
        target = entry.load()
    except ImportError as error:
        hint = "pip install -e '.[data]' installs what readers need"
        raise DataError(f"dataset {name}: its reader cannot be imported ({error}); {hint}") from error
    opener = target.open if inspect.isclass(target) else target
    signature = inspect.signature(opener)
    options = {**entry.options, "split": split, **options}
    try:
        signature.bind(Path(root), **options)
    except TypeError as error:
        raise DataError(f"dataset {name}: its reader takes {signature}; {error}") from error
    return opener(Path(root), **options)
