"""INT8: weights per channel, activations by calibration, as Q/DQ pairs that engines read.

By onnxruntime.quantization, symmetric as TensorRT asks for. The range of an activation is a
percentile of what the calibration windows give, so that a few outliers do not cost all others
their digits. The first and the last convolution, which see the scan and give the logits, stay as
they are.
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

from attnseg.runtime.errors import ExportError

QUANTISED = ("Conv",)
_PERCENTILE = 99.999
_LEAST_OPSET = 13  # the first with weights quantised per channel


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """onnxruntime.quantization prints, and logs advice about a step that changes nothing here."""
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
    except Exception as error:  # of three libraries, without a common base
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"the graph cannot be quantised ({reason}); leave --int8 out") from error


class _Windows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, windows: Iterable[NDArray[np.float32]]) -> None:
        self._feeds: Iterator[NDArray[np.float32]] = iter(windows)
        self._name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        window = next(self._feeds, None)
        return None if window is None else {self._name: window[None]}


def kept_in_float(content: bytes) -> list[str]:
    """Names of the first and the last convolution of a graph."""
    nodes = onnx.load_from_string(content).graph.node
    names = [node.name for node in nodes if node.op_type in QUANTISED]
    return [names[0], names[-1]] if names else []


def quantise(content: bytes, windows: Iterable[NDArray[np.float32]]) -> bytes:
    """An fp32 graph with int8 convolutions.

    Args:
        content: the fp32 graph.
        windows: `(C, X, Y, Z)` each, normalised, of scans like those to come.

    Raises:
        ExportError: there is no window, the graph holds no convolution or is too old, or the
            quantiser refuses it.
    """
    model = onnx.load_from_string(content)
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        raise ExportError(
            f"int8 needs ONNX opset {_LEAST_OPSET} or later, the graph has {opset}; export the "
            "ONNX file with a later one"
        )
    windows = list(windows)
    if not windows:
        raise ExportError("the scans to calibrate on hold nothing but 0; give others")
    kept = kept_in_float(content)
    if len({node.name for node in model.graph.node if node.op_type in QUANTISED} - {*kept}) == 0:
        raise ExportError("the graph holds no convolution to quantise; export without --int8")
    with tempfile.TemporaryDirectory() as scratch, _silent(), _in_words():
        source, target = Path(scratch) / "model.onnx", Path(scratch) / "int8.onnx"
        source.write_bytes(content)
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
                "QuantizeBias": False,  # TensorRT takes biases in float only
                "WeightSymmetric": True,
                "CalibPercentile": _PERCENTILE,
            },
        )
        quantised = onnx.load(target)
        del quantised.graph.value_info[:]
        onnx.checker.check_model(quantised, full_check=True)
    return bytes(quantised.SerializeToString(deterministic=True))
