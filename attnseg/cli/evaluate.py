"""`attnseg evaluate` and `attnseg explain`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from attnseg.cli.console import case_progress, print_case_error, print_table, print_warnings
from attnseg.cli.parameters import (
    PATH,
    command,
    option,
    output_option,
    overwrite_option,
    segment_options,
    trained_option,
)
from attnseg.cli.run import open_segmenter, print_refusals
from attnseg.runtime.case.scans import find_cases
from attnseg.runtime.extras import require
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.results.output import prepare_folder
from attnseg.runtime.segmenter import Segmenter


@contextmanager
def _opened(model: Path | None, options: SegmentOptions) -> Iterator[Segmenter]:
    """Open a bundle, or a checkpoint by exporting it to a temporary bundle."""
    if model is None or model.is_dir():
        yield open_segmenter(model, options)
        return
    require("a checkpoint", "export")
    from attnseg.export.trained import open_trained

    with open_trained(model, options) as segmenter:
        print_refusals(segmenter)
        yield segmenter


@command()
@option("--data", type=PATH, required=True, help="Folder of labelled cases.")
@trained_option
@output_option(None, "Folder for the results.")
@option("--against", type=PATH, help="Output folder of another evaluation to compare with.")
@option(
    "--cases",
    type=click.Choice(["held-out", "trained-on", "all"]),
    default="held-out",
    show_default=True,
    help="Cases to evaluate: those not used for training, those used for it, or all.",
)
@overwrite_option
@segment_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    data: Path,
    model: Path | None,
    output: Path,
    against: Path | None,
    cases: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Score a model on labelled cases.

    The cases are segmented as by attnseg run. OUTPUT receives cases.csv (all scores of each
    case), summary.md, boxes.png, and pictures of the worst cases in worst/. The exit code is 1 if a
    case failed.
    """
    require("attnseg evaluate", "train", ("matplotlib",))
    from attnseg.data.decide import decide_labels
    from attnseg.data.labelled import find_labelled_cases
    from attnseg.evaluation.cases import cases_to_evaluate
    from attnseg.evaluation.evaluate import check_output
    from attnseg.evaluation.evaluate import evaluate as evaluate_cases
    from attnseg.evaluation.scores import MEANS_HEADER, mean_rows

    check_output(data, output, overwrite)
    scans = find_labelled_cases(data)
    with _opened(model, SegmentOptions(**settings)) as segmenter:
        chosen = cases_to_evaluate(scans, segmenter.bundle.manifest, cases)
        with case_progress(len(scans.cases)) as advance:
            scans = decide_labels(scans, [case.name for case in chosen], advance)
        prepare_folder(output)
        with case_progress(len(chosen)) as advance:
            result = evaluate_cases(
                chosen, segmenter, scans.task, output, against=against, progress=advance
            )
    for name, error in result.failed.items():
        print_case_error(name, error)
    for name, warnings in result.warnings.items():
        print_warnings(name, warnings)
    print_table(MEANS_HEADER, mean_rows(result.scores), numbers_from=1)
    scored = f"{len(result.scores)} of " if result.failed else ""
    click.echo(
        f"Means over {scored}{len(chosen)} case(s); spread and more in {output / 'summary.md'}"
    )
    ctx.exit(1 if result.failed else 0)


@command()
@click.argument("scan_dir", type=PATH)
@trained_option
@output_option("attnseg-explain", "Folder for the pictures.")
@click.pass_context
def explain(ctx: click.Context, /, scan_dir: Path, model: Path | None, output: Path) -> None:
    """Draw the attention weights of each stage.

    SCAN_DIR is the folder of one case, or of many. For each case, OUTPUT receives
    CASE_attention.png and CASE_attention.csv. The exit code is 1 if a case failed.
    """
    require("attnseg explain", "train", ("torch", "safetensors", "matplotlib"))
    from attnseg.export.source.checkpoint import load_trained, weights_of
    from attnseg.trainer.explain import check_attention, explain_cases

    trained = load_trained(weights_of(model))
    check_attention(trained.network)
    scans = find_cases(scan_dir, trained.preparation.task.task.channels)
    prepare_folder(output)
    found = explain_cases(
        scans.cases, trained.network, trained.preparation, trained.windows, output
    )
    with case_progress(len(scans.cases)) as advance:
        for name in found:
            advance(name)
    for name, problem in scans.problems.items():
        print_case_error(name, problem)
    click.echo(f"Results in {output}")
    ctx.exit(1 if scans.problems else 0)
