"""What compiling costs: XLA's compilations counted and timed, and JAX's cache of compiled programs on disk."""

import dataclasses
import os
import tempfile
import threading
from pathlib import Path

import jax

# Events of JAX. The first covers every program that is made ready to run, compiled or read from the cache.
_PROGRAM = "/jax/core/compile/backend_compile_duration"
_FROM_CACHE = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Programs made ready in a while: how many, in how many seconds, and how many of them came from the cache."""

    programs: int = 0
    seconds: float = 0.0
    from_cache: int = 0

    def __str__(self) -> str:
        """ "compiled 4 programs in 12.3 s (3 from the cache)"."""
        noun = "program" if self.programs == 1 else "programs"
        return f"compiled {self.programs} {noun} in {self.seconds:.1f} s ({self.from_cache} from the cache)"


class CompileCounter:
    """Counts from its making until `close` (or use `with`), in all threads of this process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._programs, self._seconds, self._from_cache = 0, 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration: float, **_) -> None:
        if event == _PROGRAM:
            with self._lock:
                self._programs += 1
                self._seconds += duration

    def _on_event(self, event: str, **_) -> None:
        if event == _FROM_CACHE:
            with self._lock:
                self._from_cache += 1

    @property
    def total(self) -> Compiled:
        """What has been compiled so far."""
        with self._lock:
            return Compiled(self._programs, self._seconds, self._from_cache)

    def close(self) -> None:
        """Stops counting; `total` stays."""
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def __enter__(self) -> "CompileCounter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def keep_compiled(directory: str) -> str | None:
    """Keeps compiled programs in a directory, so that a later start loads them; call it before the first compilation.

    Every program is kept, however small: a second start then compiles nothing. The directory may be removed at any
    time. Whoever can write to it can run code in this process, so it should belong to the user alone.

    Args:
        directory: made where it is missing; "~" is the user's home. "" leaves all as it is. So does a directory that
            JAX has been given already, as by its own JAX_COMPILATION_CACHE_DIR.

    Returns:
        The directory in use, or None.

    Raises:
        OSError: the directory cannot be made or written.
    """
    if jax.config.jax_compilation_cache_dir or not directory:
        return jax.config.jax_compilation_cache_dir
    path = Path(directory).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    jax.config.update("jax_compilation_cache_dir", os.fspath(path.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return jax.config.jax_compilation_cache_dir
