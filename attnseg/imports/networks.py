"""Networks of other frameworks in PyTorch: their weights, the mean of several, their graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from attnseg.export.graphs.graph import Graph
from attnseg.export.graphs.norms import spell_out_norms
from attnseg.export.source.onnx import INPUT, OPSET, OUTPUT, tidy
from attnseg.runtime.errors import ExportError
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.manifest import ModelRecord

_LARGEST_GRAPH = (1 << 31) - (1 << 20)  # bytes; a protobuf message has less than 2 GiB


@dataclass(frozen=True)
class ImportedModel:
    """A model of another framework.

    Attributes:
        record: Channels, labels and steps.
        network: The network, in evaluation mode; its output are logits.
        origin: Names, versions and files of the model, for the manifest.
        notes: Sentences on what was imported, for the console and the documents.
    """

    record: ModelRecord
    network: nn.Module
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()


class Ensemble(nn.Module):
    """Mean of the logits of several networks, as nnU-Net combines its folds."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, C, X, Y, Z)` to logits `(B, K, X, Y, Z)`."""
        first, *others = self.networks
        total: Tensor = first(image)
        for network in others:
            total = total + network(image)
        return total / len(self.networks) if others else total


def load_weights(path: Path, network: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """Assign weights to a network, which must have exactly these.

    Raises:
        ExportError: Names or shapes of the weights are not those of the network.
    """
    try:
        network.load_state_dict(dict(weights), strict=True, assign=True)
        network.float()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[1:2]]
        reason = f" ({lines[0][:160]})" if lines else ""
        raise ExportError(
            f"{path}: its weights are not those of the network that the model names{reason}",
            "give the model as it was trained",
        ) from error
    return network


def network_graph(network: nn.Module, channels: int, window: Shape) -> Graph:
    """Graph of a network of another framework, whose norms are accurate in every engine.

    Args:
        network: Network in evaluation mode, on the CPU.
        channels: Number of input channels.
        window: Size of a window; if the network's operators allow it, the graph takes others too.

    Raises:
        ExportError: PyTorch cannot export the network, or the graph would have 2 GiB or more.
    """
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    if size > _LARGEST_GRAPH:
        raise ExportError(
            f"the weights have {size / 2**30:.1f} GiB, a graph has less than 2",
            "import fewer folds",
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its package hints are not needed
    failures: list[Exception] = []
    for dynamic in (True, False):
        try:
            model = _traced(network, channels, window, dynamic)
        except Exception as error:  # the exporter's exceptions have no other common base class
            failures.append(error)
            continue
        tidy(model)
        spell_out_norms(model)
        onnx.checker.check_model(model, full_check=True)
        return Graph(model)
    reason = " ".join(str(failures[-1]).split())[:200]
    raise ExportError(f"PyTorch cannot export the network to ONNX ({reason})")


def _traced(network: nn.Module, channels: int, window: Shape, dynamic: bool) -> onnx.ModelProto:
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 2: auto, 3: auto, 4: auto} if dynamic else None
    example = torch.zeros(2 if dynamic else 1, channels, *window)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's warnings about its own internals
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(sizes,) if dynamic else None,
            verbose=False,
        )
    assert program is not None
    return program.model_proto
