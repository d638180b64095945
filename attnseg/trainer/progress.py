"""Progress of the long stages of a run: a bar on a terminal, and elsewhere lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from attnseg.trainer.devices import first_process

LINE_SECONDS = 10.0
"""Shortest time between two lines of a stage."""
log = logging.getLogger(__name__)

Advance = Callable[[str], None]
"""Function called after each part of a stage, with its name or result."""


@contextmanager
def shown_progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show the progress of a stage; only the first process shows it.

    Args:
        title: Title of the stage.
        total: Number of parts of the stage.
        done: Number of parts that are done already.

    Yields:
        Function to call after each part.
    """
    console = Console(stderr=True)
    if not (first_process() and log.isEnabledFor(logging.INFO)):
        yield lambda _: None
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda _: bar.advance(task)
    else:
        yield _Lines(title, total, done).advance


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


class _Lines:
    """Lines in the log, at most one per `LINE_SECONDS`: a short stage has none."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        self._last = time.monotonic()

    def advance(self, part: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            log.info("%s: %d of %d (%s)", self._title, self._done, self._total, part)
