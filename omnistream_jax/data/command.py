"""The command lines of data/: flags of their own, and errors that are one message."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import flags

from omnistream_jax.data.errors import DataError
from omnistream_jax.utils.lock import WorkdirLockedError

EXIT_ERROR = 1  # an error that the message explains
EXIT_USAGE = 2  # flags or settings that cannot work: starting again cannot help
EXIT_STOPPED = 130  # by Ctrl-C, as shells have it


OPTION_HELP = "NAME=VALUE, a further argument of the reader: a number, true or false, else a text."

T = TypeVar("T")


class UsageError(DataError):
    """Flags or settings that cannot work; the message names them."""


def run(main: Callable[[], int | None], values: flags.FlagValues, usage: str, argv: Sequence[str] | None = None) -> int:
    """Parses the command line into `values` and calls main().

    Args:
      main: the command; returns its exit status, None for 0.
      values: its flags, not absl's global ones: several commands of one process would clash there.
      usage: what --help tells above the flags.
      argv: the command line with the program's name; None takes this process's.

    Returns:
      The exit status: main's, 1 after a DataError or an OSError, 2 after a UsageError or flags that cannot be parsed.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        if {"--help", "-h", "-help"} & set(argv[1:]):
            print(f"{usage}\n{values.get_help()}")
            return 0
        rest = values(argv)
        if len(rest) > 1:
            raise UsageError(f"unexpected argument {rest[1]!r}: flags are given as --name=value")
        return main() or 0
    except flags.Error as error:
        return _tell(" ".join(str(error).split()), EXIT_USAGE)
    except UsageError as error:
        return _tell(str(error), EXIT_USAGE)
    except (DataError, WorkdirLockedError, OSError) as error:
        return _tell(str(error), EXIT_ERROR)
    except KeyboardInterrupt:
        return _tell("stopped", EXIT_STOPPED)


def usage(function: Callable[[str], T], value: str) -> T:
    """function(value), whose DataError is about a flag: raises it as a UsageError."""
    try:
        return function(value)
    except DataError as error:
        raise UsageError(str(error)) from error


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """{name: value} of flags of OPTION_HELP. Raises UsageError for another form."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option={pair}: expected NAME=VALUE")
        options[name] = json.loads(value) if re.fullmatch(r"true|false|-?(0|[1-9]\d*)(\.\d+)?", value) else value
    return options


def _tell(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status
