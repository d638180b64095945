"""Terminal output of commands: errors with mends as options, tables, progress bars."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from attnseg.runtime.errors import AttnsegError, ChannelSetting, Setting, TrainingSetting


def console(stderr: bool = False) -> Console:
    """Return a console without markup: brackets occur in file names and in pip extras."""
    return Console(stderr=stderr, markup=False, highlight=False)


def debugging() -> bool:
    """Whether tracebacks are shown."""
    return bool(click.get_current_context().find_root().ensure_object(dict).get("debug"))


def _option_named(name: str) -> click.Option | None:
    """Option with a parameter's name: of the running command, else of any other command."""
    ctx = click.get_current_context()
    group = ctx.find_root().command
    others = group.commands.values() if isinstance(group, click.Group) else ()
    for command in (ctx.command, *others):
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name == name:
                return parameter
    return None


def as_option(setting: Setting) -> str:
    """Format a setting as an option of the command line, such as `--device cpu`."""
    value = setting.value
    if isinstance(setting, TrainingSetting):
        if isinstance(value, tuple):
            value = ",".join(f"{part:g}" for part in value)
        text = str(value).lower() if isinstance(value, bool) else value
        return "--set " + (setting.name if value is None else f"{setting.name}={text}")
    option = _option_named(setting.name)
    if option is None:
        channel = isinstance(setting, ChannelSetting)
        return f"--channel {setting.name}={value}" if channel else str(setting)
    if value is False and option.secondary_opts:
        return option.secondary_opts[0]
    name = max(option.opts, key=len)
    return name if value in (None, True, False) else f"{name} {value}"


def in_one_line(error: Exception | str) -> str:
    """Format an error in one line, with the mend's settings as options."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = error.describe(as_option) if isinstance(error, AttnsegError) else str(error)
    return " ".join(text.split())


def print_case_error(name: str, error: AttnsegError) -> None:
    """Print the error of one case on standard error, with its traceback if `--debug` is set."""
    if debugging():
        traceback.print_exception(error)
    unforeseen = error.__cause__ is not None and type(error) is AttnsegError
    hint = " (--debug shows the traceback)" if unforeseen and not debugging() else ""
    click.echo(f"{name}: {in_one_line(error)}{hint}", err=True)


def print_warnings(name: str, warnings: Iterable[str]) -> None:
    """Print the warnings of one case on standard error."""
    for warning in warnings:
        click.echo(f"{name}: warning: {warning}", err=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> None:
    """Print a table on standard output, columns from index `numbers_from` on right-aligned."""
    table = Table()
    for place, title in enumerate(header):
        number = place >= numbers_from
        table.add_column(title, overflow="fold", justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def progress_bar() -> Progress:
    """Return a transient bar on standard error; it is disabled if that is no terminal."""
    shown = console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)


@contextmanager
def case_progress(count: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar; yields a function to call with the name of each finished case."""
    with progress_bar() as progress:
        task = progress.add_task("", total=count)

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        yield advance
