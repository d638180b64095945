"""Options that several commands share, and the headings that group them in the help."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from attnseg.cli.console import show_log

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Decorator = Callable[[_Function], _Function]


class _Path(click.Path):
    """A path. Refused are a null character, and no text, which `pathlib` takes for `.`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if value == "":  # such as an unset variable of the shell
            self.fail("the path is empty; give . for the current folder.", param, ctx)
        if "\0" in str(value):
            self.fail(f"{value!r} holds a null character, which no path can.", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
EVERYDAY = "Options"
MODALITIES = "Files by channel, instead of SCAN_DIR"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class HeadedOption(click.Option):
    """An option under a heading of the help."""

    def __init__(self, *args: Any, heading: str = EVERYDAY, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class HeadedCommand(click.Command):
    """A command whose help lists everyday options first and the others under headings."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command.invoke`."""
        show_log()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command.format_options`."""
        headings: dict[str, list[tuple[str, str]]] = {EVERYDAY: []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the text above explains it
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "heading", EVERYDAY)
                headings.setdefault(heading, []).append(record)
        for heading, records in headings.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def command() -> Callable[[Callable[..., Any]], click.Command]:
    """Decorate as `click.command`, with headings in the help."""
    return click.command(cls=HeadedCommand)


def option(*names: str, heading: str = EVERYDAY, **attributes: Any) -> _Decorator[Any]:
    """Decorate as `click.option`, under a heading of the help."""
    return click.option(*names, cls=HeadedOption, heading=heading, **attributes)


def together(*decorators: _Decorator[Any]) -> _Decorator[Any]:
    """Combine several options, in their order, into one decorator."""

    def decorate(function: _Function) -> _Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Parse an amount of memory with its unit, such as `4GB`, to bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", value.strip().upper())
    if not found:
        raise click.BadParameter(
            f"give an amount with its unit, such as 4GB or 500MB, got {value!r}."
        )
    return int(float(found[1]) * _UNITS[found[2]])


def parse_pairs(example: str, empty: bool = False) -> Callable[..., dict[str, str]]:
    """Return a callback that parses options of the form NAME=VALUE.

    Args:
        example: Example for the text of the error.
        empty: Whether VALUE may be empty.
    """

    def parse(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
        pairs = [value.partition("=") for value in values]
        for value, (name, equals, text) in zip(values, pairs, strict=True):
            if not (name and equals and (text or empty)):
                raise click.BadParameter(f"give {example}, got {value!r}.")
        return {name: text for name, _, text in pairs}

    return parse


def output_option(default: str | None, help_text: str) -> _Decorator[Any]:
    """Option for the folder of a command's results; required if there is no default."""
    # An explicit default of None would count as a value.
    given: dict[str, Any] = {"default": Path(default), "show_default": True} if default else {}
    return option("-o", "--output", type=PATH, required=default is None, help=help_text, **given)


bundle_option = option("--model", type=PATH, help="Model bundle.  [default: the shipped model]")
trained_option = option(
    "--model",
    type=PATH,
    help="Checkpoint (best.pt), weights.safetensors, or bundle.  [default: the shipped model]",
)
overwrite_option = option("--overwrite", is_flag=True, help="Replace existing results.")
