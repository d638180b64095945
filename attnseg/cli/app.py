"""Group of all commands: one-line errors, exit codes, and the options of every command.

Exit codes: 0 if everything was done, 1 if something failed, 2 for wrong usage, 130 if stopped.
"""

from __future__ import annotations

import traceback
from typing import Any

import click

from attnseg._version import __version__
from attnseg.cli.console import Manner, error_record, manner, print_document, print_error
from attnseg.cli.doctor import doctor
from attnseg.cli.evaluate import evaluate, explain
from attnseg.cli.export import export, inspect, verify
from attnseg.cli.imports import monai, nnunet, torchscript
from attnseg.cli.parameters import HeadedOption
from attnseg.cli.run import demo, run
from attnseg.cli.train import ablate, summary, train
from attnseg.interrupt import INTERRUPTED
from attnseg.runtime.errors import AttnsegError, ConfigError
from attnseg.runtime.limits import limit_reached, unforeseen

_FAILED, _WRONG_USAGE = 1, 2
_MESSAGES = "Messages"


class _Group(click.Group):
    """Prints errors that the user can fix in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            with error.ctx or ctx as failed:
                print_document({"error": error_record(error)})
                text = f"error: {error.format_message()} See {failed.command_path} --help"
                click.echo(text, err=True)
            ctx.exit(_WRONG_USAGE)
        except KeyboardInterrupt as error:
            click.echo("; ".join(("stopped", *error.args)), err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # BrokenPipeError: the reader of standard output has closed it
        except Exception as error:
            of_system = isinstance(error, OSError) and not limit_reached(error)
            expected = of_system or isinstance(error, AttnsegError)
            with self._context_of(ctx):
                if manner().debug:
                    traceback.print_exception(error)
                print_error(error if expected else unforeseen(error))
            ctx.exit(_WRONG_USAGE if isinstance(error, ConfigError) else _FAILED)

    def _context_of(self, ctx: click.Context) -> click.Context:
        """Context of the command that failed, for the options that the mend names."""
        name = ctx.invoked_subcommand or ""
        command = self.commands.get(name)
        return click.Context(command, parent=ctx, info_name=name) if command else ctx


def _set(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    chosen = ctx.find_root().ensure_object(Manner)
    setattr(chosen, str(parameter.name), value)
    if chosen.quiet and chosen.verbose:
        raise click.UsageError("--quiet and --verbose exclude each other.", ctx)


def _flag(name: str, text: str) -> HeadedOption:
    return HeadedOption(
        [name],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set,
        heading=_MESSAGES,
        help=text,
    )


def _add(group: click.Group, command: click.Command) -> None:
    """Add a command, with the options on what is printed."""
    command.params += [
        _flag("--quiet", "Print only errors, warnings and the result."),
        _flag("--verbose", "Print also stages, engine, reasons and timings."),
        _flag("--debug", "Show the traceback of an error."),
    ]
    if command in _WITH_DOCUMENT:
        text = "Print the result as one JSON document on standard output (docs/commands.md)."
        command.params.append(_flag("--json", text))
    group.add_command(command)


_WITH_DOCUMENT = (run, evaluate, verify, inspect, summary, doctor)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="attnseg")
def main() -> None:
    """Train, export and run 3-D segmentation networks for medical scans."""


@main.group(name="import", cls=_Group)
def import_group() -> None:
    """Make a bundle of a model of nnU-Net, MONAI or TorchScript, with its steps unchanged."""


for _command in (nnunet, monai, torchscript):
    _add(import_group, _command)

for _command in (
    run,
    demo,
    train,
    evaluate,
    export,
    verify,
    inspect,
    ablate,
    summary,
    explain,
    doctor,
):
    _add(main, _command)
