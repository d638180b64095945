"""Quantisation of graphs to int8 as Q/DQ pairs: weights per channel, activations by calibration.

It uses onnxruntime.quantization, symmetric as TensorRT requires. The range of an activation is a
percentile of its values on the calibration windows, so that a few outliers do not reduce the
resolution of all other values. The first and the last convolution, which read the scan and compute
the logits, stay in fp32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from attnseg.export.graphs.graph import Graph
from attnseg.runtime.engines.base import reason_of
from attnseg.runtime.errors import ExportError, Setting

QUANTISED = ("Conv",)
_PERCENTILE = 99.999
_LEAST_OPSET = 13  # first opset with per-channel quantisation


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress prints and log messages of onnxruntime.quantization."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from three libraries, without a common base class
        raise ExportError(
            f"the graph cannot be quantised ({reason_of(error)})", "leave {} out", Setting("int8")
        ) from error


class _Windows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, windows: Iterable[NDArray[np.float32]]) -> None:
        self._feeds: Iterator[NDArray[np.float32]] = iter(windows)
        self._name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        window = next(self._feeds, None)
        return None if window is None else {self._name: window[None]}


def kept_in_float(graph: Graph) -> list[str]:
    """Names of the first and the last convolution of a graph, which are not quantised."""
    nodes = graph.model.graph.node
    names = [node.name for node in nodes if node.op_type in QUANTISED]
    return [names[0], names[-1]] if names else []


def quantise(graph: Graph, windows: Iterable[NDArray[np.float32]]) -> Graph:
    """Quantise the convolutions of an fp32 graph to int8.

    Args:
        graph: The fp32 graph.
        windows: Normalised windows `(C, X, Y, Z)`, float32, of representative scans.

    Raises:
        ExportError: There is no window, the graph has too few convolutions or too old an opset, or
            the quantiser rejects it.
    """
    model = graph.model
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        raise ExportError(
            f"int8 needs ONNX opset {_LEAST_OPSET} or later, the graph has {opset}",
            "export the ONNX file with a later one",
        )
    windows = list(windows)
    if not windows:
        raise ExportError("the calibration scans contain only zeros", "give other scans")
    kept = kept_in_float(graph)
    if len({node.name for node in model.graph.node if node.op_type in QUANTISED} - {*kept}) == 0:
        raise ExportError(
            "the graph holds no convolution to quantise", "leave {} out", Setting("int8")
        )
    with tempfile.TemporaryDirectory() as scratch, _silent(), _in_words():
        source, target = Path(scratch) / "model.onnx", Path(scratch) / "int8.onnx"
        source.write_bytes(graph.content)
        quantize_static(
            str(source),
            str(target),
            _Windows(model.graph.input[0].name, windows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={
                "ActivationSymmetric": True,
                "QuantizeBias": False,  # TensorRT requires float biases
                "WeightSymmetric": True,
                "CalibPercentile": _PERCENTILE,
            },
        )
        quantised = onnx.load(target)
        del quantised.graph.value_info[:]
        onnx.checker.check_model(quantised, full_check=True)
    return Graph(quantised)
