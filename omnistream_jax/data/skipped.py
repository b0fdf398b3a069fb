"""Samples that cannot be used: the next record takes their place, they are counted, and too many stop the run.

A record is counted when the shuffle draws it, and not when it is tried in another's place: so after a pass over a
source its counts are those of its damaged records. Drawing happens in workers, counting in the main process, over
what each batch brings along: batches and counts do not depend on how many workers there are.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np

from omnistream_jax.data.errors import DataError, require_field

UNTOLD = "cannot be used"  # the reason of an error that gives none
TRIES = 100  # records in a row; where so many fail, the source as a whole does
WINDOW = 100  # draws of a source over which its share of failures is taken
SHOWN = 3  # messages in the error that stops a run

T = TypeVar("T")


class NamedRecords(Protocol):
    """What is asked of a source here."""

    name: str

    def __len__(self) -> int:
        """How many records there are."""


class Skips(TypedDict):
    """What a batch brings along about its records: one a sample, or [B, K] where a sample holds K.

    Keys:
      drawn: int64 [B], the record that the shuffle drew; the batch's "record" is the one that was used.
      reason: str [B], why the drawn record could not be used; "" where it was.
      message: str [B], the error's message; likewise.
    """

    drawn: np.ndarray
    reason: np.ndarray
    message: np.ndarray


def first_usable(source: NamedRecords, index: int, make: Callable[[int], T]) -> tuple[int, T, DataError | None]:
    """Makes a sample of record `index` or, if that fails, of the next one of the same source that can be used.

    Args:
      source: the last record is followed by the first.
      index: of the record to begin with.
      make: makes a sample of a record; raises DataError where it cannot.

    Returns:
      The index of the record that was used, its sample, and the error of record `index`, None if there was none.

    Raises:
      DataError: `TRIES` records in a row, or all that there are, fail.
    """
    first = None
    tries = min(len(source), TRIES)
    for place in ((index + offset) % len(source) for offset in range(tries)):
        try:
            return place, make(place), first
        except DataError as error:
            first, last = first or error, error
    which = f"none of its {tries} records" if tries == len(source) else f"none of {tries} records in a row"
    raise DataError(f"source {source.name}: {which} can be used; the last error: {last}", reason=last.reason) from last


def skip_entry(drawn: int, error: DataError | None) -> dict[str, Any]:
    """One sample's part of `Skips`; batching stacks them."""
    reason, message = ("", "") if error is None else (error.reason or UNTOLD, str(error))
    return {"drawn": np.int64(drawn), "reason": reason, "message": message}


class SkipCounter:
    """Counts what was skipped, per source and reason, and refuses to go on when a source fails too often."""

    def __init__(self, max_failed_fraction: float):
        fits = 0 <= max_failed_fraction <= 1
        require_field(fits, "max_failed_fraction", max_failed_fraction, "a share, 0 to 1")
        self._limit = max_failed_fraction
        self._counts: dict[str, collections.Counter[str]] = {}
        self._drawn: dict[tuple[str, str], collections.deque[str]] = {}  # reasons, the newest last
        self._messages: dict[tuple[str, str], collections.deque[str]] = {}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{source name: {reason: samples}}, of the sources that had any."""
        return {source: dict(reasons) for source, reasons in self._counts.items()}

    def add(self, task: str, sources: Iterable[NamedRecords], skips: Skips) -> None:
        """Counts a batch.

        Args:
          task: its name. A source that serves several tasks must do well in each of them.
          sources: the source of each draw, row by row.
          skips: of the batch.

        Raises:
          DataError: more than the allowed share of a source's last `WINDOW` draws failed.
        """
        keys = [(task, source.name) for source in sources]
        told = (skips[field].ravel().tolist() for field in ("reason", "message"))
        for key, reason, message in zip(keys, *told, strict=True):
            self._drawn.setdefault(key, collections.deque(maxlen=WINDOW)).append(reason)
            if reason:
                self._counts.setdefault(key[1], collections.Counter())[reason] += 1
                self._messages.setdefault(key, collections.deque(maxlen=SHOWN)).append(message)
        for key in dict.fromkeys(keys):
            self._check(key)

    def _check(self, key: tuple[str, str]) -> None:
        drawn = self._drawn[key]
        failed = collections.Counter(filter(None, drawn))
        if len(drawn) < WINDOW or failed.total() <= self._limit * WINDOW:
            return
        reasons = ", ".join(f"{reason} ({count})" for reason, count in failed.most_common())
        examples = "".join(f"\n  {message}" for message in self._messages[key])
        raise DataError(
            f"source {key[1]} of task {key[0]}: {failed.total()} of its last {WINDOW} samples could not be used, at "
            f"most {self._limit:.0%} may: {reasons}. The last:{examples}"
        )
