"""Ctrl-C and SIGTERM during training: recorded, and acted on when the state is consistent."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class Interrupt:
    """Record of a request to stop.

    Attributes:
        asked: Whether a stop was requested.
    """

    def __init__(self) -> None:
        self.asked = False

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal; a second one of the same kind raises `KeyboardInterrupt` at once."""
        if not self.asked:
            log.info("stopping after this step; Ctrl-C again stops at once, without saving it")
        self.asked = True
        signal.signal(number, signal.default_int_handler)


@contextmanager
def noted_interrupts() -> Iterator[Interrupt]:
    """Record SIGINT and SIGTERM instead of stopping.

    Has no effect outside the main thread, where Python installs no signal handlers.
    """
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
