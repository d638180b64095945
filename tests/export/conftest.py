"""A model of another trainer, as an ONNX file, and its spec."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import Network, build_network

SPEC: dict[str, Any] = {
    "name": "liver-ct",
    "channels": [{"name": "ct", "suffixes": ["_ct"]}],
    "labels": [
        {"name": "background", "value": 0},
        {"name": "liver", "value": 1},
        {"name": "tumour", "value": 2},
    ],
    "normalisation": {"foreground": "all", "landmarks": None},
    "inference": {"window": [32, 32, 32], "window_multiple": 2, "overlap": 0.5},
}


class Plain(nn.Module):
    """A network as others write them, without anything of attnseg."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm3d(8, affine=True)
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.refine = nn.Conv3d(8, 8, 3, padding=1)
        self.head = nn.Conv3d(8, 3, 1, bias=False)
        nn.init.normal_(self.head.weight)  # so that every class is predicted somewhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.leaky_relu(self.norm(self.down(x)), 0.01)
        return self.head(torch.relu(self.refine(torch.relu(self.up(hidden)))))


@pytest.fixture(scope="session")
def network() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


@pytest.fixture(scope="session")
def graph(network: Plain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "any_model.onnx"
    axes = {"input": {0: "n", 2: "x", 3: "y", 4: "z"}}
    example = torch.zeros(1, 1, 32, 32, 32)
    with warnings.catch_warnings():  # about the old exporter, used for most files
        warnings.simplefilter("ignore")
        names = {"input_names": ["input"], "dynamic_axes": axes}
        torch.onnx.export(network, (example,), path, dynamo=False, **names)
    return path


def spec_file(folder: Path, **changes: Any) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({k: v for k, v in {**SPEC, **changes}.items() if v is not None}))
    return path


def lively_network(config: NetworkConfig) -> Network:
    """A network whose batch norms are not at their initial values."""
    torch.manual_seed(0)
    network = build_network(config)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()
