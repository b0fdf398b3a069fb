"""Configurations: reading the file that `--config` names, refusing what it does not know, comparing two.

A config file is a Python file with `get_config()` or `get_config(argument)`, which returns a `ConfigDict` that holds
every field. Nothing can be added from outside, and groups are set field by field, so a misspelt field is an error; each
error is one message for a reader.
"""

import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from omnistream_jax.utils.files import write_json

flags.disclaim_key_flags()  # --help lists --config with the flags of the module that calls define_flag

_NO_CONFIG = "--config=FILE.py[:ARGUMENT] is required"
_SHOWN = 4  # fields that a message lists
EXIT_REQUEUE = 75  # of an evaluation or extraction that SIGTERM has ended: the same command goes on (os.EX_TEMPFAIL)
EXIT_CONFIG = 2  # of a run whose configuration is wrong: starting it again cannot help
EXIT_ERROR = 1  # of a run that ended with another error that is explained in one message


class ConfigError(ValueError):
    """The configuration is wrong; the message names the file or the field and what was expected."""


def load(specification: str, overrides: Mapping[str, object] | None = None) -> ConfigDict:
    """The locked config of "FILE.py" or "FILE.py:ARGUMENT", with fields by dotted name set to other values.

    Raises ConfigError where the file is missing or fails, or a field does not exist, is a group or is of another type.
    """
    path, _, argument = specification.partition(":")
    config = _get_config(path, [argument] if ":" in specification else [])
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config file {path}: get_config must return a ConfigDict, got {type(config).__name__}")
    config.lock()
    for field, value in (overrides or {}).items():
        check_field(config, field)
        try:
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config field {field}: {error}") from error
    return config


def _get_config(path: str, arguments: list[str]) -> object:
    if not Path(path).is_file():
        folder = Path(path).parent
        near = _near(str(path), [str(file) for file in folder.glob("*.py")] if folder.is_dir() else [])
        looked = "" if Path(path).is_absolute() else f" (looked in {Path.cwd()})"
        raise ConfigError(f"config file {path} does not exist{near}{looked}")
    try:
        module_spec = importlib.util.spec_from_file_location("omnistream_config", path)
        if module_spec is None or module_spec.loader is None:
            raise ConfigError(f"config file {path} must be a Python file")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"config file {path} has no function get_config")
        _check_recipe(path, module.get_config, arguments)
        return module.get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"config file {where}: {type(error).__name__}: {error}") from error


