"""What the paper prints, to stand beside what is measured here.

Source: the Attention-ResNetUNet paper, section 4: its results table, and the totals of its
ablation. Of the ablation's eight numbers only those below are known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnseg.trainer.model import NetworkConfig


@dataclass(frozen=True)
class Row:
    """A row of the paper's results table; both by region, HD95 in mm."""

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


@dataclass(frozen=True)
class Cost:
    """A row of the paper's ablation: millions of parameters, GMAC of a 4x64x64x64 input."""

    parameters_m: float | None = None
    gmac: float | None = None


@dataclass(frozen=True)
class Variant:
    """A row of the ablation: what is switched on, and what the paper prints for it."""

    attention: bool
    multi_scale: bool
    paper: Cost


PROTOCOL = {"resize": "192,192,128"}
"""Settings of the paper's section 3.3 that are not defaults: `--preset paper` adds them."""

ABLATION: dict[str, Variant] = {
    "baseline": Variant(False, False, Cost(3.4, 12.8)),
    "attention": Variant(True, False, Cost()),
    "multi-scale": Variant(False, True, Cost()),
    "both": Variant(True, True, Cost(3.6, 13.1)),
}

DIFFERENCES = (
    "The paper prints neither widths nor strides, so these are reconstructed to come near its "
    "totals, 3.6 M parameters and 13.1 GMAC. Its rows cannot all be met: it charges attention "
    "0.1 M parameters, which its own formula (a sigmoid of a mean) does not have, and its eight "
    "numbers do not add up, as multi-scale would cost less than nothing."
)


def variant_network(network: NetworkConfig, variant: Variant) -> NetworkConfig:
    """The network of a row of the ablation; attention, where it is on, is the network's own."""
    attention = network.attention if variant.attention else "none"
    return replace(network, attention=attention, multi_scale=variant.multi_scale)


def table_row(network: NetworkConfig) -> str:
    """Which row of `RESULTS` a network belongs to."""
    plain = network.attention == "none" and not network.multi_scale
    if network.architecture == "attnresunet" and plain:
        return "resunet"
    return network.architecture
