"""Parameters and computational cost of the networks, beside the paper's values."""

from __future__ import annotations

from collections.abc import Mapping

from attnseg.evaluation.paper import RESULTS
from attnseg.trainer.model import MODELS, NetworkConfig, network_settings
from attnseg.trainer.networks import cost_of
from attnseg.trainer.variants import ABLATION, Cost, variant_network

SUMMARY_HEADER = ("", "parameters, M", "paper", "GMAC, 64^3", "paper")


def network_costs(preset: str | None = None) -> dict[str, tuple[Cost, Cost]]:
    """Cost of each network and the paper's, by title: the ablation of a preset, the baselines.

    The paper's costs stand beside the networks of the paper's size only.

    Raises:
        ConfigError: The preset does not exist.
    """
    network = network_settings(None, preset)
    rows = {
        f"ablation: {name}": (
            variant_network(network, variant),
            variant.paper if network == NetworkConfig() else Cost(),
        )
        for name, variant in ABLATION.items()
    }
    rows |= {RESULTS[name].title: (MODELS[name], Cost()) for name in ("unet3d", "deepmedic")}
    return {title: (cost_of(config), paper) for title, (config, paper) in rows.items()}


def summary_rows(costs: Mapping[str, tuple[Cost, Cost]]) -> list[tuple[str, ...]]:
    """Rows under `SUMMARY_HEADER` of the costs that `network_costs` returns."""
    return [(title, *_cells(own, paper)) for title, (own, paper) in costs.items()]


def _cells(own: Cost, paper: Cost) -> list[str]:
    values = ((own.parameters_m, 3), (paper.parameters_m, 1), (own.gmac, 2), (paper.gmac, 1))
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
