"""Memory that decoding leaves behind, given back to the system now and then."""

import ctypes
import gc
import itertools

_EVERY = 100
_calls = itertools.count(1)
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


def trim_now_and_then() -> None:
    """To be called once a decoded file: every hundredth call takes some tens of milliseconds.

    A closed container waits in a cycle of references for Python's rare full collection, and what it held lies scattered
    over the C heap, between what is still in use.
    """
    if next(_calls) % _EVERY == 0:
        gc.collect()
        if _trim is not None:
            _trim(0)
