"""`attnseg run` and `attnseg demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress, TaskID

from attnseg.cli.console import (
    as_option,
    console,
    print_case_error,
    print_table,
    print_warnings,
    progress_bar,
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
    segment_options,
)
from attnseg.demo import make_demo_scan, score_demo
from attnseg.runtime.case.scans import Case, find_cases, find_scans
from attnseg.runtime.errors import ScanError
from attnseg.runtime.folder import CaseResult, segment_folder
from attnseg.runtime.model.bundle import Bundle, default_folder
from attnseg.runtime.model.signature import check_signature
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.results.output import prepare_folder
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
        click.echo(f"not used: {refusal.describe(as_option)}", err=True)


class _ProgressListener:
    """Shows the progress of the current case on the terminal."""

    def __init__(self, progress: Progress, cases: int) -> None:
        self._progress, self._cases = progress, cases
        self._task: TaskID | None = None
        self._started = 0

    def case_started(self, name: str) -> None:
        """See `attnseg.runtime.folder.Listener`."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._started += 1
        place = f"{self._started}/{self._cases}"
        self._task = self._progress.add_task(f"{place} {name}", total=1.0)

    def case_advanced(self, share: float) -> None:
        """See `attnseg.runtime.folder.Listener`."""
        if self._task is not None:
            self._progress.update(self._task, completed=share)


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
    click.echo(f"model: {segmenter.bundle.manifest.name} ({origin})", err=True)
    results = [CaseResult(n, "failed", error=e) for n, e in problems.items()]
    for result in results:
        _print_notes(result)
    with progress_bar() as progress:
        listener = _ProgressListener(progress, len(cases))
        for result in segment_folder(cases, segmenter, output, listener, overwrite):
            results.append(result)
            _print_notes(result)
    _print_summary(sorted(results, key=lambda r: r.name), segmenter, output)
    return sum(result.status == "failed" for result in results)


def _print_notes(result: CaseResult) -> None:
    if result.error:
        print_case_error(result.name, result.error)
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
    doubtful = sum(bool(result.report.get("warnings")) for result in results)
    if doubtful:
        console().print(
            f"{doubtful} of {len(results)} cases have warnings; see above and pictures."
        )
    good = any(result.status != "failed" for result in results)
    where = f"Results in {output}" if good else "No results."
    console().print(
        f"{manifest.name} ({manifest.intended_use}), {engine.name} {engine.version} "
        f"{engine.precision}. {where}",
        soft_wrap=True,
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
    click.echo("making a synthetic scan", err=True)
    scans = find_cases(make_demo_scan(output), segmenter.bundle.manifest.task.channels)
    failed = _run_cases(scans.cases, segmenter, output, True, scans.problems)
    if not failed:
        score = score_demo(scans.cases[0], output, segmenter.bundle.manifest)
        dice = ", ".join(f"{region} {value:.3f}" for region, value in score.items())
        click.echo(f"Dice against the synthetic truth: {dice}")
        click.echo(f"Look at {output / (scans.cases[0].name + '.png')}")
    ctx.exit(1 if failed else 0)
