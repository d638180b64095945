"""Import of TorchScript files."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

from attnseg.export.graphs.graph import Graph
from attnseg.export.source.foreign import foreign_graph
from attnseg.export.source.onnx import INPUT, OUTPUT
from attnseg.runtime.errors import ExportError
from attnseg.runtime.model.manifest import ModelRecord

_OPSET = 18  # of the exporter for TorchScript


def read_torchscript(path: Path) -> nn.Module:
    """Network of a TorchScript file, in evaluation mode.

    Raises:
        ExportError: The file is missing or no TorchScript.
    """
    if not path.is_file():
        raise ExportError(f"{path}: is not a file", "give a file of torch.jit.save")
    try:
        network: nn.Module = torch.jit.load(str(path), map_location="cpu").float().eval()
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{path}: is not TorchScript, or is damaged", "give a file of torch.jit.save"
        ) from error
    return network


def scripted_graph(
    path: Path, network: nn.Module, spec: ModelRecord
) -> tuple[Graph, tuple[str, ...]]:
    """Graph of a scripted network, and sentences on what was changed.

    Raises:
        ExportError: PyTorch cannot export the network, or it does not match the spec.
    """
    sizes = {0: "batch", 2: "x", 3: "y", 4: "z"}
    example = torch.zeros(1, len(spec.task.channels), *spec.inference.window)
    written = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # the exporter is deprecated, and there is no other
            torch.onnx.export(
                network,
                (example,),
                written,
                dynamo=False,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: sizes, OUTPUT: sizes},
            )
    except Exception as error:  # the exporter's exceptions have no other common base class
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path}: PyTorch cannot export it to ONNX ({reason})") from error
    return foreign_graph(path, onnx.load_from_string(written.getvalue()), spec)
