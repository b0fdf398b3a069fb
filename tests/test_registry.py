"""Data sets by name."""

import importlib.util
import inspect

import numpy as np
import pytest
from ml_collections import ConfigDict
from scannet_cases import write_scannet
from world_cases import room

from omnistream_jax.config import ConfigError
from omnistream_jax.data import registry
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.scannet import ScanNet
from omnistream_jax.data.registry import ENTRIES, open_dataset
from omnistream_jax.data.world import WorldCaptions, WorldClips, WorldVideos
from omnistream_jax.tasks import build_self_supervision as build


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scannet(tmp_path_factory.mktemp("scannet"), {"scene0000_00": room()})


def test_a_data_set_is_opened_by_its_name(root):
    reader = open_dataset("scannet", str(root))
    assert isinstance(reader, ScanNet)
    assert (reader.name, len(reader)) == ("scannet (train)", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scanet", "dataset: 'scanet' is not known; did you mean scannet?"),
        ("Mega-Depth", "did you mean megadepth?"),
        ("zzz", "dataset: 'zzz' is not known; There are arkitscenes, ase,"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(root, name, message):
    with pytest.raises(DataError) as raised:
        open_dataset(name, root)
    assert message in str(raised.value)


def test_arguments_that_a_reader_does_not_take_are_told(root):
    with pytest.raises(
        DataError, match=r"dataset scannet: its reader takes .*split.*unexpected keyword argument 'colour'"
    ):
        open_dataset("scannet", root, colour="red")
    with pytest.raises(DataError, match=r"scannetv2_val.txt: there is no such file"):
        open_dataset("scannet", root, "val")
    with pytest.raises(DataError, match=r"dataset tfds: its reader takes .* missing a required argument: 'name'"):
        open_dataset("tfds", root)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_reader_is_there_and_takes_a_folder(name):
    entry = ENTRIES[name]
    assert importlib.util.find_spec(entry.module) is not None
    target = entry.load()
    opener = target.open if inspect.isclass(target) else target
    assert next(iter(inspect.signature(opener).parameters)) == "root"
    needed = {"name": "mnist"} if name == "tfds" else {}
    inspect.signature(opener).bind(root, split="train", **entry.options, **needed)  # nothing else
    if entry.kind == "posed" and name not in ("prepared", "world"):
        assert all(count > 0 for count in target.EXPECTED.values())


def test_the_sources_of_table_1_are_all_there():
    prepared = {"prepared", "prepared_images", "prepared_videos", "prepared_captions"}
    others = {*prepared, "tfds", "world", "world_videos", "world_captions"}
    kinds = [entry.kind for name, entry in ENTRIES.items() if name not in others]
    assert [kinds.count(kind) for kind in ("images", "videos", "posed", "captions")] == [
        2,
        3,
        19,
        6,
    ]  # RefCOCO is three
    assert registry.find_entry("refcoco+").options == {"which": "refcoco+"}


def test_the_world_needs_no_folder():
    assert open_dataset("world", "train") == WorldClips("train", 200_000)
    assert open_dataset("world", "heldout", length=3, frames=4, size=32, seed=5) == WorldClips("heldout", 3, 4, 32, 5)
    assert open_dataset("world_videos", "heldout", "heldout") == WorldVideos("heldout", 500)
    assert open_dataset("world_captions", "train", size=64) == WorldCaptions("train", 200_000, size=64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("world", "/data/world"), {}, "world: '/data/world' is no split; .* stands train or heldout"),
        (("world_videos", ""), {}, "is no split"),
        (("world", "train", "heldout"), {}, "split is 'heldout' and in the folder's place stands 'train'"),
        (("world", "train"), {"length": 0}, "world: length is 0, expected 1 or more"),
        (("world", "train"), {"size": "large"}, "world: size is large, expected 16 to 1024"),
        (("world_captions", "train"), {"frames": 3}, "its reader takes .* unexpected keyword argument 'frames'"),
    ],
)
def test_what_the_world_has_not_is_told(arguments, options, message):
    with pytest.raises(DataError, match=message):
        open_dataset(*arguments, **options)


def _clip_task(**changes) -> ConfigDict:
    fields = {"kind": "clip", "paths": "world_videos:train", "path_weights": (), "batch_size": 2, "frames": 4}
    sizes = {"global_size": 32, "local_size": 16, "local_crops": 1, "stride": (1, 2), "short_side": 24}
    return ConfigDict({**fields, **sizes, "frame_rate": 4.0, **changes})


def test_a_task_of_clips_takes_the_world_by_name():
    data = build._data("clips", _clip_task(), 16, 0)
    assert data.sources == (WorldVideos("train", 200_000, short_side=24, frame_rate=4.0),)
    batch = data.dataset(0, 0, 1)[0]
    assert batch["global_crops"].shape == (2, 2, 4, 32, 32, 3)
    assert np.std(batch["global_crops"]) > 10
    (embedded,) = build._data("clips", _clip_task(paths="embedded"), 16, 0).sources
    assert (embedded.short_side, embedded.frame_rate) == (24, 4.0)
    with pytest.raises(ConfigError, match=r"tasks.clips.paths: world: 'trian' is no split"):
        build._data("clips", _clip_task(paths="world_videos:trian"), 16, 0)
    with pytest.raises(ConfigError, match=r"tasks.clips.paths: world_captions holds captions, expected videos"):
        build._data("clips", _clip_task(paths="world_captions:train"), 16, 0)
