"""What lies behind an exception: its root, and whether trying again may help."""

import errno
import re

_PASSING_NUMBERS = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ENOLCK),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
    *(errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
}
_PASSING_KINDS = (MemoryError, PermissionError, TimeoutError, ConnectionError)
_PASSING_STATUS = re.compile(
    r"\b(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): "
)
_NUMBER = re.compile(r"os_error_code='(\d+)'")  # as TensorStore tells it


def reason(error: BaseException) -> str:
    """The root of an exception in one line of at most some 300 characters: "OSError: [Errno 5] ..."."""
    root = _chain(error)[-1]
    text = " ".join(str(root).split())
    return f"{type(root).__name__}: {text[:300]}" + ("..." if len(text) > 300 else "")


def passing_failure(error: BaseException) -> BaseException | None:
    """What the machine did wrong, among an exception and those that it wraps; None where none says so.

    As memory, permission, open files, a file system or a host that cannot be reached: it tells nothing of what a file
    holds. A device that cannot read (EIO) is no such failure.
    """
    return next((link for link in _chain(error) if _is_passing(link)), None)


def _is_passing(error: BaseException) -> bool:
    numbers = {int(number) for number in _NUMBER.findall(str(error))}
    if isinstance(error, OSError):
        numbers.add(error.errno)
    known = isinstance(error, _PASSING_KINDS) or bool(numbers & _PASSING_NUMBERS)
    return known or _PASSING_STATUS.search(str(error)) is not None


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and those that it wraps, the root last."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return chain
