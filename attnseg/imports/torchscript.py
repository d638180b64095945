"""Import of TorchScript files."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from attnseg.export.graphs.graph import Graph
from attnseg.export.source.foreign import foreign_graph
from attnseg.export.source.onnx import INPUT, OUTPUT
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.errors import ExportError
from attnseg.runtime.model.manifest import ModelRecord
from attnseg.runtime.steps.decide import Decision
from attnseg.trainer.engine import TorchEngine

_OPSET = 18  # of the exporter for TorchScript


def read_torchscript(path: Path) -> nn.Module:
    """Network of a TorchScript file, in evaluation mode.

    Raises:
        ExportError: The file is missing or no TorchScript.
    """
    if not path.is_file():
        raise ExportError(f"{path}: is not a file", "give a file of torch.jit.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and models are there
            loaded: Any = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{path}: is not TorchScript, or is damaged", "give a file of torch.jit.save"
        ) from error
    network: nn.Module = loaded.float().eval()
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
    written: Any = io.BytesIO()  # which the exporter takes, and does not say so
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


_ACTIVATIONS = ("aten::softmax", "aten::log_softmax", "aten::sigmoid")


def logits_network(network: nn.Module) -> nn.Module | None:
    """A scripted network without the activation at its end; None if its last operator is no such.

    Logits that are computed from its probabilities would be no reference: a probability next to 1
    has lost them, as float32 has steps of 6e-8 there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and models are there
            frozen: Any = torch.jit.freeze(network, optimize_numerics=False)
    except RuntimeError:  # freezing does not support all of TorchScript
        return None
    (output,) = frozen.graph.outputs()
    last = output.node()
    if last.kind() not in _ACTIVATIONS:
        return None
    output.replaceAllUsesWith(next(last.inputs()))
    logits: nn.Module = frozen
    return logits


_TOLERANCE = 1e-3  # of probabilities


def check_same_function(path: Path, network: nn.Module, engine: Engine, spec: ModelRecord) -> None:
    """Compare the probabilities of logits with those that the network returns, on noise.

    A network that ends in a log-softmax returns their logarithms, which are negative.

    Raises:
        ExportError: They differ by more than rounding.
    """
    shape = (1, len(spec.task.channels), *spec.inference.window)
    window = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = Decision.of(spec.task).activate(engine.infer(window)[0])
    own = TorchEngine(network).infer(window)[0]
    expected = np.exp(own) if own.min() < 0 else own
    if (difference := float(np.abs(found - expected).max())) > _TOLERANCE:
        raise ExportError(
            f"{path}: without its last activation, it gives probabilities that differ by "
            f"{difference:.1e} from its own",
            "export it to ONNX, and give that file to attnseg export",
        )
