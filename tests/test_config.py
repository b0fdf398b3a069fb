import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from omnistream_jax import config as configs

REPOSITORY = Path(__file__).parents[1]
CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(argument="small"):
    if argument not in ("small", "large"):
        raise ValueError(f"unknown argument {argument!r}, expected small or large")
    config = ConfigDict()
    config.seed = 1
    config.argument = argument
    config.sizes = (1, 2)
    config.path = config_dict.placeholder(str)
    config.untyped = None
    config.optimizer = ConfigDict({"peak": 0.1, "steps": 10})
    return config
"""
PROGRAM = """
from absl import flags
from omnistream_jax import config

_CONFIG = config.define_flag()
flags.DEFINE_string("workdir", "runs/none", "where the run lies")

class Explained(Exception):
    pass

def main(argv):
    value = _CONFIG.value
    if value.seed == 7:
        raise Explained("loss is not finite in batch 3")
    if value.seed == 8:
        raise config.ConfigError("data.path: directory /nowhere does not exist")
    if value.seed == 9:
        raise RuntimeError("a fault of the program")
    print(value.argument, value.seed, value.sizes, value.path, value.optimizer.peak, value.is_locked)

if __name__ == "__main__":
    config.run(main, errors=(Explained,))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "quick.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run_program(tmp_path, config_file):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_the_command_line_sets_fields_and_the_argument(run_program):
    result = run_program(
        "--config=quick.py:large",
        "--config.seed=3",
        "--config.sizes=(3,4)",
        "--config.path=x",
        "--config.optimizer.peak",
        "2",
    )
    assert result.stdout == "large 3 (3, 4) x 2.0 True\n"
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=quick.py", "--config.optimizer.peek=1"],
            "optimizer.peek does not exist; did you mean optimizer.peak?",
        ),
        (["--config=quick.py", "--config.peak=1"], "peak does not exist; did you mean optimizer.peak?"),
        (["--config=quick.py", "--config.seed.x=1"], "seed.x does not exist"),
        (
            ["--config=quick.py", "--config.optimizer={'peek':1}"],
            "config field optimizer is a group; set its fields, as --config.optimizer.peak=...",
        ),
        (["--config=quick.py", "--config.seed=abc"], "--config.seed=abc: invalid literal for int()"),
        (["--config=quick.py", "--config.sizes[5]=1"], "sizes is set as a whole, not by index"),
        (["--config=quick.py", "--config.untyped=1"], "untyped has no type"),
        (["--config=quick.py:huge"], "quick.py, line 6: ValueError: unknown argument 'huge', expected small or large"),
        (["--config=qiuck.py"], "qiuck.py does not exist; did you mean quick.py? (looked in /"),
        (["--config=quick.py", "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        (["--config=quick.py", "more"], "unexpected argument 'more'"),
        (["--config.seed=1"], "--config=FILE.py[:ARGUMENT] is required"),
        ([], "--config=FILE.py[:ARGUMENT] is required"),
        (["--config=quick.py", "--config.seed=8"], "data.path: directory /nowhere does not exist"),
    ],
)
def test_a_wrong_configuration_ends_with_one_line_and_status_2(run_program, arguments, message):
    result = run_program(*arguments)
    assert result.returncode == configs.EXIT_CONFIG
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_an_explained_error_has_no_stack_trace_and_a_fault_has_one(run_program):
    explained = run_program("--config=quick.py", "--config.seed=7")
    assert (explained.returncode, explained.stderr) == (configs.EXIT_ERROR, "error: loss is not finite in batch 3\n")
    fault = run_program("--config=quick.py", "--config.seed=9")
    assert fault.returncode == 1
    assert "Traceback" in fault.stderr


