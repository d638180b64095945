"""Checks that a built engine computes in the precision of its graph."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from attnseg.export.graphs.graph import Graph
from attnseg.runtime.errors import ExportError

_WEIGHTS_SLACK = 1.25  # tolerance for constants that the compiler adds
_PADDED_TO = 32  # channel counts are padded to a multiple of the kernels' tile


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def fp32_layers(trt: Any, network: Any) -> list[str]:
    """Names of the convolutions with fp32 input or output, as parsed by TensorRT."""
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    return [
        layer.name
        for layer in _layers(network)
        if layer.type in kinds
        and trt.DataType.FLOAT in (layer.get_input(0).dtype, layer.get_output(0).dtype)
    ]


def is_fp16(graph: Graph) -> bool:
    """Whether a graph holds fp16 weights, whatever its input's type."""
    return any(i.data_type == TensorProto.FLOAT16 for i in graph.model.graph.initializer)


def _padded_bytes(array: NDArray[Any]) -> int:
    """Size in bytes of weights `(out, in, x, y, z)` with both channel counts padded."""
    if array.ndim < 2:
        return array.nbytes
    channels = [-(-count // _PADDED_TO) * _PADDED_TO for count in array.shape[:2]]
    return int(math.prod((*channels, *array.shape[2:])) * array.itemsize)


def weight_bytes(graph: Graph) -> int:
    """Total size in bytes of a graph's weights, with padded channel counts."""
    weights = graph.model.graph.initializer
    return sum(_padded_bytes(numpy_helper.to_array(w)) for w in weights)


def check_engine_weights(log: str, graph_bytes: int) -> None:
    """Reject an engine whose weights are larger than its graph's: it was promoted to fp32.

    Args:
        log: Log of the builder; nothing is checked if it does not state the weights' size.
        graph_bytes: Size of the graph's weights, see `weight_bytes`.

    Raises:
        ExportError: The engine's weights are too large.
    """
    stated = re.findall(r"Total Weights Memory: (\d+) bytes", log)
    if stated and int(stated[-1]) > _WEIGHTS_SLACK * graph_bytes:
        raise ExportError(
            f"the engine holds {int(stated[-1]) / 1e6:.1f} MB of weights, its graph only "
            f"{graph_bytes / 1e6:.1f} MB: it was not built in the graph's precision"
        )


def _is_fp32(tensor: Any) -> bool:
    """Whether an inspected tensor is fp32: `DataType` in TensorRT 11, a format text in 10."""
    words = [str(tensor.get(name, "")) for name in ("DataType", "Format/Datatype", "Format")]
    return any(text == "Float" or "FP32" in text for text in words)


def check_inspected(report: str, in_fp32: Iterable[str]) -> None:
    """Reject an fp16 engine with fp32 convolutions, according to TensorRT's engine inspector.

    Args:
        report: JSON report of the engine inspector.
        in_fp32: Names of the convolutions that are intentionally fp32.

    Raises:
        ExportError: A convolution has fp32 input and output.
    """
    layers = [layer for layer in json.loads(report).get("Layers", []) if isinstance(layer, dict)]
    grown = [
        str(layer.get("Name"))
        for layer in layers
        if "conv" in str(layer.get("LayerType")).lower()
        and all(_is_fp32(end[0]) for end in (layer.get("Inputs"), layer.get("Outputs")) if end)
        and not any(name in str(layer.get("Name")) for name in in_fp32)
    ]
    if grown:
        raise ExportError(f"the fp16 engine holds convolutions in fp32: {', '.join(grown[:3])}")


def inspect_layers(trt: Any, log: Any, content: Any) -> str | None:
    """JSON report of TensorRT's engine inspector, or None if the engine cannot be loaded."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # a version-compatible engine built here
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
