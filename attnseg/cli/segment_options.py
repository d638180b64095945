"""Options of `SegmentOptions`, which `run`, `demo` and `evaluate` share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from attnseg.cli.parameters import PATH, option, parse_bytes, together
from attnseg.runtime.engines.base import PRECISIONS
from attnseg.runtime.engines.select import DEVICES, ENGINES
from attnseg.runtime.steps.tta import PASSES

SLIDING = "Windows and test-time augmentation"
INPUT = "Doubtful scans"
ENGINE = "Engine and device"


def _choices(names: Iterable[str]) -> str:
    return f"[{'|'.join(names)}]"


def _parse_window(_: click.Context, __: click.Parameter, value: str | None) -> Any:
    if value is None or value == "full":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"give a number of voxels, such as 64, or full, got {value!r}.")
    return int(value)


def _parse_axes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part in ("0", "1", "2") for part in parts):
        raise click.BadParameter(f"give axes from 0 to 2, such as 0,2, got {value!r}.")
    return tuple(int(part) for part in parts)


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
        "--mirror-axes",
        callback=_parse_axes,
        metavar="AXES",
        heading=SLIDING,
        help="Some of the model's mirror axes, such as 0,2, for --tta model: each one doubles the "
        "time.  [default: the model's]",
    ),
    option(
        "--empty-windows",
        metavar="[skip|run]",
        heading=SLIDING,
        help="Windows of zeros: skip takes them for background, run gives them to the network.  "
        "[default: the model's]",
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
