"""The end of a graph of another trainer: logits, or what was computed from them.

The runtime blends logits and takes softmax or sigmoid itself where it needs probabilities. A
softmax or log-softmax over the classes at the end of a graph is therefore left out, and a sigmoid
if the spec says so: the decision and the probabilities of the runtime stay the same. Argmax loses
what the runtime needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import numpy_helper

from attnseg.runtime.errors import ExportError
from attnseg.runtime.task import Activation

LOGITS = "the output must be the logits, (batch, classes, x, y, z), before softmax or argmax"
_CLASS_AXIS = 1
_RESHAPING = ("Squeeze", "Unsqueeze", "Reshape", "Flatten")
_PASSING = ("Identity", "Cast", "Dropout", "Transpose")
_SOFTMAX = ("Softmax", "LogSoftmax")
_SIGMOID = ("Sigmoid", "HardSigmoid")
_DECIDED = ("ArgMax", "ArgMin", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Round", "TopK")


def overlapping(path: Path, cause: str) -> ExportError:
    """Error for a network with sigmoid outputs."""
    return ExportError(
        f"{path}: {cause}; such outputs are regions that may overlap",
        "set activation to sigmoid in the spec, and outputs to the region of each channel",
    )


def use_logits(path: Path, model: onnx.ModelProto, activation: Activation) -> tuple[str, ...]:
    """Leave out the activation at the end of a graph, in place.

    Returns:
        A sentence on the change; empty if the graph was not changed.

    Raises:
        ExportError: The graph ends in another activation, in a decision such as argmax, or in a
            softmax over another axis.
    """
    nodes = list(_tail(model))
    if not nodes:
        return ()
    last = nodes[-1]
    name = f"{last.op_type} ({last.name or last.output[0]})"
    if last.op_type in _DECIDED:
        raise ExportError(f"{path}: ends in {name}, so it outputs decisions", LOGITS)
    if last.op_type in _SIGMOID and activation == "softmax":
        raise overlapping(path, f"ends in {name}")
    if last.op_type in (*_SOFTMAX, "HardSigmoid") and activation == "sigmoid":
        raise ExportError(f"{path}: ends in {name}, its spec names a sigmoid", LOGITS)
    if last.op_type in _SIGMOID:
        return (_left_out(last, name),)
    if last.op_type not in _SOFTMAX or any(n.op_type in _RESHAPING for n in nodes):
        return ()
    axis, over = _class_axis(nodes[:-1]), _softmax_axis(last, model)
    if axis != over:
        raise ExportError(
            f"{path}: ends in {name} over axis {over}, the classes are on axis {axis}", LOGITS
        )
    return (_left_out(last, name),)


def _left_out(node: onnx.NodeProto, name: str) -> str:
    """Make an activation the identity, and return a sentence on it."""
    del node.attribute[:]
    node.op_type = "Identity"
    return (
        f"The ONNX file ends in {name}. The bundle's graph leaves it out and outputs the logits, "
        f"{node.input[0]}."
    )


def _tail(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes from the output upwards, to the first that computes more than another layout."""
    producers = {o: node for node in model.graph.node for o in node.output}
    name = model.graph.output[0].name
    while node := producers.get(name):
        yield node
        if node.op_type not in (*_PASSING, *_RESHAPING):
            return
        name = node.input[0]


def _class_axis(nodes: Sequence[onnx.NodeProto]) -> int:
    """Axis of the classes above `nodes`, which lead from the output upwards."""
    axis = _CLASS_AXIS
    for node in nodes:
        if node.op_type == "Transpose":
            permutation = next(iter(node.attribute), None)
            axis = permutation.ints[axis] if permutation else 4 - axis
    return axis


def _softmax_axis(node: onnx.NodeProto, model: onnx.ModelProto) -> int:
    """Axis of a softmax of a 5-D tensor, from 0."""
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    default = -1 if opset >= 13 else 1
    return next((a.i for a in node.attribute if a.name == "axis"), default) % 5


def refuse_training_mode(path: Path, model: onnx.ModelProto) -> None:
    """Refuse nodes that are random, or that use the statistics of the window, as in training.

    Raises:
        ExportError: A node is in training mode, or draws random numbers.
    """
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if _trains(node, model, opset) or node.op_type.startswith(("Random", "Bernoulli")):
            raise random(path, f"{node.op_type} ({node.name or node.output[0]}) is active")


def random(path: Path, cause: str) -> ExportError:
    """Error for a network in training mode."""
    return ExportError(
        f"{path}: {cause}, as in training",
        "export the network in evaluation mode (in PyTorch, model.eval() before torch.onnx.export)",
    )


def _trains(node: onnx.NodeProto, model: onnx.ModelProto, opset: int) -> bool:
    """Whether a node that differs between training and inference is in training mode."""
    if node.op_type not in ("Dropout", "BatchNormalization"):
        return False
    settings = {a.name: a.i for a in node.attribute}
    if opset < 7:
        return not settings.get("is_test", 0)
    if node.op_type == "BatchNormalization":
        return bool(settings.get("training_mode", 0))
    return len(node.input) > 2 and bool(_constant(node.input[2], model))


def _constant(name: str, model: onnx.ModelProto) -> bool:
    """Value of a boolean constant; False if it is computed."""
    tensors = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return name in tensors and bool(numpy_helper.to_array(tensors[name]).any())
