"""How far a long job over many items is: a plain line on the terminal every few seconds."""

import datetime
import sys
import time
from typing import TextIO


class Progress:
    """Counts items and frames, and tells the rate and the time left.

    Args:
        sizes: of the items in bytes, by name; the time left counts them, as the number of frames is not known before.
        every: seconds between two lines.
        terminal: a text stream, standard output by default.
    """

    def __init__(self, sizes: dict[str, int], every: float, terminal: TextIO | None = None):
        self._sizes = {name: max(size, 1) for name, size in sizes.items()}
        self._every, self._terminal = every, terminal or sys.stdout
        self._shares = dict.fromkeys(sizes, 0.0)
        self._started = self._told = time.monotonic()
        self.done = self.failed = self.frames = 0

    def advance(self, name: str, frames: int, share: float) -> None:
        """An item has come to this share of its length with that many more frames."""
        self.frames += frames
        self._shares[name] = share
        if time.monotonic() - self._told >= self._every:
            self.tell()

    def end(self, name: str, failed: bool) -> None:
        """An item has ended."""
        self._shares[name] = 1.0
        self.done += not failed
        self.failed += failed

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def tell(self) -> None:
        """ "items 12/20 | 1,234 frames | 153.2 frames/s | left 0:01:45 | failed 2"."""
        self._told = time.monotonic()
        rate = self.frames / max(self.seconds, 1e-9)
        items = f"items {self.done + self.failed}/{len(self._sizes)}"
        parts = [items, f"{self.frames:,} frames", f"{rate:.1f} frames/s"]
        read = sum(self._shares[name] * size for name, size in self._sizes.items())
        if read > 0:
            left = (sum(self._sizes.values()) - read) / read * self.seconds
            parts.append(f"left {datetime.timedelta(seconds=round(left))}")
        if self.failed:
            parts.append(f"failed {self.failed}")
        self._terminal.write(" | ".join(parts) + "\n")
        self._terminal.flush()
