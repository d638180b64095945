"""Limits of the operating system on a process: memory, threads and open files.

Libraries report a limit in many ways, from `MemoryError` to a C++ exception in the text of a
`RuntimeError`; some end the process. This module imports the standard library and errors alone,
since it is used before other modules are loaded.
"""

from __future__ import annotations

import errno
import re

from attnseg.runtime.errors import AttnsegError, ResourceError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_MEMORY = (
    re.compile(
        r"bad_alloc|can't alloc|(cannot|can't|failed to|unable to) allocate|failed to map segment",
        re.IGNORECASE,
    ),
    (errno.ENOMEM,),
    "not enough memory",
    "close other programs, raise the limit on memory (ulimit -v) or use a smaller window",
)
_THREADS = (
    re.compile(r"can't start new thread|resource temporarily unavailable", re.IGNORECASE),
    (errno.EAGAIN,),
    "no further thread can be started",
    "raise the limits on processes (ulimit -u) and memory (ulimit -v)",
)
_FILES = (
    re.compile(r"too many open files", re.IGNORECASE),
    (errno.EMFILE, errno.ENFILE),
    "too many open files",
    "raise the limit on open files (ulimit -n)",
)


def limit_reached(error: BaseException) -> ResourceError | None:
    """Error for the limit that an exception or one of its causes reports; None if it is another."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, MemoryError):
            return ResourceError(*_MEMORY[2:])
        for text, numbers, cause, mend in (_MEMORY, _THREADS, _FILES):
            if getattr(current, "errno", None) in numbers or text.search(str(current)):
                return ResourceError(cause, mend)
        current = current.__cause__ or current.__context__
    return None


def unforeseen(error: Exception, where: str = "") -> AttnsegError:
    """Error for an exception that no code expects; its text begins with `where`."""
    found = limit_reached(error) or AttnsegError(f"unexpected {type(error).__name__} ({error})")
    found.cause = f"{where}{found.cause}"
    found.__cause__ = error
    return found


def check_address_space(least_bytes: int, purpose: str) -> None:
    """Raise `ResourceError` if the process may address less than `least_bytes` of memory.

    Libraries that find too little while they are loaded hang, or end the process.
    """
    if resource is None:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < least_bytes:
        raise ResourceError(
            f"{purpose} needs {least_bytes / 1e9:.1f} GB of address space, the limit of this "
            f"process is {limit / 1e9:.2f} GB",
            f"raise it with ulimit -v {-(-least_bytes // 1024)} or more",
        )
