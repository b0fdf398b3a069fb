"""A device without memory left, told in one error."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def full_device_told(kind: type[Exception], hint: str) -> Iterator[None]:
    """Raises `kind`, which says what to set, where a program in the block finds no memory on its device.

    Args:
        kind: of the error.
        hint: what of the config needs less, as "a smaller window".
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise kind(f"the device ran out of memory; set {hint}") from error
