"""Parameters and computational cost of the networks, beside the paper's values."""

from __future__ import annotations

from collections.abc import Mapping

from attnseg.evaluation.paper import RESULTS
from attnseg.runtime.errors import DependencyError
from attnseg.trainer.model import MODELS, RELATED, NetworkConfig, network_settings
from attnseg.trainer.networks import cost_of
from attnseg.trainer.variants import ABLATION, Cost, variant_network

SUMMARY_HEADER = ("", "parameters, M", "paper", "GMAC, 64^3", "paper")


def network_costs(preset: str | None = None) -> dict[str, tuple[Cost, Cost]]:
    """Cost of each network and the paper's, by title.

    The networks are the ablation of a preset, the paper's baselines and its related work. The
    paper's costs stand beside the networks of the paper's size only. The cost of a network that
    needs a library that is not installed is unknown.

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
    titles = {name: RESULTS[name].title for name in ("unet3d", "deepmedic")} | RELATED
    rows |= {title: (MODELS[name], Cost()) for name, title in titles.items()}
    return {title: (_own_cost(config), paper) for title, (config, paper) in rows.items()}


def _own_cost(config: NetworkConfig) -> Cost:
    try:
        return cost_of(config)
    except DependencyError:
        return Cost()


def summary_rows(costs: Mapping[str, tuple[Cost, Cost]]) -> list[tuple[str, ...]]:
    """Rows under `SUMMARY_HEADER` of the costs that `network_costs` returns."""
    return [(title, *_cells(own, paper)) for title, (own, paper) in costs.items()]


def _cells(own: Cost, paper: Cost) -> list[str]:
    values = ((own.parameters_m, 3), (paper.parameters_m, 1), (own.gmac, 2), (paper.gmac, 1))
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
