"""The paper's results table (section 4), for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of the paper's results table: Dice and HD95 (mm) by region."""

    title: str
    dice: Mapping[str, float]
    hd95_mm: Mapping[str, float]


def _row(title: str, dice: tuple[float, ...], hd95_mm: tuple[float, ...]) -> Row:
    regions = ("WT", "TC", "ET")
    return Row(
        title, dict(zip(regions, dice, strict=True)), dict(zip(regions, hd95_mm, strict=True))
    )


RESULTS: dict[str, Row] = {
    "unet3d": _row("3-D U-Net", (0.904, 0.812, 0.765), (8.0, 14.2, 13.6)),
    "deepmedic": _row("DeepMedic", (0.912, 0.825, 0.774), (7.4, 13.9, 12.7)),
    "resunet": _row("ResNet-UNet", (0.907, 0.820, 0.771), (7.8, 14.0, 13.2)),
    "attnresunet": _row("Attention-ResNetUNet", (0.915, 0.835, 0.788), (6.9, 12.4, 11.9)),
}


def is_papers_task(regions: Iterable[str]) -> bool:
    """Whether a task with these regions is the paper's, so that its results can be compared."""
    return set(regions) == set(RESULTS["attnresunet"].dice)


def table_row(network: Mapping[str, Any]) -> str | None:
    """Key in `RESULTS` of a network; None if the paper has no such network.

    Args:
        network: Fields of the network's configuration, as stored in manifests.
    """
    architecture = str(network.get("architecture", ""))
    if architecture != "attnresunet":
        return architecture if architecture in RESULTS else None
    modules = network.get("attention"), network.get("multi_scale")
    rows = {("gap", True): "attnresunet", ("none", False): "resunet"}
    return next((row for own, row in rows.items() if own == modules), None)
