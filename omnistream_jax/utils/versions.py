"""Which code has made something."""

import contextlib
import functools
import importlib.metadata
import subprocess
from pathlib import Path

_PACKAGES = ("omnistream_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of those that decide a run's bits: {"omnistream_jax": "0.1.0", "jax": ..., ...}.

    In a checkout of git also "commit", as in "f25ca45" or, with changes, "f25ca45-dirty".
    """
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    commit = _commit(Path(__file__).parents[2])
    return found | ({"commit": commit} if commit else {})


def _commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():  # else git would look further up, and find another project
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip() or None
    return None
