"""Options that several commands share, and the headings that group them in the help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from attnseg.cli.console import show_log
from attnseg.runtime.engines.base import PRECISIONS
from attnseg.runtime.engines.select import DEVICES, ENGINES
from attnseg.runtime.steps.tta import PASSES

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Decorator = Callable[[_Function], _Function]


class _Path(click.Path):
    """A path. Refused are a null character, and no text, which `pathlib` takes for `.`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if value == "":  # such as an unset variable of the shell
            self.fail("the path is empty; give . for the current folder.", param, ctx)
        if "\0" in str(value):
            self.fail(f"{value!r} holds a null character, which no path can.", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
EVERYDAY = "Options"
SLIDING = "Windows and test-time augmentation"
INPUT = "Doubtful scans"
ENGINE = "Engine and device"
MODALITIES = "Files by channel, instead of SCAN_DIR"
WORDS = "Description and signature of the bundle"
GATE = "Parity gate"
BUILD = "TensorRT engines"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class HeadedOption(click.Option):
    """An option under a heading of the help."""

    def __init__(self, *args: Any, heading: str = EVERYDAY, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class HeadedCommand(click.Command):
    """A command whose help lists everyday options first and the others under headings."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command.invoke`."""
        show_log()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command.format_options`."""
        headings: dict[str, list[tuple[str, str]]] = {EVERYDAY: []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the text above explains it
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "heading", EVERYDAY)
                headings.setdefault(heading, []).append(record)
        for heading, records in headings.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def command() -> Callable[[Callable[..., Any]], click.Command]:
    """Decorate as `click.command`, with headings in the help."""
    return click.command(cls=HeadedCommand)


def option(*names: str, heading: str = EVERYDAY, **attributes: Any) -> _Decorator[Any]:
    """Decorate as `click.option`, under a heading of the help."""
    return click.option(*names, cls=HeadedOption, heading=heading, **attributes)


def together(*decorators: _Decorator[Any]) -> _Decorator[Any]:
    """Combine several options, in their order, into one decorator."""

    def decorate(function: _Function) -> _Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _choices(names: Iterable[str]) -> str:
    return f"[{'|'.join(names)}]"


def _parse_window(_: click.Context, __: click.Parameter, value: str | None) -> Any:
    if value is None or value == "full":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"give a number of voxels, such as 64, or full, got {value!r}.")
    return int(value)


def parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Parse an amount of memory with its unit, such as `4GB`, to bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", value.strip().upper())
    if not found:
        raise click.BadParameter(
            f"give an amount with its unit, such as 4GB or 500MB, got {value!r}."
        )
    return int(float(found[1]) * _UNITS[found[2]])


def parse_pairs(example: str, empty: bool = False) -> Callable[..., dict[str, str]]:
    """Return a callback that parses options of the form NAME=VALUE.

    Args:
        example: Example for the text of the error.
        empty: Whether VALUE may be empty.
    """

    def parse(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
        pairs = [value.partition("=") for value in values]
        for value, (name, equals, text) in zip(values, pairs, strict=True):
            if not (name and equals and (text or empty)):
                raise click.BadParameter(f"give {example}, got {value!r}.")
        return {name: text for name, _, text in pairs}

    return parse


def output_option(default: str | None, help_text: str) -> _Decorator[Any]:
    """Option for the folder of a command's results; required if there is no default."""
    # An explicit default of None would count as a value.
    given: dict[str, Any] = {"default": Path(default), "show_default": True} if default else {}
    return option("-o", "--output", type=PATH, required=default is None, help=help_text, **given)


bundle_option = option("--model", type=PATH, help="Model bundle.  [default: the shipped model]")
trained_option = option(
    "--model",
    type=PATH,
    help="Checkpoint (best.pt), weights.safetensors, or bundle.  [default: the shipped model]",
)
overwrite_option = option("--overwrite", is_flag=True, help="Replace existing results.")

segment_options = together(
    option(
        "--tta",
        metavar=_choices((*PASSES, "model")),
        heading=SLIDING,
        help="Test-time augmentation: paper is identity, mirror and 90-degree rotation; mirror8 is "
        "all eight mirror images; model mirrors each window along the model's axes, as nnU-Net "
        "does.  [default: model if it has such axes, otherwise none]",
    ),
    option(
        "--fuse",
        metavar="[vote|mean]",
        heading=SLIDING,
        help="How the passes of --tta are combined: majority vote, or mean of the probabilities.  "
        "[default: vote; mean for thresholds and probabilities]",
    ),
    option(
        "--decide",
        metavar="[argmax|threshold]",
        heading=SLIDING,
        help="How the label of a voxel is decided: the most likely label, or a threshold of 0.5 on "
        "the probability of each region.  [default: the model's]",
    ),
    option(
        "--window",
        callback=_parse_window,
        metavar="VOXELS|full",
        heading=SLIDING,
        help="Edge of the cubic window, or full for a single window over the cropped scan.  "
        "[default: the model's]",
    ),
    option(
        "--overlap",
        type=float,
        metavar="SHARE",
        heading=SLIDING,
        help="Overlap of neighbouring windows, from 0 to below 1.  [default: the model's]",
    ),
    option(
        "--min-voxels",
        type=int,
        metavar="VOXELS",
        heading=SLIDING,
        help="Smallest connected component to keep, in voxels.  [default: the model's]",
    ),
    option(
        "--resample",
        default="auto",
        show_default=True,
        metavar="[auto|never]",
        heading=INPUT,
        help="Scans whose voxel size is not the model's: auto resamples them, and the labels come "
        "back on the scan's grid; never refuses them.",
    ),
    option(
        "--skull-strip",
        type=PATH,
        metavar="BUNDLE",
        heading=INPUT,
        help="Bundle of a model that finds the brain in one channel; everything outside is set to "
        "0 in all channels, for models of skull-stripped scans (docs/import.md).",
    ),
    option(
        "--strict",
        is_flag=True,
        heading=INPUT,
        help="Refuse a scan instead of warning of it.",
    ),
    option(
        "--device",
        default="auto",
        show_default=True,
        metavar=_choices(DEVICES),
        heading=ENGINE,
        help="Device to run on; auto is a GPU if one can run the model.",
    ),
    option(
        "--engine",
        default="auto",
        show_default=True,
        metavar=_choices(("auto", *ENGINES)),
        heading=ENGINE,
        help="Inference engine, GPU engines first; auto is the fastest available.",
    ),
    option(
        "--precision",
        default="auto",
        show_default=True,
        metavar=_choices(PRECISIONS),
        heading=ENGINE,
        help="Precision of the network; auto is the engine's fastest.",
    ),
    option(
        "--threads",
        type=int,
        metavar="N",
        heading=ENGINE,
        help="Number of CPU threads.  [default: all]",
    ),
    option(
        "--max-memory",
        "max_memory_bytes",
        callback=parse_bytes,
        metavar="SIZE",
        heading=ENGINE,
        help="Limit on GPU memory, such as 4GB.  [default: no limit]",
    ),
    option(
        "--fallback",
        type=click.Choice(["cpu"]),
        heading=ENGINE,
        help="Device to continue on if the GPU fails.  [default: none, the cases fail]",
    ),
)
"""Fields of `SegmentOptions`, which `run`, `demo` and `evaluate` share."""

training_options = together(
    option("--data", type=PATH, required=True, help="Folder of labelled cases."),
    option(
        "--split",
        type=PATH,
        help="JSON file with lists train and validation of case names.  [default: a random split]",
    ),
    option(
        "--set",
        "settings",
        multiple=True,
        callback=parse_pairs("FIELD=VALUE, such as learning_rate=1e-3", empty=True),
        metavar="FIELD=VALUE",
        help="Change a training setting, such as epochs=30 (docs/training.md); may be repeated.",
    ),
)
"""Options that `train` and `ablate` share."""

gate_options = together(
    option(
        "--data",
        type=PATH,
        heading=GATE,
        help="Folder of labelled cases to compare precisions on.  [default: a synthetic case]",
    ),
    option(
        "--budget-dice",
        type=float,
        metavar="DICE",
        heading=GATE,
        help="Largest change of Dice.  [default: 0.002; for verify, the bundle's]",
    ),
    option(
        "--budget-volume",
        type=float,
        metavar="PERCENT",
        heading=GATE,
        help="Largest change of a volume, in %.  [default: 0.5; for verify, the bundle's]",
    ),
)
"""Options of the parity gate, which `export` and `verify` share."""


def _parse_megabytes(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    return None if value is None else value * 1_000_000


content_options = together(
    option("--fp16", is_flag=True, help="Add an fp16 graph, and a TensorRT engine built from it."),
    option("--int8", is_flag=True, help="Add an int8 graph and engine; needs --calibrate."),
    option(
        "--calibrate",
        "calibration",
        type=PATH,
        metavar="FOLDER",
        help="Folder of scans to calibrate the int8 graph on.",
    ),
)
"""Content of a bundle, which `export` and `import` share."""

build_options = together(
    option(
        "--target",
        multiple=True,
        metavar="GPU",
        heading=BUILD,
        help="GPU to build an engine for: rtx2080ti, a100, rtx3090, rtxa6000, rtx4090, l40s, "
        "rtx5090, dgx-spark, or a compute capability such as sm89; may be repeated.  [default with "
        "--fp16 or --int8: rtx3090; with --builder tensorrt: this machine's]",
    ),
    option(
        "--compatible",
        "compatibility",
        type=click.Choice(["same", "ampere+"]),
        default="same",
        show_default=True,
        heading=BUILD,
        help="GPUs that can run the engine: only the target, or all since Ampere.",
    ),
    option(
        "--builder",
        type=click.Choice(["tensorrt-rtx", "tensorrt", "none"]),
        default="tensorrt-rtx",
        show_default=True,
        heading=BUILD,
        help="Library that builds engines; tensorrt needs the target GPU in this machine.",
    ),
    option(
        "--batch",
        type=click.IntRange(1),
        metavar="WINDOWS",
        show_default="12 of 64x64x64 voxels, or as many voxels",
        heading=BUILD,
        help="Batch size of engines, in windows.",
    ),
    option(
        "--io",
        type=click.Choice(["fp16", "fp32"]),
        default="fp16",
        show_default=True,
        heading=BUILD,
        help="Data type of the fp16 graph's input and output.",
    ),
    option(
        "--workspace",
        "workspace_bytes",
        type=click.IntRange(1),
        callback=_parse_megabytes,
        metavar="MB",
        heading=BUILD,
        help="Scratch memory that a layer may use.  [default: no limit]",
    ),
    option(
        "--version-compatible",
        is_flag=True,
        heading=BUILD,
        help="Build engines that later TensorRT versions can run (--builder tensorrt only).",
    ),
    option(
        "--timing-cache",
        type=PATH,
        heading=BUILD,
        help="TensorRT timing cache to read and write (--builder tensorrt only).",
    ),
)
"""TensorRT engines of a bundle, which `export` and `import` share."""

word_options = together(
    option("--name", heading=WORDS, help="Name of the model, stored in the manifest."),
    option("--description", heading=WORDS, help="Description of the model."),
    option(
        "--intended-use", heading=WORDS, help="Intended use of the model, such as 'Research only'."
    ),
    option("--sign", type=PATH, heading=WORDS, help="Private key to sign with (PEM, Ed25519)."),
)
"""Words and signature of a bundle, which `export` and `import` share."""
