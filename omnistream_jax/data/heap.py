"""Memory that decoding leaves scattered over the C heap, given back to the system now and then."""

import ctypes
import itertools

_EVERY = 100
_calls = itertools.count(1)
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


def trim_now_and_then() -> None:
    """To be called once a decoded file: every hundredth call takes some milliseconds.

    Each video leaves a few kilobytes between what is still in use. Without this a worker grows by some 10 MB a minute.
    """
    if next(_calls) % _EVERY == 0 and _trim is not None:
        _trim(0)
