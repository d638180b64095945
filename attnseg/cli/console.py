"""Output of commands: results on standard output, messages and errors on standard error.

Every command prints its result in two forms, of which one is shown: lines and tables for people
(`show`, `print_table`, `console`), or with `--json` one document (`print_document`).
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from attnseg._version import __version__
from attnseg.runtime.errors import AttnsegError, ChannelSetting, Setting, TrainingSetting
from attnseg.runtime.text import one_line


@dataclass
class Manner:
    """How the running command prints, as set by the options that every command has.

    Attributes:
        quiet: Whether only errors, warnings and the result are printed.
        verbose: Whether stages, reasons and timings are printed too.
        json: Whether the result is a JSON document.
        debug: Whether tracebacks of errors are printed.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    debug: bool = False


def manner() -> Manner:
    """Return how the running command prints; the default outside of a command."""
    ctx = click.get_current_context(silent=True)
    return ctx.find_root().ensure_object(Manner) if ctx else Manner()


def console(stderr: bool = False) -> Console:
    """Return a console without markup: brackets occur in file names and in pip extras.

    With `--json`, the console of standard output is silent.
    """
    silent = manner().json and not stderr
    return Console(stderr=stderr, markup=False, highlight=False, quiet=silent)


def show_log() -> None:
    """Print the log of attnseg, and of no other package, on standard error."""
    chosen = manner()
    level = logging.WARNING if chosen.quiet else logging.DEBUG if chosen.verbose else logging.INFO
    logging.basicConfig(format="%(message)s")
    logging.getLogger("attnseg").setLevel(level)


LIVE: list[Console] = []
"""Console of a bar that is being drawn, which messages must go through to stay above it."""


def tell(text: str) -> None:
    """Print a line on standard error, above a bar that is being drawn."""
    if LIVE:
        LIVE[-1].print(one_line(text), soft_wrap=True)
    else:
        click.echo(one_line(text), err=True)


def show(text: str) -> None:
    """Print a line of the result, unless it is a JSON document."""
    if not manner().json:
        click.echo(one_line(text))


def note(text: str) -> None:
    """Print a message on standard error, unless `--quiet` is set."""
    if not manner().quiet:
        tell(text)


def detail(text: str) -> None:
    """Print a message on standard error if `--verbose` is set."""
    if manner().verbose:
        tell(text)


def print_document(document: Mapping[str, Any]) -> None:
    """Print the result as one JSON document on standard output, if `--json` is set.

    Args:
        document: Fields of the result; paths become strings. Version and command come first.
    """
    if manner().json:
        head = {"attnseg": __version__, "command": click.get_current_context().info_name}
        click.echo(json.dumps({**head, **document}, indent=2, default=str))


def error_record(error: Exception) -> dict[str, str]:
    """Fields of an error in a JSON document; the mend names settings as options."""
    if isinstance(error, click.UsageError):
        return {"type": "UsageError", "cause": error.format_message(), "mend": ""}
    if not isinstance(error, AttnsegError):
        return {"type": type(error).__name__, "cause": in_one_line(error), "mend": ""}
    mend = AttnsegError("", error.mend, *error.settings)
    return {
        "type": type(error).__name__,
        "cause": in_one_line(error.cause),
        "mend": in_one_line(mend).removeprefix("; "),
    }


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
        return one_line(f"{error.filename}: {error.strerror}")
    text = error.describe(as_option) if isinstance(error, AttnsegError) else str(error)
    return one_line(" ".join(text.split()))


def _hint(error: Exception) -> str:
    """Hint at the traceback of an unforeseen error, unless it is shown."""
    unforeseen = error.__cause__ is not None and type(error) is AttnsegError
    return " (--debug shows the traceback)" if unforeseen and not manner().debug else ""


def print_error(error: Exception) -> None:
    """Print the error of a whole command on standard error, and in the JSON document."""
    print_document({"error": error_record(error)})
    click.echo(f"error: {in_one_line(error)}{_hint(error)}", err=True)


def print_case_error(name: str, error: AttnsegError) -> None:
    """Print the error of one case on standard error, with its traceback if `--debug` is set."""
    if manner().debug:
        traceback.print_exception(error)
    tell(f"{name}: {in_one_line(error)}{_hint(error)}")


def print_warnings(name: str, warnings: Iterable[str]) -> None:
    """Print the warnings of one case on standard error."""
    for warning in warnings:
        tell(f"{name}: warning: {warning}")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> None:
    """Print a table on standard output, columns from index `numbers_from` on right-aligned."""
    table = Table()
    for place, title in enumerate(header):
        number = place >= numbers_from
        table.add_column(title, overflow="fold", justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(one_line, row))
    console().print(table)
