"""Small ONNX files, as other trainers and exporters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

LABELS = 3
LOGIT_WEIGHTS = np.array([1.0, -2.0, 0.5], np.float32).reshape(LABELS, 1, 1, 1, 1)
"""Logits are these multiples of the image's one channel."""


def node(kind: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(
        kind, inputs.split(), output.split(), name=f"my_{output.split()[0]}", **attributes
    )


def save_model(
    path: Path,
    *after: NodeProto,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    out: tuple[Any, ...] = ("n", LABELS, "x", "y", "z"),
    domain: str = "",
    **weights: NDArray[Any],
) -> Path:
    """Save a network whose logits are `LOGIT_WEIGHTS` times the image, and then nodes to `out`.

    Args:
        path: File to write.
        after: Nodes from the tensor `logits` to the tensor `out`.
        opset: Version of the operators.
        kind: Element type of the output.
        out: Dimensions of the output.
        domain: Domain of further operators.
        weights: Constants that the nodes use; `w` replaces the weights of the logits.
    """
    stored = {"w": LOGIT_WEIGHTS, **weights}
    nodes = [node("Conv", "image w", "logits"), *(after or (node("Identity", "logits", "out"),))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, "x", "y", "z"])],
        [helper.make_tensor_value_info("out", kind, list(out))],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else ())]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path
