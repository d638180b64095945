"""`attnseg run` and `attnseg demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import click

from attnseg.cli.console import (
    as_option,
    detail,
    error_record,
    note,
    print_case_error,
    print_document,
    print_table,
    print_warnings,
    show,
)
from attnseg.cli.parameters import (
    MODALITIES,
    PATH,
    bundle_option,
    command,
    option,
    output_option,
    overwrite_option,
    parse_pairs,
)
from attnseg.cli.progress import case_progress, keeping
from attnseg.cli.segment_options import segment_options
from attnseg.demo import make_demo_scan, score_demo
from attnseg.runtime.case.scans import Case, find_cases, find_scans
from attnseg.runtime.errors import ScanError
from attnseg.runtime.folder import CaseResult, segment_folder
from attnseg.runtime.model.bundle import Bundle, default_folder
from attnseg.runtime.model.signature import check_signature
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.results.output import prepare_folder
from attnseg.runtime.results.report import output_names
from attnseg.runtime.segmenter import Segmenter

_BRATS = ("t1", "t1ce", "t2", "flair")


def open_segmenter(
    model: Path | None, options: SegmentOptions, key: Path | None = None
) -> Segmenter:
    """Open a bundle, and print why faster engines are not used."""
    bundle = Bundle.load(model) if model else Bundle.default()
    if key:
        check_signature(bundle, key)
    segmenter = Segmenter(bundle, options)
    print_refusals(segmenter)
    return segmenter


def print_refusals(segmenter: Segmenter) -> None:
    """Print why faster engines are not used, on standard error."""
    for refusal in segmenter.refusals:
        note(f"not used: {refusal.describe(as_option)}")
    engine, settings = segmenter.engine, segmenter.plan.settings().items()
    device = f" on {engine.device}, {segmenter.plan.threads} threads"
    detail(f"engine: {engine.name} {engine.version} {engine.precision}{device}")
    detail(f"options: {', '.join(f'{name} {value}' for name, value in settings)}")


def model_record(segmenter: Segmenter) -> dict[str, Any]:
    """Model and engine, as fields of a JSON document."""
    bundle, engine = segmenter.bundle, segmenter.engine
    return {
        "model": {
            "name": bundle.manifest.name,
            "folder": bundle.folder,
            "manifest_sha256": bundle.sha256,
            "intended_use": bundle.manifest.intended_use,
        },
        "engine": asdict(engine),
    }


def _run_cases(
    cases: Sequence[Case],
    segmenter: Segmenter,
    output: Path,
    overwrite: bool,
    problems: Mapping[str, ScanError],
) -> int:
    """Segment cases, print a summary, and return the number of failed cases."""
    shipped = segmenter.bundle.folder == default_folder()
    origin = "shipped with attnseg" if shipped else segmenter.bundle.folder
    note(f"model: {segmenter.bundle.manifest.name} ({origin})")
    results = []
    with (
        keeping(lambda: "finished cases are kept"),
        case_progress(len(cases) + len(problems)) as progress,
    ):
        failed = (CaseResult(n, "failed", error=e) for n, e in problems.items())
        segmented = segment_folder(cases, segmenter, output, progress, overwrite)
        for result in chain(failed, segmented):
            results.append(result)
            progress.case_ended(result.name, result.status, _elapsed_s(result))
            _print_notes(result)
    results.sort(key=lambda r: r.name)
    _print_summary(results, segmenter, output)
    print_document(
        {
            **model_record(segmenter),
            "output": output,
            "cases": [_case_record(result) for result in results],
        }
    )
    return sum(result.status == "failed" for result in results)


def _elapsed_s(result: CaseResult) -> float | None:
    """Time of a case that is done; a skipped case has the time of an earlier run."""
    if result.status != "done":
        return None
    return float(sum(result.report["elapsed_ms"].values())) / 1000


def _case_record(result: CaseResult) -> dict[str, Any]:
    """Fields of one case in the JSON document."""
    return {
        "name": result.name,
        "status": result.status,
        "error": error_record(result.error) if result.error else None,
        "warnings": list(result.report.get("warnings", [])),
        "volumes_ml": result.report.get("volumes_ml"),
        "elapsed_ms": result.report.get("elapsed_ms"),
    }


def _print_notes(result: CaseResult) -> None:
    if result.error:
        print_case_error(result.name, result.error)
    elif result.status == "done":
        times = (f"{name} {ms:.0f} ms" for name, ms in result.report["elapsed_ms"].items())
        detail(f"{result.name}: {', '.join(times)}")
    print_warnings(result.name, result.report.get("warnings", []))


def _print_summary(results: Sequence[CaseResult], segmenter: Segmenter, output: Path) -> None:
    manifest, engine = segmenter.bundle.manifest, segmenter.engine
    regions = list(manifest.task.regions)
    rows = []
    for result in results:
        volumes = result.report.get("volumes_ml", {})
        cells = [f"{volumes[r]:.1f}" if r in volumes else "" for r in regions]
        elapsed_ms = sum(result.report.get("elapsed_ms", {}).values())
        time_s = f"{elapsed_ms / 1000:.1f}" if result.status == "done" else ""
        warned = len(result.report.get("warnings", ()))
        rows.append((result.name, result.status, *cells, time_s, str(warned or "")))
    header = ("case", "result", *(f"{region} ml" for region in regions), "s", "warnings")
    print_table(header, rows, numbers_from=2)
    if failures := [result for result in results if result.status == "failed"]:
        show(f"{len(failures)} of {len(results)} cases failed; see above.")
        kept = [r.name for r in failures if (output / output_names(r.name)["report"]).exists()]
        if kept:
            show(f"Results of an earlier run remain in {output}: {', '.join(kept)}.")
    doubtful = sum(bool(result.report.get("warnings")) for result in results)
    if doubtful:
        show(f"{doubtful} of {len(results)} cases have warnings; see above and pictures.")
    good = any(result.status != "failed" for result in results)
    where = f"Results in {output}" if good else "No new results."
    show(
        f"{manifest.name} ({manifest.intended_use}), {engine.name} {engine.version} "
        f"{engine.precision}. {where}"
    )


def _files(settings: dict[str, Any], channel: dict[str, str]) -> dict[str, Path]:
    """Files by channel, from `--channel` and the BraTS options, which leave `settings`."""
    named = {name: settings.pop(name) for name in _BRATS}
    files = {name: file for name, file in named.items() if file}
    if twice := set(files) & set(channel):
        raise click.UsageError(f"channel {twice.pop()} was given twice.")
    return {**files, **{name: Path(file) for name, file in channel.items()}}


@command()
@click.argument("scan_dir", type=PATH, required=False)
@output_option("attnseg-out", "Folder for the results.")
@bundle_option
@overwrite_option
@option(
    "--probabilities",
    is_flag=True,
    help="Write CASE_prob.nii.gz, too: the probability of each region, a 4-D file.",
)
@segment_options
@option("--t1", type=PATH, heading=MODALITIES, help="T1 file.")
@option("--t1ce", type=PATH, heading=MODALITIES, help="Contrast-enhanced T1 file.")
@option("--t2", type=PATH, heading=MODALITIES, help="T2 file.")
@option("--flair", type=PATH, heading=MODALITIES, help="FLAIR file.")
@option(
    "--channel",
    multiple=True,
    callback=parse_pairs("NAME=FILE, such as ct=scan.nii.gz"),
    metavar="NAME=FILE",
    heading=MODALITIES,
    help="File of a channel, by its name in the model's manifest; may be repeated.",
)
@option(
    "--require-signature",
    "key",
    type=PATH,
    metavar="PUBLIC_KEY",
    heading="Signed bundles",
    help="Refuse a bundle that is not signed with this key (PEM, Ed25519).",
)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    scan_dir: Path | None,
    output: Path,
    model: Path | None,
    overwrite: bool,
    key: Path | None,
    channel: dict[str, str],
    **settings: Any,
) -> None:
    """Segment one case or a folder of cases.

    SCAN_DIR is the folder of one case, or of many, with one NIfTI file per modality. For each
    case, OUTPUT receives CASE_seg.nii.gz (labels in the scan's own grid), CASE.png and CASE.json.
    Finished cases are skipped on a second run. The exit code is 1 if a case failed.
    """
    files = _files(settings, channel)
    if scan_dir is None and not files:
        raise click.UsageError("no scan was given; give a scan folder or one file per channel.")
    segmenter = open_segmenter(model, SegmentOptions(**settings), key)
    scans = find_scans(scan_dir, files, segmenter.bundle.manifest.task.channels)
    prepare_folder(output)
    failed = _run_cases(scans.cases, segmenter, output, overwrite, scans.problems)
    ctx.exit(1 if failed else 0)


@command()
@output_option("attnseg-demo", "Folder for the synthetic scan and the results.")
@bundle_option
@segment_options
@click.pass_context
def demo(ctx: click.Context, /, output: Path, model: Path | None, **settings: Any) -> None:
    """Segment a synthetic brain with a tumour.

    The scan is generated from a fixed seed, and the result is compared with its known labels.
    """
    segmenter = open_segmenter(model, SegmentOptions(**settings))
    prepare_folder(output)
    note("making a synthetic scan")
    scans = find_cases(make_demo_scan(output), segmenter.bundle.manifest.task.channels)
    failed = _run_cases(scans.cases, segmenter, output, True, scans.problems)
    if not failed:
        score = score_demo(scans.cases[0], output, segmenter.bundle.manifest)
        dice = ", ".join(f"{region} {value:.3f}" for region, value in score.items())
        show(f"Dice against the synthetic truth: {dice}")
        show(f"Look at {output / (scans.cases[0].name + '.png')}")
    ctx.exit(1 if failed else 0)
