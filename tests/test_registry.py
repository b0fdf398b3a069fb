"""Data sets by name."""

import importlib.util
import inspect

import pytest
from scannet_cases import write_scannet
from world_cases import room

from omnistream_jax.data import registry
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.scannet import ScanNet
from omnistream_jax.data.registry import ENTRIES, open_dataset


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
    if entry.kind == "posed" and name != "prepared":
        assert all(count > 0 for count in target.EXPECTED.values())


def test_the_sources_of_table_1_are_all_there():
    kinds = [entry.kind for name, entry in ENTRIES.items() if name not in ("prepared", "prepared_videos", "tfds")]
    assert [kinds.count(kind) for kind in ("images", "videos", "posed", "captions")] == [
        2,
        3,
        19,
        6,
    ]  # RefCOCO is three
    assert registry.find_entry("refcoco+").options == {"which": "refcoco+"}
