"""Group of all commands: one-line errors, and `--debug` for the traceback."""

from __future__ import annotations

import traceback
from typing import Any

import click

from attnseg._version import __version__
from attnseg.cli.console import debugging, in_one_line
from attnseg.cli.doctor import doctor
from attnseg.cli.evaluate import evaluate, explain
from attnseg.cli.export import export, inspect, verify
from attnseg.cli.parameters import HeadedOption
from attnseg.cli.run import demo, run
from attnseg.cli.train import ablate, summary, train
from attnseg.runtime.errors import AttnsegError

_INTERRUPTED = 130
_KEPT = {
    "run": "finished cases are kept",
    "ablate": "repeat the command to continue",
}
"""What remains of a command that is interrupted."""


class _Group(click.Group):
    """Prints errors that the user can fix in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (AttnsegError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # the reader of standard output has closed it
                raise
            with self._context_of(ctx):
                if debugging():
                    traceback.print_exc()
                click.echo(f"error: {in_one_line(error)}", err=True)
            ctx.exit(1)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "attnseg"
            click.echo(f"error: {error.format_message()} See {command} --help", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as stop:
            kept = str(stop) or _KEPT.get(ctx.invoked_subcommand or "")
            click.echo(f"stopped; {kept}" if kept else "stopped", err=True)
            ctx.exit(_INTERRUPTED)

    def _context_of(self, ctx: click.Context) -> click.Context:
        """Context of the command that failed, for the options that the mend names."""
        command = self.commands.get(ctx.invoked_subcommand or "")
        return click.Context(command, parent=ctx) if command else ctx


def _add(group: click.Group, command: click.Command) -> None:
    """Add a command, with `--debug`."""
    command.params.append(
        HeadedOption(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, _, value: ctx.find_root().ensure_object(dict).update(debug=value),
            help="Show the traceback of an error.",
        )
    )
    group.add_command(command)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="attnseg")
def main() -> None:
    """Train, export and run 3-D segmentation networks for medical scans."""


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
