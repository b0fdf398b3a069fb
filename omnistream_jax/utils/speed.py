"""How fast the steps of a loop are, and where their time goes."""

import dataclasses
import time
from collections.abc import Callable, Mapping


class StepClock:
    """Shares the time of a loop out to its parts: whatever has passed since the last charge goes to the part named.

    Every moment belongs to one part, so that parts add up to the whole. Asking the clock is all that it costs.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._last = now()
        self._parts: dict[str, float] = {}

    def charge(self, part: str) -> None:
        """What has happened since the last call was this part."""
        moment = self._now()
        self._parts[part] = self._parts.get(part, 0.0) + moment - self._last
        self._last = moment

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last time that this was asked."""
        parts, self._parts = self._parts, {}
        return parts


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of the steps since the last line.

    Attributes:
        steps: how many.
        seconds: of each part, all steps together; "other" is what a reader need not see.
        counts: what was done, by its plural name, as {"images": 640, "frames": 160}.
        utilisation: share of the devices' peak, 0 to 1; None where the peak is not known.
    """

    steps: int
    seconds: Mapping[str, float]
    counts: Mapping[str, float]
    utilisation: float | None = None

    @property
    def total_seconds(self) -> float:
        """Of all parts."""
        return sum(self.seconds.values())

    def values(self) -> dict[str, float]:
        """For files: seconds a step of each part and together, everything a second, and "mfu" where it is known."""
        values = {f"seconds_{part}": seconds / self.steps for part, seconds in self.seconds.items()}
        values["seconds_per_step"] = self.total_seconds / self.steps
        values |= {f"{name}_per_second": count / self.total_seconds for name, count in self.counts.items()}
        return values if self.utilisation is None else values | {"mfu": self.utilisation}

    def __str__(self) -> str:
        """ "61 images/s, 36 frames/s | MFU 41% | data 3%, device 96%, save 1%"."""
        parts = [", ".join(f"{_rate(count / self.total_seconds)} {name}/s" for name, count in self.counts.items())]
        if self.utilisation is not None:
            parts.append(f"MFU {100 * self.utilisation:.0f}%")
        shares = {part: seconds / self.total_seconds for part, seconds in self.seconds.items() if part != "other"}
        parts.append(", ".join(f"{part} {100 * share:.0f}%" for part, share in shares.items()))
        return " | ".join(part for part in parts if part)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
