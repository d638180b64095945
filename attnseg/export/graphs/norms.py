"""Instance and group norms spelt out with means axis by axis, accurate in every engine.

ONNX Runtime and OpenVINO add the voxels of a channel one after the other in float32. Over windows
with much background their instance norm errs by 1e-3 to 7e-3 (PyTorch: 1e-6), which is measured in
docs/import.md. Means axis by axis err by 2e-6, for 3 to 5 % of the time.

PyTorch exports a group norm as the instance norm of the voxels `(N, G, -1)` of each group, between
two reshapes; all three are replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

_SPATIAL = 3
_BOUND = 3e38  # of fp32; a clip to it changes nothing


def spell_out_norms(model: onnx.ModelProto) -> int:
    """Replace every instance and group norm of 5-D tensors, in place; return how many there were.

    Norms whose scale, bias or groups are computed in the graph are left as they are.
    """
    graph = model.graph
    tensors = _Tensors(model)
    sites = {node.output[0]: site for node in graph.node if (site := tensors.site(node))}
    if not sites:
        return 0
    last = {site.output: site for site in sites.values()}
    taken = {value for node in graph.node for value in node.output} | set(tensors.constants)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        output = node.output[0]
        if output in last:  # a reshape after the norm, or the norm itself
            prefix = f"norm_{len(nodes)}"
            while any(name.startswith(prefix) for name in taken):
                prefix += "_"
            nodes += _Norm(graph, tensors.constants, last[output], prefix).nodes()
        elif output not in sites:
            nodes.append(node)
    used = {name for node in nodes for name in node.input} | {out.name for out in graph.output}
    before = {site.norm.input[0] for site in last.values()}
    shapes = {site.shape for site in last.values()}
    del graph.node[:]
    graph.node.extend(n for n in nodes if n.output[0] in used or n.output[0] not in before | shapes)
    del graph.value_info[:]
    return len(sites)


@dataclass(frozen=True)
class _Site:
    """A norm and what surrounds it.

    Attributes:
        norm: Node of the instance norm.
        image: Tensor `(N, C, X, Y, Z)` that is normalised.
        output: Normalised tensor `(N, C, X, Y, Z)`.
        channels: Number of channels C; 0 if it is not needed.
        groups: Number of groups; 0 for an instance norm.
        shape: Tensor with the shape that the groups are turned back to; empty if there are none.
    """

    norm: onnx.NodeProto
    image: str
    output: str
    channels: int = 0
    groups: int = 0
    shape: str = ""


class _Tensors:
    """Constants, shapes, producers and consumers of the tensors of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = _constants(model.graph)
        self._dims = _dims(model)
        self._producer = {value: node for node in model.graph.node for value in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for value in node.input:
                self._consumers[value].append(node)

    def site(self, node: onnx.NodeProto) -> _Site | None:
        """Norm that a node computes; None if it is no norm that can be replaced."""
        known = all(name in self.constants for name in node.input[1:3])
        if node.op_type != "InstanceNormalization" or not known:
            return None
        if len(self._dims.get(node.input[0], ())) == 2 + _SPATIAL:
            return _Site(node, node.input[0], node.output[0])
        return self._group(node)

    def _group(self, node: onnx.NodeProto) -> _Site | None:
        """Group norm, of the three nodes that PyTorch writes."""
        before, after = self._producer.get(node.input[0]), self._consumers[node.output[0]]
        if before is None or before.op_type != "Reshape":
            return None
        if len(after) != 1 or after[0].op_type != "Reshape":
            return None
        image, shape = before.input[0], after[0].input[1]
        dims, split = self._dims.get(image, ()), self.constants.get(before.input[1])
        groups = len(self.constants[node.input[1]])
        if split is None or split.tolist() != [0, groups, -1]:
            return None
        if len(dims) != 2 + _SPATIAL or not self._is_shape_of(shape, image):
            return None
        channels = dims[1]
        if not isinstance(channels, int) or channels % groups:
            return None
        return _Site(node, image, after[0].output[0], channels, groups, shape)

    def _is_shape_of(self, shape: str, image: str) -> bool:
        """Whether a tensor holds the shape of another."""
        if shape in self.constants:
            return bool(self.constants[shape].tolist() == list(self._dims[image]))
        node = self._producer.get(shape)
        if node is None or node.op_type != "Shape" or node.input[0] != image:
            return False
        return not any(a.name == "end" or (a.name == "start" and a.i) for a in node.attribute)


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    found = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {name: numpy_helper.to_array(tensor) for name, tensor in found.items()}


def _dims(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Size of each dimension of every tensor whose rank is known; a name or nothing if unknown."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    shaped = (v for v in values if v.type.tensor_type.HasField("shape"))
    return {
        value.name: tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
        for value in shaped
    }


class _Norm:
    """Nodes that compute one norm."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        constants: dict[str, np.ndarray],
        site: _Site,
        prefix: str,
    ) -> None:
        self._graph, self._constants, self._site, self._prefix = graph, constants, site, prefix
        self._nodes: list[onnx.NodeProto] = []

    def nodes(self) -> list[onnx.NodeProto]:
        norm, image = self._site.norm, self._site.image
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        centred = self._add("Sub", [image, self._mean(image, "mean")], "centred")
        variance = self._mean(self._add("Mul", [centred, centred], "square"), "variance")
        raised = self._add("Add", [variance, self._constant("epsilon", epsilon)], "raised")
        std = self._add("Sqrt", [raised], "std")
        factor = self._add("Div", [self._per_channel("scale", norm.input[1]), std], "factor")
        scaled = self._add("Mul", [centred, factor], "scaled")
        shift = self._per_channel("bias", norm.input[2])
        self._nodes.append(
            helper.make_node("Add", [scaled, shift], [self._site.output], f"{self._prefix}_out")
        )
        return self._nodes

    def _mean(self, value: str, name: str) -> str:
        """Mean over space, one axis after the other."""
        for axis in reversed(range(2, 2 + _SPATIAL)):
            axes = self._constant(f"axis_{axis}", np.array([axis]))
            value = self._add("ReduceMean", [value, axes], f"{name}_{axis}")
            if axis > 2:  # without it, OpenVINO joins the means to the operator that is inaccurate
                low, high = self._constant("low", -_BOUND), self._constant("high", _BOUND)
                value = self._add("Clip", [value, low, high], f"{name}_{axis}_kept")
        return self._mean_of_group(value, name) if self._site.groups else value

    def _mean_of_group(self, value: str, name: str) -> str:
        """Mean of the channels of each group, `(N, C, 1, 1, 1)`, of that of each channel."""
        channels, groups = self._site.channels, self._site.groups
        split = self._constant("split", np.array([0, groups, channels // groups]))
        axis = self._constant("axis_2", np.array([2]))
        each = self._constant("each", np.array([1, 1, channels // groups]))
        whole = self._constant("whole", np.array([0, channels, *(1,) * _SPATIAL]))
        value = self._add("Reshape", [value, split], f"{name}_split")
        value = self._add("ReduceMean", [value, axis], f"{name}_group")
        value = self._add("Expand", [value, each], f"{name}_each")
        return self._add("Reshape", [value, whole], f"{name}_whole")

    def _add(self, operator: str, inputs: list[str], name: str) -> str:
        output = f"{self._prefix}_{name}"
        node = helper.make_node(operator, inputs, [output], output)
        self._nodes.append(node)
        return output

    def _per_channel(self, name: str, source: str) -> str:
        values = self._constants[source]
        if self._site.groups:
            values = np.repeat(values, self._site.channels // self._site.groups)
        return self._constant(name, values.reshape(1, -1, *(1,) * _SPATIAL))

    def _constant(self, name: str, value: float | np.ndarray) -> str:
        full = f"{self._prefix}_{name}"
        if full not in self._existing():
            array = np.asarray(value, np.float32) if isinstance(value, float) else value
            self._graph.initializer.append(numpy_helper.from_array(array, full))
        return full

    def _existing(self) -> Iterator[str]:
        return (initializer.name for initializer in self._graph.initializer)
