"""`attnseg doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from attnseg.cli.console import in_one_line
from attnseg.cli.parameters import PATH, command, option
from attnseg.doctor import examine


@command()
@option("--model", type=PATH, help="Model bundle to test.  [default: the shipped model]")
@click.pass_context
def doctor(ctx: click.Context, model: Path | None) -> None:
    """Report what this machine can run and what to install.

    The exit code is 1 if no engine is available.
    """
    findings = examine(model)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        state = in_one_line(finding.state)
        advice = f": {finding.advice}" if finding.advice else ""
        mark = "ok" if finding.well else "--"
        click.echo(f"{mark}  {finding.subject:<{width}}  {state}{advice}")
    engines = [f for f in findings if f.subject.startswith("engine")]
    ctx.exit(0 if any(f.well for f in engines) else 1)