def test_load_sets_fields_and_locks(config_file):
    config = configs.load(f"{config_file}:large", {"optimizer.peak": 0.5, "sizes": (7,)})
    assert (config.argument, config.optimizer.peak, config.sizes) == ("large", 0.5, (7,))
    with pytest.raises(AttributeError):
        config.new_field = 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimiser.peak": 1.0}, "did you mean optimizer.peak"),
        ({"seed": "one"}, "config field seed"),
        ({"optimizer": {"peak": 1.0}}, "config field optimizer is a group"),
    ],
)
def test_load_refuses_unknown_fields_and_other_types(config_file, overrides, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(str(config_file), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("def get_config():\n    return {}", "must return a ConfigDict, got dict"),
        ("config = 1", "no function get_config"),
        ("import no_such_module", "line 1: ModuleNotFoundError"),
        ("def get_config(recipe):\n    return {}", r"needs a recipe: --config=.*broken\.py:RECIPE"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(configs.ConfigError, match=rf"broken\.py.*{message}"):
        configs.load(str(path))


@pytest.mark.parametrize("name", ["stream", "extract", "evaluate_geometry"])
def test_a_recipe_of_a_file_that_has_none_is_refused(name):
    path = REPOSITORY / "configs" / f"{name}.py"
    with pytest.raises(configs.ConfigError, match=rf"{name}\.py has no recipes, got 'small'"):
        configs.load(f"{path}:small")


def test_diff_lists_changed_added_and_removed_fields():
    before = ConfigDict({"a": 1, "sizes": (1, 2), "group": {"x": 1.0, "y": None}, "old": {"z": 3}})
    after = ConfigDict({"a": 1, "sizes": (1, 2), "group": {"x": 2.0, "y": None}, "new": {"w": True}})
    assert configs.diff(before, after) == ["group.x: 1.0 -> 2.0", "new.w: absent -> true", "old.z: 3 -> absent"]
    assert configs.diff(before, configs.to_plain(before)) == []
    assert configs.diff({"x": 16, "y": math.nan}, {"x": 16.0, "y": math.nan}) == []


def test_a_workdir_refuses_another_config(config_file, tmp_path):
    configs.remember(configs.load(str(config_file)), tmp_path)
    configs.remember(configs.load(str(config_file)), tmp_path)
    changed = configs.load(str(config_file), {"seed": 2, "optimizer.peak": 0.3})
    with pytest.raises(configs.ConfigError) as caught:
        configs.remember(changed, tmp_path, may_change=["optimizer"])
    assert "seed: 1 -> 2" in str(caught.value)
    assert "peak" not in str(caught.value)


def test_fields_that_may_change_are_remembered_anew(config_file, tmp_path):
    configs.remember(configs.load(str(config_file)), tmp_path)
    configs.remember(configs.load(str(config_file), {"optimizer.peak": 0.3}), tmp_path, may_change=["optimizer"])
    configs.remember(configs.load(str(config_file), {"optimizer.peak": 0.3}), tmp_path)
    with pytest.raises(configs.ConfigError, match=r"optimizer\.peak: 0\.3 -> 0\.1"):
        configs.remember(configs.load(str(config_file)), tmp_path)


def test_a_stored_config_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(list(tmp_path.glob("config.json"))))
    configs.remember_settings({"seed": 1}, tmp_path / "config.json", "refused")
    assert synced == [[]]
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_a_cut_stored_config_is_named(config_file, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 1,')
    with pytest.raises(configs.ConfigError, match=r"config\.json cannot be read"):
        configs.remember(configs.load(str(config_file)), tmp_path)


def test_settings_that_are_no_config_are_kept_and_refused_alike(tmp_path):
    path = tmp_path / "settings.json"
    configs.remember_settings({"sizes": (1, 2), "window": 0}, path, "output: made otherwise")
    before = path.read_bytes()
    configs.remember_settings({"window": 0, "sizes": [1, 2]}, path, "output: made otherwise")
    with pytest.raises(configs.ConfigError) as caught:
        configs.remember_settings({"sizes": (1, 3), "window": 0}, path, "output: made otherwise")
    assert str(caught.value) == "output: made otherwise:\n  sizes: [1, 2] -> [1, 3]"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("[]")
    with pytest.raises(configs.ConfigError, match=r"settings\.json cannot be read as the settings of an earlier run"):
        configs.remember_settings({}, path, "output: made otherwise")


def test_a_field_that_json_does_not_know_is_named():
    with pytest.raises(configs.ConfigError, match=r"model\.width must be a JSON value, got set"):
        configs.to_plain(ConfigDict({"model": {"width": {1, 2}}}))
