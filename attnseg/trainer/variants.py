"""Variants of the paper's network: the rows of its ablation and their costs (section 4).

Of the eight costs in the paper's ablation, only the four below are known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnseg.trainer.model import NetworkConfig


@dataclass(frozen=True)
class Cost:
    """Cost of a network: parameters in millions, GMAC for a 4x64x64x64 input; None if unknown."""

    parameters_m: float | None = None
    gmac: float | None = None


@dataclass(frozen=True)
class Variant:
    """A row of the ablation: the modules that are on, and the costs that the paper states."""

    attention: bool
    multi_scale: bool
    paper: Cost


ABLATION: dict[str, Variant] = {
    "baseline": Variant(False, False, Cost(3.4, 12.8)),
    "attention": Variant(True, False, Cost()),
    "multi-scale": Variant(False, True, Cost()),
    "both": Variant(True, True, Cost(3.6, 13.1)),
}

DIFFERENCES = (
    "The paper prints neither widths nor strides, so these are reconstructed to come near its "
    "totals, 3.6 M parameters and 13.1 GMAC. Its rows cannot all be reproduced: it attributes "
    "0.1 M parameters to attention, although its formula (a sigmoid of a mean) has none, and its "
    "eight numbers are inconsistent: the cost of multi-scale would be negative."
)


def variant_network(network: NetworkConfig, variant: Variant) -> NetworkConfig:
    """Return the network of a row of the ablation, with `network.attention` where it is on."""
    attention = network.attention if variant.attention else "none"
    return replace(network, attention=attention, multi_scale=variant.multi_scale)
