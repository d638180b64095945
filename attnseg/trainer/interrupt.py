"""Ctrl-C and SIGTERM during training: noted, and acted on when the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, number: int, _: FrameType | None) -> None:
        """A signal handler. A second signal of the kind raises `KeyboardInterrupt` at once."""
        self.asked = True
        signal.signal(number, signal.default_int_handler)


@contextmanager
def noted_interrupts() -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM instead of stopping; in the main thread only, as Python asks."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {
        number: signal.signal(number, interrupt.note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
