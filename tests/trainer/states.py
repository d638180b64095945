"""States of runs, for tests of checkpoints."""

from __future__ import annotations

from typing import Any

from attnseg.data.task import BRATS
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import build_network
from attnseg.trainer.preparation import Preparation
from tests.conftest import PLAIN

SMALL = NetworkConfig(widths=(2, 4), bottleneck=4)


def state_of(network: NetworkConfig = SMALL, **changes: Any) -> dict[str, Any]:
    """A state with every entry that a checkpoint must have, and without those to resume from."""
    return {
        "config": TrainConfig(network, patch=8).to_dict(),
        "data": "phantoms",
        **Preparation(BRATS, PLAIN).to_dict(),
        "split": {"train": ["a"], "validation": ["b"]},
        "device": "cpu",
        "model": build_network(network).state_dict(),
        "average": None,
        "epoch": 1,
        "validation": {"loss": 1.0, "WT": 0.5, "TC": 0.5, "ET": 0.5},
        "seconds": 9.0,
        **changes,
    }
