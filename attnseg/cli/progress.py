"""Progress of commands on standard error: a bar on a terminal, elsewhere plain lines.

With `--verbose` the lines are printed on a terminal too, with `--quiet` nothing is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from attnseg.cli.console import LIVE, console, detail, manner, note
from attnseg.interrupt import leaving_on_interrupt
from attnseg.runtime.limits import check_address_space

_LEAST_BYTES = {"torch": 2_000_000_000}
"""Address space that a module needs; PyTorch ends a process that has less while it is loaded."""
_ERASE_LINE = "\r\033[2K"


@contextmanager
def _bar() -> Iterator[Progress]:
    """Draw a transient bar on standard error, unless that is no terminal, or with `--quiet`."""
    shown = console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TimeElapsedColumn())
    disable = manner().quiet or not shown.is_terminal
    with Progress(*columns, console=shown, transient=True, disable=disable) as bar:
        if disable:
            yield bar
            return
        LIVE.append(bar.console)
        try:
            yield bar
        finally:
            LIVE.pop()


@contextmanager
def loading(what: str, module: str) -> Iterator[None]:
    """Say what is loaded while a large module is imported, and end at once on Ctrl-C.

    Args:
        what: Name for people, such as `PyTorch`.
        module: Name of the module; nothing is said if it is loaded already, nor by the second and
            later processes of `torchrun`.

    Raises:
        ResourceError: The process may not address as much memory as the module needs.
    """
    check_address_space(_LEAST_BYTES.get(module, 0), what)
    text, erasable = f"loading {what}", console(stderr=True).is_terminal
    silent = manner().quiet or module in sys.modules or os.environ.get("RANK", "0") != "0"
    begun = time.monotonic()
    if not silent:
        click.echo(text, err=True, nl=not erasable)
    try:
        with leaving_on_interrupt():
            yield
    finally:
        if erasable and not silent:
            click.echo(_ERASE_LINE, err=True, nl=False)
    detail(f"{text}: {time.monotonic() - begun:.1f} s")


class CaseProgress:
    """Progress over cases: one bar for all of them, or a line for each that has ended."""

    def __init__(self, bar: Progress, cases: int) -> None:
        """Show progress on a bar, which may be disabled."""
        self._bar, self._cases, self._ended = bar, cases, 0
        self._task = bar.add_task("", total=cases)

    def case_started(self, name: str) -> None:
        """See `attnseg.runtime.folder.Listener`."""
        place = f"{min(self._ended + 1, self._cases)}/{self._cases}"
        self._bar.update(self._task, description=f"{place} {name}", completed=self._ended)

    def case_advanced(self, share: float) -> None:
        """See `attnseg.runtime.folder.Listener`."""
        self._bar.update(self._task, completed=self._ended + share)

    def case_ended(self, name: str, status: str, elapsed_s: float | None = None) -> None:
        """Count a case that has ended.

        Args:
            name: Name of the case.
            status: Such as `done` or `failed`.
            elapsed_s: Time that the case took; None if it is not of interest.
        """
        self._ended += 1
        self._bar.update(self._task, completed=self._ended)
        say = note if self._bar.disable else detail
        took = "" if elapsed_s is None else f", {elapsed_s:.1f} s"
        say(f"{self._ended}/{self._cases} {name}: {status}{took}")


@contextmanager
def case_progress(cases: int) -> Iterator[CaseProgress]:
    """Show the progress over a number of cases."""
    with _bar() as bar:
        yield CaseProgress(bar, cases)


class StageProgress:
    """Progress over stages of unknown number: a line as each begins, and a bar on a terminal."""

    def __init__(self, bar: Progress) -> None:
        """Show progress on a bar, which may be disabled."""
        self._bar, self._task = bar, bar.add_task("", total=None)
        self._name, self._begun = "", 0.0

    def step(self, name: str) -> None:
        """Begin a stage."""
        self.end()
        self._name, self._begun = name, time.monotonic()
        self._bar.update(self._task, description=name, total=None)
        note(name)

    def part(self, phase: str, done: int, steps: int) -> None:
        """Show the progress within a stage."""
        self._bar.update(self._task, description=phase, completed=done, total=steps)

    def end(self) -> None:
        """End the current stage, if there is one."""
        if self._name:
            detail(f"{self._name}: {time.monotonic() - self._begun:.1f} s")


@contextmanager
def stage_progress() -> Iterator[StageProgress]:
    """Show the progress over stages."""
    with _bar() as bar:
        stages = StageProgress(bar)
        yield stages
        stages.end()


def ended_cases(progress: CaseProgress) -> Callable[[str, Exception | None], None]:
    """Return a function to call as each case ends, with its name and error, which times them."""
    begun = time.monotonic()

    def ended(name: str, error: Exception | None) -> None:
        nonlocal begun
        now = time.monotonic()
        progress.case_ended(name, "failed" if error else "done", None if error else now - begun)
        begun = now

    return ended


@contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """Say on Ctrl-C in the block what remains of the work.

    Args:
        what: Function that returns what remains, such as `finished cases are kept`.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(what()) from error
