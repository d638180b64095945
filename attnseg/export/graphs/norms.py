"""Instance norms spelt out with means taken axis by axis, which every engine computes accurately.

ONNX Runtime and OpenVINO add the voxels of a channel one after the other in float32. Over windows
with much background their instance norm errs by 1e-3 to 7e-3 (PyTorch: 1e-6), which is measured in
docs/import.md. Means axis by axis err by 2e-6, for 3 to 5 % of the time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

_SPATIAL = 3
_BOUND = 3e38  # of fp32; a clip to it changes nothing


def spell_out_norms(model: onnx.ModelProto) -> int:
    """Replace every instance norm of 5-D tensors, in place; return how many there were."""
    graph = model.graph
    constants, ranks = _constants(graph), _ranks(model)
    taken = {value for node in graph.node for value in node.output} | set(constants)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        if node.op_type != "InstanceNormalization" or not (
            ranks.get(node.input[0]) == 2 + _SPATIAL and _known(node, constants)
        ):
            nodes.append(node)
            continue
        prefix = f"instance_norm_{count}"
        while any(name.startswith(prefix) for name in taken):
            prefix += "_"
        nodes += _Norm(graph, constants, node, prefix).nodes()
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    if count:
        del graph.value_info[:]
    return count


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    found = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {name: numpy_helper.to_array(tensor) for name, tensor in found.items()}


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Number of dimensions of every tensor whose shape is known."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    shaped = (v for v in values if v.type.tensor_type.HasField("shape"))
    return {value.name: len(value.type.tensor_type.shape.dim) for value in shaped}


def _known(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    return all(name in constants for name in node.input[1:3])


class _Norm:
    """Nodes that compute one instance norm."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        constants: dict[str, np.ndarray],
        node: onnx.NodeProto,
        prefix: str,
    ) -> None:
        self._graph, self._constants, self._node, self._prefix = graph, constants, node, prefix
        self._nodes: list[onnx.NodeProto] = []

    def nodes(self) -> list[onnx.NodeProto]:
        image, scale, bias = self._node.input
        epsilon = next((a.f for a in self._node.attribute if a.name == "epsilon"), 1e-5)
        centred = self._add("Sub", [image, self._mean(image, "mean")], "centred")
        variance = self._mean(self._add("Mul", [centred, centred], "square"), "variance")
        raised = self._add("Add", [variance, self._constant("epsilon", epsilon)], "raised")
        std = self._add("Sqrt", [raised], "std")
        factor = self._add("Div", [self._per_channel("scale", scale), std], "factor")
        scaled = self._add("Mul", [centred, factor], "scaled")
        shift = self._per_channel("bias", bias)
        self._nodes.append(
            helper.make_node("Add", [scaled, shift], self._node.output, f"{self._prefix}_out")
        )
        return self._nodes

    def _mean(self, value: str, name: str) -> str:
        """Mean over space, one axis after the other."""
        for axis in reversed(range(2, 2 + _SPATIAL)):
            axes = self._constant(f"axis_{axis}", np.array([axis], np.int64))
            value = self._add("ReduceMean", [value, axes], f"{name}_{axis}")
            if axis > 2:  # without it, OpenVINO joins the means to the operator that is inaccurate
                low, high = self._constant("low", -_BOUND), self._constant("high", _BOUND)
                value = self._add("Clip", [value, low, high], f"{name}_{axis}_kept")
        return value

    def _add(self, operator: str, inputs: list[str], name: str) -> str:
        output = f"{self._prefix}_{name}"
        node = helper.make_node(operator, inputs, [output], output)
        self._nodes.append(node)
        return output

    def _per_channel(self, name: str, source: str) -> str:
        values = self._constants[source].reshape(1, -1, *(1,) * _SPATIAL)
        return self._constant(name, values)

    def _constant(self, name: str, value: float | np.ndarray) -> str:
        full = f"{self._prefix}_{name}"
        if full not in self._existing():
            array = np.asarray(value, np.float32) if isinstance(value, float) else value
            self._graph.initializer.append(numpy_helper.from_array(array, full))
        return full

    def _existing(self) -> Iterator[str]:
        return (initializer.name for initializer in self._graph.initializer)
