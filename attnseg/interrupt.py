"""Ctrl-C while modules are imported: the process ends at once, with one line.

An exception would not do: extension modules turn a `KeyboardInterrupt` during their import into
errors of their own. This module imports the standard library alone, since it comes first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT."""


def _leave(_: int, __: FrameType | None) -> None:
    os.write(2, b"\nstopped\n" if os.isatty(2) else b"stopped\n")
    os._exit(INTERRUPTED)


@contextmanager
def leaving_on_interrupt() -> Iterator[None]:
    """End the process on Ctrl-C in the block, where nothing needs to be put in order.

    Has no effect where the caller ignores or handles SIGINT, nor outside the main thread.
    """
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
