"""Layer-by-layer comparison of an fp16 graph with its fp32 graph, to locate the first error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from attnseg.export.graphs.fp16 import open_session, simulate_fp16, with_all_tensors
from attnseg.export.graphs.graph import Graph
from attnseg.runtime.engines.base import reason_of
from attnseg.runtime.errors import ExportError


@dataclass(frozen=True)
class LayerError:
    """Error of one tensor against the same tensor in fp32.

    Attributes:
        tensor: Name of the tensor.
        operator: Type of the node that computes it.
        difference: Largest absolute difference, as a share of the largest fp32 magnitude.
    """

    tensor: str
    operator: str
    difference: float


def compare_layers(
    exact: Graph, rounded: onnx.ModelProto, window: NDArray[np.float32], threads: int
) -> list[LayerError]:
    """Compare the tensors that two graphs share, in the order of the nodes.

    Args:
        exact: The fp32 graph.
        rounded: Model to compare, with fp32 input.
        window: Input `(B, C, X, Y, Z)`, float32.
        threads: Number of processor threads.

    Raises:
        ExportError: ONNX Runtime cannot run one of them.
    """
    source = with_all_tensors(exact.model)
    operators = {o: node.op_type for node in source.graph.node for o in node.output if o}
    sessions = [open_session(m, threads) for m in (source, with_all_tensors(rounded))]
    values = []
    for session in sessions:
        names = [o.name for o in session.get_outputs()]
        try:
            found = session.run(None, {session.get_inputs()[0].name: window})
        except Exception as error:  # its exceptions have no other common base class
            raise ExportError(f"the layers cannot be compared ({reason_of(error)})") from error
        values.append(dict(zip(names, found, strict=True)))
    errors = []
    for name, operator in operators.items():
        if name in values[1]:
            expected, got = values[0][name], values[1][name].astype(np.float32)
            scale = float(np.abs(expected).max()) or 1.0
            with np.errstate(invalid="ignore"):
                difference = float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max()) / scale
            errors.append(LayerError(name, operator, difference))
    return errors


def stands_out(errors: Sequence[LayerError]) -> LayerError | None:
    """The first tensor whose error exceeds ten times the largest error before it, or None."""
    before = 1e-3  # error of one rounding to fp16
    for error in errors:
        if not error.difference <= 10 * before:
            return error
        before = max(before, error.difference)
    return None


def first_wrong_layer(
    exact: Graph, half: Graph, window: NDArray[np.float32], threads: int
) -> LayerError | None:
    """The first layer of an fp16 graph that is wrong on a window `(B, C, X, Y, Z)`, or None."""
    return stands_out(compare_layers(exact, simulate_fp16(half), window, threads))
