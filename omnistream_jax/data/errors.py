"""The one error that bad input data raises."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator


class DataError(ValueError):
    """Data that cannot be used: a missing, empty, truncated or wrong file, or a setting that does not fit it.

    The message names the file or the field, says what was found and what was expected; it is meant to be
    shown to a person as it is, without a stack trace.

    Attributes:
      reason: the kind of fault in a few words, the same for all files that have it, under which skipped samples are
        counted; None where nobody told.
    """

    def __init__(self, message: str, *, reason: str | None = None):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def because(reason: str) -> Iterator[None]:
    """Gives a DataError that leaves the block this reason, unless it has one."""
    try:
        yield
    except DataError as error:
        error.reason = error.reason or reason
        raise


def require_field(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises DataError, naming a setting and what was expected of it, unless the condition holds; NaN never does."""
    if not condition or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{field}: {value!r}, expected {expected}")