def _check_recipe(path: str, get_config: Callable[..., object], arguments: list[str]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise ConfigError(f"{path} has no recipes, got {arguments[0]!r}") from None
        raise ConfigError(f"{path} needs a recipe: --config={path}:RECIPE") from None


def check_field(config: ConfigDict, field: str) -> None:
    """Raises ConfigError, with a suggestion, where the config has no field of this dotted name, or it is a group."""
    fields = _flatten(config, keep_groups=True)
    if field in fields:
        if isinstance(fields[field], (Mapping, ConfigDict)):
            inside = next(iter(fields[field]), None)
            hint = f"set its fields, as --config.{field}.{inside}=..." if inside else "this config has no fields in it"
            raise ConfigError(f"config field {field} is a group; {hint}")
        return
    if (whole := field.partition("[")[0]) in fields:
        raise ConfigError(f"config field {field}: {whole} is set as a whole, not by index")
    group = field.rpartition(".")[0]
    siblings = [name for name in fields if name.rpartition(".")[0] == group]
    same_end = [name for name in fields if name.rpartition(".")[2] == field.rpartition(".")[2]]
    near = _near(field, siblings) or _near(field, same_end, cutoff=0.0) or _near(field, fields)
    raise ConfigError(f"config field {field} does not exist{near}")


def check_fields(config: ConfigDict, chooser: str, names: Iterable[str]) -> None:
    """Raises ConfigError where the config lacks fields of what its field `chooser` names: it is another's config."""
    missing = [name for name in names if name not in config]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        lacks = f"it has no field {', '.join(missing[:_SHOWN])}{more}"
        raise ConfigError(f"{chooser}: this config is no config of {chooser} {config[chooser]} ({lacks})")


def _near(name: str, names: Iterable[str], cutoff: float = 0.75) -> str:
    matches = difflib.get_close_matches(name, list(names), 1, cutoff)
    return f"; did you mean {matches[0]}?" if matches else ""


# The command line


def define_flag() -> flags.FlagHolder[ConfigDict]:
    """Defines `--config=FILE.py[:ARGUMENT]`, with `--config.field=value` for each field; for `main`."""
    return config_flags.DEFINE_config_file("config", help_string="FILE.py[:ARGUMENT], a file with get_config")


def run(main: Callable[[list[str]], int | None], errors: tuple[type[Exception], ...] = ()) -> None:
    """Parses the flags, calls main(argv) and exits with its status: `absl.app.run` with errors for readers.

    A ConfigError is told in one message, without a stack trace, and ends with status 2; so do flags that cannot be
    parsed. The exceptions in `errors` are told likewise and end with status 1. Any other is a fault of the program
    and shows its stack trace.
    """

    def guarded(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except (ConfigError, *errors) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_ERROR

    app.run(guarded, flags_parser=_parse_or_exit)


def _parse_or_exit(argv: list[str]) -> list[str]:
    try:
        return parse_flags(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line into absl's FLAGS; returns [program]. Raises ConfigError for whatever is wrong with it."""
    try:
        expanded = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        _check_overrides(expanded)
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if flags.FLAGS["config"].value is None:
        raise ConfigError(_NO_CONFIG)
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}: flags are given as --name=value")
    return rest


def _check_overrides(arguments: list[str]) -> None:
    """Holds each --config.field of a command line against the file, before ml_collections, which tells it badly."""
    specification, names = None, []
    for position, argument in enumerate(arguments):
        if argument == "--":
            break
        flag, equals, value = argument.partition("=")
        if re.fullmatch(r"--?config", flag):
            specification = value if equals else "".join(arguments[position + 1 : position + 2])
        elif match := re.fullmatch(r"--?(?:no)?config\.(.+)", flag):
            names.append(match[1])
    if specification is None:
        if names:
            raise ConfigError(_NO_CONFIG)
        return
    config = load(specification)
    for name in names:
        check_field(config, name)
        if config_path.get_type(name, config) is NoneType:
            raise ConfigError(f"config field {name} has no type: its file must give it as placeholder(type)")


# Comparing


def _flatten(config: Mapping, prefix: str = "", keep_groups: bool = False) -> dict[str, object]:
    """{"optimizer.peak": 0.1, ...}; groups of fields by their own name too, where they are kept or empty."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        group = isinstance(value, (Mapping, ConfigDict))
        if not group or keep_groups or not value:
            flat[name] = value
        if group:
            flat |= _flatten(value, f"{name}.", keep_groups)
    return flat


def to_plain(config: ConfigDict) -> dict:
    """The config as JSON values: tuples become lists. Raises ConfigError, with the field, for anything else."""
    for field, value in _flatten(config.to_dict()).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config field {field} must be a JSON value, got {type(value).__name__}") from error
    return json.loads(json.dumps(config.to_dict()))


def diff(config_a: ConfigDict | Mapping, config_b: ConfigDict | Mapping) -> list[str]:
    """One line for each field that differs, sorted by name: "optimizer.peak: 0.1 -> 0.2"; a field may be "absent".

    16 and 16.0 do not differ, nor do two NaN.
    """
    plain = (to_plain(config) if isinstance(config, ConfigDict) else config for config in (config_a, config_b))
    flat_a, flat_b = (_flatten(config) for config in plain)
    return [
        f"{field}: {_show(flat_a, field)} -> {_show(flat_b, field)}"
        for field in sorted(flat_a.keys() | flat_b.keys())
        if _show(flat_a, field) != _show(flat_b, field) and flat_a.get(field, _ABSENT) != flat_b.get(field, _ABSENT)
    ]


_ABSENT = object()


def _show(flat: Mapping, field: str) -> str:
    return json.dumps(flat[field]) if field in flat else "absent"


def remember(config: ConfigDict, workdir: str | os.PathLike, may_change: Iterable[str] = ()) -> None:
    """Keeps the config in `workdir/config.json`, and refuses another one when the run is resumed there.

    As `remember_settings`, which see.
    """
    refusal = f"{workdir} holds a run with another config; use that one or another --workdir"
    remember_settings(to_plain(config), Path(workdir) / "config.json", refusal, may_change)


def remember_settings(settings: Mapping[str, object], path: Path, refusal: str, may_change: Iterable[str] = ()) -> None:
    """Keeps what a run's results depend on in a JSON file, and refuses other settings when the run is resumed.

    Several processes may do so at once.

    Args:
        settings: JSON values, tuples among them, in groups or not.
        path: of the file, in an existing directory.
        refusal: begins the message of a refusal.
        may_change: dotted names of fields, or of groups of fields, in which a resumed run may differ.

    Raises ConfigError that lists the fields that differ, or where the stored file cannot be read.
    """
    if path.exists():
        allowed = tuple(may_change)
        lines = diff(_read(path), json.loads(json.dumps(settings)))
        refused = [line for line in lines if not _covered(line.partition(": ")[0], allowed)]
        if refused:
            raise ConfigError(f"{refusal}:\n  " + "\n  ".join(refused))
        if not lines:
            return
    write_json(path, settings, sort_keys=True, durable=True)


def _covered(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _read(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return stored
    raise ConfigError(f"{path} cannot be read as the {path.stem} of an earlier run")
