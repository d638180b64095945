"""`attnseg import`: bundles of models of other frameworks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from attnseg.cli.bundle_options import build_options, content_options, gate_options, word_options
from attnseg.cli.console import print_table, show
from attnseg.cli.export import print_exported
from attnseg.cli.parameters import (
    PATH,
    command,
    option,
    output_option,
    together,
)
from attnseg.cli.progress import keeping, loading, stage_progress
from attnseg.runtime.errors import DependencyError
from attnseg.runtime.extras import MODULES, missing, require

_BUNDLE = together(
    output_option("attnseg-model", "Folder for the bundle."),
    option("--overwrite", is_flag=True, help="Replace an existing bundle."),
    content_options,
    build_options,
    gate_options,
    word_options,
)


def _make(
    output: Path, data: Path | None, choices: dict[str, Any], make: Callable[..., Any]
) -> Any:
    """Write a bundle by a function of `attnseg.imports.imported`, print its report, return it."""
    from attnseg.export.export import ExportProgress
    from attnseg.export.gate.samples import read_samples
    from attnseg.export.options import ExportChoices

    options = ExportChoices(**choices).resolve()
    samples = partial(read_samples, data) if data else None
    with keeping(lambda: "no bundle was written"), stage_progress() as stages:
        progress = ExportProgress(stages.step, stages.part)
        exported = make(options=options, samples=samples, progress=progress)
    print_exported(exported, output)
    return exported


def _require(name: str, *modules: str) -> None:
    require(f"attnseg import {name}", "import", (*MODULES["export"], *modules))


def _require_nnunetv2() -> None:
    if missing(("nnunetv2",)):
        raise DependencyError("--verify needs nnunetv2", "pip install nnunetv2==2.8.1")


def _parse_folds(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    folds = tuple(part.strip() for part in value.split(",") if part.strip())
    if not folds or any(fold != "all" and not fold.isdecimal() for fold in folds):
        raise click.BadParameter(f"give all, or numbers such as 0,1, got {value!r}.")
    return folds


@command()
@click.argument("folder", type=PATH)
@option(
    "--folds",
    callback=_parse_folds,
    default="all",
    show_default=True,
    metavar="all|N,N...",
    help="Folds whose logits are averaged.",
)
@option(
    "--checkpoint",
    type=click.Choice(["final", "best"]),
    default="final",
    show_default=True,
    help="Checkpoint of each fold.",
)
@option(
    "--verify",
    type=PATH,
    metavar="CASES",
    help="Folder of scans that nnU-Net's own predictor segments, too; the labels are compared.  "
    "Needs nnunetv2.",
)
@_BUNDLE
@click.pass_context
def nnunet(
    ctx: click.Context,
    /,
    folder: Path,
    output: Path,
    folds: tuple[str, ...],
    checkpoint: str,
    verify: Path | None,
    data: Path | None,
    **choices: Any,
) -> None:
    """Make a bundle of a model folder of nnU-Net 2.

    FOLDER holds plans.json, dataset.json and fold_N/checkpoint_final.pth. The bundle runs without
    PyTorch and gives the labels of nnU-Net's predictor (docs/import.md). The exit code is 1 if an
    engine or precision was left out of the bundle, or if --verify finds more than 1 of 10,000
    foreground voxels with another label.
    """
    _require("nnunet", "dynamic_network_architectures")
    if verify:
        _require_nnunetv2()
    with loading("PyTorch and ONNX", "torch"):
        from attnseg.imports.imported import import_nnunet
        from attnseg.imports.verify import cases_to_compare

    cases = cases_to_compare(folder, verify) if verify else []
    make = partial(import_nnunet, folder, output, folds, checkpoint)
    exported = _make(output, data, choices, make)
    failed = _verify(folder, exported, cases) if verify else False
    ctx.exit(1 if failed or exported.left_out else 0)


def _verify(folder: Path, exported: Any, cases: Sequence[Any]) -> bool:
    """Compare labels with nnU-Net's predictor, print a table, return whether a case differs."""
    from attnseg.imports.verify import COMPARISON_HEADER, compare_with_nnunet

    with stage_progress() as stages:
        compared = compare_with_nnunet(folder, exported.bundle, cases, stages.step)
    print_table(COMPARISON_HEADER, [own.row() for own in compared], numbers_from=1)
    equal = sum(own.equal for own in compared)
    show(f"{equal} of {len(compared)} cases equal nnU-Net's labels, within 1 of 10,000 voxels.")
    return equal < len(compared)


@command()
@click.argument("folder", type=PATH)
@_BUNDLE
@click.pass_context
def monai(
    ctx: click.Context, /, folder: Path, output: Path, data: Path | None, **choices: Any
) -> None:
    """Make a bundle of a MONAI bundle.

    FOLDER holds configs/inference.json, configs/metadata.json and models/model.pt. The
    configuration is parsed, and nothing in it is executed (docs/import.md). The exit code is 1 if
    an engine or precision was left out of the bundle.
    """
    _require("monai", "monai")
    with loading("PyTorch, MONAI and ONNX", "torch"):
        from attnseg.imports.imported import import_monai

    exported = _make(output, data, choices, partial(import_monai, folder, output))
    ctx.exit(1 if exported.left_out else 0)


@command()
@click.argument("model", type=PATH)
@option(
    "--spec",
    type=PATH,
    required=True,
    help="JSON file that describes the model (docs/export.md).",
)
@_BUNDLE
@click.pass_context
def torchscript(
    ctx: click.Context,
    /,
    model: Path,
    output: Path,
    spec: Path,
    data: Path | None,
    **choices: Any,
) -> None:
    """Make a bundle of a TorchScript file.

    MODEL is a network saved by torch.jit.save. Loading it can run what TorchScript can, which is
    no Python; import files of people whom you trust only. The exit code is 1 if an engine or
    precision was left out of the bundle.
    """
    _require("torchscript")
    with loading("PyTorch and ONNX", "torch"):
        from attnseg.imports.imported import import_torchscript

    exported = _make(output, data, choices, partial(import_torchscript, model, spec, output))
    ctx.exit(1 if exported.left_out else 0)
