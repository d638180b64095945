"""`attnseg doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from attnseg.cli.console import in_one_line, print_document, show
from attnseg.cli.parameters import PATH, command, option
from attnseg.doctor import Finding, examine


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
        show(f"{mark}  {finding.subject:<{width}}  {state}{advice}")
    engines = [f for f in findings if f.subject.startswith("engine")]
    usable = any(f.well for f in engines)
    print_document({"usable": usable, "findings": [_record(finding) for finding in findings]})
    ctx.exit(0 if usable else 1)


def _record(finding: Finding) -> dict[str, Any]:
    """Fields of one finding in the JSON document."""
    return {
        "subject": finding.subject,
        "well": finding.well,
        "state": in_one_line(finding.state),
        "advice": finding.advice,
    }
