"""`attnseg export`, `attnseg verify` and `attnseg inspect`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from attnseg.cli.bundle_options import build_options, content_options, gate_options, word_options
from attnseg.cli.console import in_one_line, note, print_document, print_table, show
from attnseg.cli.parameters import (
    PATH,
    command,
    option,
    output_option,
)
from attnseg.cli.progress import keeping, loading, stage_progress
from attnseg.runtime.extras import require
from attnseg.runtime.model.bundle import Bundle


@command()
@click.argument("model", type=PATH, required=False)
@output_option("attnseg-model", "Folder for the bundle.")
@option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@content_options
@option("--spec", type=PATH, help="JSON file that describes the ONNX model (docs/export.md).")
@build_options
@gate_options
@word_options
@click.pass_context
def export(
    ctx: click.Context, /, model: Path | None, output: Path, data: Path | None, **choices: Any
) -> None:
    """Export a model to a bundle for attnseg run.

    MODEL is a checkpoint (best.pt), the weights.safetensors of a bundle, or, with --spec, an ONNX
    file of a 3-D model trained elsewhere. Without MODEL, the newest best.pt below runs/ is
    exported, or the shipped model if there is none. What is over the budget of the parity gate is
    left out, and the exit code is then 1; without the fp32 graph, nothing is written.
    """
    require("attnseg export", "export")
    with loading("PyTorch and ONNX", "torch"):
        from attnseg.export.export import ExportProgress, export_bundle
        from attnseg.export.gate.samples import read_samples
        from attnseg.export.options import ExportChoices
        from attnseg.export.source.default import default_model

    options = ExportChoices(**choices).resolve()
    if model is None:
        model = default_model()
        note(f"model: {model}")
    samples = partial(read_samples, data) if data else None
    with keeping(lambda: "no bundle was written"), stage_progress() as stages:
        progress = ExportProgress(stages.step, stages.part)
        exported = export_bundle(model, output, options, samples, progress)
    print_exported(exported, output)
    ctx.exit(1 if exported.left_out else 0)


def print_exported(exported: Any, output: Path) -> None:
    """Print the parity table of an `Exported`, its folder, and what was left out."""
    _print_report(exported.report)
    if exported.in_fp32:
        show(f"Kept in fp32 because they may overflow in fp16: {', '.join(exported.in_fp32)}")
    following = f"attnseg run scan_dir/ --model {output} -o {output.name}-out"
    show(f"Bundle: {exported.bundle.folder}. Next: {following}")
    for error in exported.left_out:
        click.echo(f"error: {in_one_line(error)}", err=True)


def _print_report(report: Any) -> None:
    from attnseg.export.documents.card import PARITY_HEADER, not_run_lines, parity_rows

    print_table(PARITY_HEADER, parity_rows(report), numbers_from=len(PARITY_HEADER))
    for line in not_run_lines(report):
        show(line)
    show(f"Compared with {report.reference}")


@command()
@click.argument("folder", type=PATH)
@gate_options
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    folder: Path,
    data: Path | None,
    budget_dice: float | None,
    budget_volume: float | None,
) -> None:
    """Repeat a bundle's parity gate on this machine.

    Every precision that can run here is compared with the trained network, or with the fp32 graph
    where PyTorch is not installed. The exit code is 1 if a graph of the bundle is over the budget;
    bf16 is measured for information.
    """
    require("attnseg verify", "export", ("onnx", "onnxruntime"))
    with loading("ONNX and the engines", "onnx"):
        from attnseg.export.gate.budget import describe_failure
        from attnseg.export.gate.samples import read_samples
        from attnseg.export.verify import verify_bundle

    samples = partial(read_samples, data) if data else None
    with stage_progress() as stages:
        report = verify_bundle(folder, budget_dice, budget_volume, samples, stages.step)
    _print_report(report)
    print_document({"folder": folder, "within_budget": not report.failures(), **report.to_dict()})
    for failed in report.failures():
        reason = in_one_line(describe_failure(failed, report.budget))
        where = f"{failed.precision} ({failed.engine})"
        click.echo(f"over the budget: {where}: {reason}", err=True)
    ctx.exit(1 if report.failures() else 0)


@command()
@click.argument("folder", type=PATH)
def inspect(folder: Path) -> None:
    """Show the contents of a bundle.

    Lists files, precisions, targets, sizes, checksums, and the layers of each graph.
    """
    from attnseg.inspect import FILES_HEADER, inspect_bundle

    bundle = Bundle.load(folder)
    found = inspect_bundle(bundle)
    manifest = bundle.manifest
    show(f"{manifest.name}: {manifest.description}")
    show(f"{manifest.intended_use}; made with {manifest.created_with}")
    show(f"sha256 {bundle.sha256}")
    print_table(FILES_HEADER, found.files, numbers_from=len(FILES_HEADER))
    for line in (*found.verdicts, *found.layers):
        show(line)
    print_document(
        {
            "folder": folder,
            "name": manifest.name,
            "description": manifest.description,
            "intended_use": manifest.intended_use,
            "created_with": manifest.created_with,
            "manifest_sha256": bundle.sha256,
            "files": {name: asdict(entry) for name, entry in manifest.files.items()},
            "verdicts": found.verdicts,
            "layers": found.layers,
        }
    )
