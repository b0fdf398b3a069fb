"""Files are whole or not there."""

import json

import pytest
from PIL import Image

from omnistream_jax.utils.files import write_json, written_aside


def write_half_and_raise(path, error):
    with written_aside(path) as aside:
        aside.write_text("half")
        raise error


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
        assert (aside.parent, aside.suffix, aside.name[0]) == (tmp_path, ".txt", ".")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "rows.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half_and_raise(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_nothing_aside(tmp_path):
    (tmp_path / "folder" / "file").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"), written_aside(tmp_path / "folder", durable=True) as aside:
        aside.write_text("a file cannot take the place of a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_block_that_writes_nothing_fails(tmp_path):
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "rows.txt"):
        pass


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "rows.txt"
    with written_aside(path) as first, written_aside(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the inner block ends first"


def test_a_place_to_write_can_be_named(tmp_path):
    with written_aside(tmp_path / "rows.txt", tmp_path / "rows.txt.tmp") as aside:
        aside.write_text("new")
        assert [path.name for path in tmp_path.iterdir()] == ["rows.txt.tmp"]
    assert (tmp_path / "rows.txt").read_text() == "new"


def test_savers_that_look_at_the_suffix_find_it(tmp_path):
    with written_aside(tmp_path / "picture.png") as aside:
        Image.new("RGB", (2, 2)).save(aside)
    assert Image.open(tmp_path / "picture.png").format == "PNG"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"b": 1, "a": [1]}, indent=None, sort_keys=True)
    assert path.read_text() == '{"a": [1], "b": 1}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1], "b": 1}
    assert list(tmp_path.iterdir()) == [path]
