"""`attnseg evaluate` and `attnseg explain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from attnseg.cli.console import (
    error_record,
    note,
    print_case_error,
    print_document,
    print_table,
    print_warnings,
    show,
)
from attnseg.cli.parameters import (
    PATH,
    command,
    option,
    output_option,
    overwrite_option,
    trained_option,
)
from attnseg.cli.progress import case_progress, ended_cases, keeping, loading, stage_progress
from attnseg.cli.run import model_record, print_refusals
from attnseg.cli.segment_options import segment_options
from attnseg.runtime.case.scans import find_cases
from attnseg.runtime.extras import require
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.results.output import prepare_folder
from attnseg.runtime.segmenter import Segmenter


@contextmanager
def _bundle_of(model: Path | None) -> Iterator[Bundle]:
    """Load a bundle, or export a checkpoint to a temporary one."""
    if model is None or model.is_dir():
        yield Bundle.load(model) if model else Bundle.default()
        return
    require("a checkpoint", "export")
    with loading("PyTorch and ONNX", "torch"):
        from attnseg.export.export import ExportProgress
        from attnseg.export.trained import trained_bundle

    with ExitStack() as stack:
        with stage_progress() as stages:
            stages.step(f"exporting {model}")
            progress = ExportProgress(stages.step, stages.part)
            bundle = stack.enter_context(trained_bundle(model, progress))
        yield bundle


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
    case), confusion.csv (voxels by true and predicted label), summary.md, boxes.png, confusion.png,
    and pictures of the worst cases in worst/. The exit code is 1 if a case failed.
    """
    require("attnseg evaluate", "evaluate")
    with loading("matplotlib", "matplotlib"):
        from attnseg.data.decide import decide_labels
        from attnseg.data.labelled import find_labelled_cases
        from attnseg.evaluation.cases import cases_to_evaluate
        from attnseg.evaluation.confusion import total
        from attnseg.evaluation.evaluate import check_output
        from attnseg.evaluation.evaluate import evaluate as evaluate_cases
        from attnseg.evaluation.scores import MEANS_HEADER, mean_rows, mean_scores

    check_output(data, output, overwrite)
    scans = find_labelled_cases(data)
    with _bundle_of(model) as bundle:
        segmenter = Segmenter(bundle, SegmentOptions(**settings))
        print_refusals(segmenter)
        chosen = cases_to_evaluate(scans, bundle.manifest, cases)
        note("reading the labels")
        scans = decide_labels(scans, [case.name for case in chosen])
        prepare_folder(output)
        with keeping(lambda: "no scores were written"), case_progress(len(chosen)) as progress:
            ended = ended_cases(progress)
            result = evaluate_cases(
                chosen, segmenter, scans.task, output, against=against, progress=ended
            )
    for name, error in result.failed.items():
        print_case_error(name, error)
    for name, warnings in result.warnings.items():
        print_warnings(name, warnings)
    print_table(MEANS_HEADER, mean_rows(result.scores), numbers_from=1)
    scored = f"{len(result.scores)} of " if result.failed else ""
    show(f"Means over {scored}{len(chosen)} case(s); spread and more in {output / 'summary.md'}")
    print_document(
        {
            **model_record(segmenter),
            "output": output,
            "means": mean_scores(result.scores),
            "labels": [label.name for label in bundle.manifest.task.labels],
            "confusion": total(result.matrices).tolist(),
            "cases": _case_records([case.name for case in chosen], result),
        }
    )
    ctx.exit(1 if result.failed else 0)


def _case_records(names: Sequence[str], result: Any) -> list[dict[str, Any]]:
    """Fields of each case of an `Evaluation` in the JSON document."""
    records = []
    for name in names:
        error, scores = result.failed.get(name), result.scores.get(name, {})
        matrix = result.matrices.get(name)
        records.append(
            {
                "name": name,
                "status": "failed" if error else "done",
                "error": error_record(error) if error else None,
                "warnings": list(result.warnings.get(name, ())),
                "scores": {structure: asdict(values) for structure, values in scores.items()},
                "confusion": None if matrix is None else matrix.tolist(),
            }
        )
    return records


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
    require("attnseg explain", "evaluate")
    with loading("matplotlib", "matplotlib"):
        from attnseg.evaluation.attention import check_attention
        from attnseg.evaluation.explain import explain_cases

    with _bundle_of(model) as bundle:
        check_attention(bundle.manifest)
        scans = find_cases(scan_dir, bundle.manifest.task.channels)
        prepare_folder(output)
        with (
            keeping(lambda: "finished cases are kept"),
            case_progress(len(scans.cases) + len(scans.problems)) as progress,
        ):
            for name in scans.problems:
                progress.case_ended(name, "failed")
            failed = explain_cases(scans.cases, bundle, output, ended_cases(progress))
    for name, problem in {**scans.problems, **failed}.items():
        print_case_error(name, problem)
    good = len(failed) < len(scans.cases)
    show(f"Results in {output}" if good else "No results.")
    ctx.exit(1 if scans.problems or failed else 0)
