"""Conversion of graphs to fp16, with range audit and simulation on the processor.

Half precision overflows above 65504 and loses digits below 6.1e-5 (IEEE 754-2008, binary16). The
conversion is onnxconverter-common's. A processor has no fp16 convolutions, so `simulate_fp16`
returns a graph that computes each node in fp32 and rounds its outputs to fp16, like tensor cores,
which multiply in fp16 and accumulate in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from attnseg.export.graphs.graph import Graph
from attnseg.runtime.engines.base import reason_of
from attnseg.runtime.errors import ExportError, Setting

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
HEADROOM = 4  # other scans may have larger activations than those audited


@dataclass(frozen=True)
class TensorRange:
    """Magnitudes of one tensor over all audited windows.

    Attributes:
        name: Name of the tensor.
        operator: Type of the node that computes it.
        largest: Largest magnitude.
        overflow_share: Share of the values above 65504, or NaN.
        subnormal_share: Share of the nonzero values below 6.1e-5, which lose digits in fp16.
    """

    name: str
    operator: str
    largest: float
    overflow_share: float
    subnormal_share: float

    @property
    def at_risk(self) -> bool:
        """Whether its values may overflow in fp16."""
        return not self.largest * HEADROOM <= LARGEST


def open_session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """Open an ONNX Runtime session on the processor, without graph optimisations.

    Raises:
        ExportError: ONNX Runtime rejects the graph.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    content = model.SerializeToString()
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no other common base class
        raise ExportError(
            f"ONNX Runtime cannot run a form of the graph ({reason_of(error)})"
        ) from error


def with_all_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that outputs every tensor its nodes compute, in node order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for node in copy.graph.node:
        copy.graph.output.extend(helper.make_empty_tensor_value_info(o) for o in node.output if o)
    return copy


def _magnitudes(
    operators: dict[str, str], session: ort.InferenceSession, window: NDArray[np.float32]
) -> Iterator[TensorRange]:
    try:
        values = session.run(None, {session.get_inputs()[0].name: window})
    except Exception as error:  # its exceptions have no other common base class
        raise ExportError(f"the ranges cannot be measured ({reason_of(error)})") from error
    for (name, operator), value in zip(operators.items(), values, strict=True):
        magnitude = np.abs(value)
        other = int(np.count_nonzero(magnitude))
        subnormal = other - int(np.count_nonzero(magnitude >= SMALLEST_NORMAL))
        yield TensorRange(
            name,
            operator,
            float(magnitude.max(initial=0)),
            float(np.count_nonzero(~(magnitude <= LARGEST)) / max(magnitude.size, 1)),
            subnormal / max(other, 1),
        )


def audit_ranges(
    graph: Graph, windows: Iterable[NDArray[np.float32]], threads: int
) -> list[TensorRange]:
    """Measure the magnitudes of every tensor of an fp32 graph.

    Args:
        graph: The fp32 graph.
        windows: Normalised inputs `(B, C, X, Y, Z)`, float32.
        threads: Number of processor threads.

    Returns:
        One entry per tensor that a node computes, in node order; each value is the largest over
        the windows.

    Raises:
        ExportError: ONNX Runtime cannot run the graph.
    """
    model = with_all_tensors(graph.model)
    operators = {o: node.op_type for node in model.graph.node for o in node.output if o}
    session = open_session(model, threads)
    found: dict[str, TensorRange] = {}
    for window in windows:
        for new in _magnitudes(operators, session, window):
            old = found.get(new.name, new)
            found[new.name] = TensorRange(
                new.name,
                new.operator,
                float(np.maximum(old.largest, new.largest)),
                max(old.overflow_share, new.overflow_share),
                max(old.subnormal_share, new.subnormal_share),
            )
    return list(found.values())


def nodes_at_risk(graph: Graph, ranges: Iterable[TensorRange]) -> list[str]:
    """Names of the nodes that stay in fp32: an input, output or weight may overflow in fp16."""
    model = graph.model
    risky = {r.name for r in ranges if r.at_risk}
    for initializer in model.graph.initializer:
        if initializer.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(initializer)
            if values.size and not np.abs(values).max() <= LARGEST:
                risky.add(initializer.name)
    return [n.name for n in model.graph.node if risky & {*n.input, *n.output}]


def check_fp32(graph: Graph) -> None:
    """Refuse a graph in which a tensor is fp16 or bf16 already.

    Raises:
        ExportError: The graph holds such a tensor.
    """
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    found = [name for name, kind in graph.types.items() if kind in half]
    if found:
        raise ExportError(
            f"{len(found)} tensors of the graph are fp16 or bf16 already, such as {found[0]}",
            "give the fp32 model, or leave {} out",
            Setting("fp16"),
        )


def convert_to_fp16(graph: Graph, in_fp32: Iterable[str] = (), io: str = "fp16") -> Graph:
    """Convert a graph to fp16, reproducibly byte for byte.

    Args:
        graph: The fp32 graph; every node has a name.
        in_fp32: Names of nodes that stay in fp32.
        io: Data type of input and output, `fp16` or `fp32`.

    Raises:
        ExportError: The graph cannot be converted, or the result is not valid ONNX.
    """
    from onnxconverter_common import float16

    try:
        with warnings.catch_warnings():
            # It warns about weights below fp16's smallest value; they become that value or stay 0.
            warnings.simplefilter("ignore")
            model = float16.convert_float_to_float16(
                graph.copy(),
                min_positive_val=SMALLEST,
                max_finite_val=LARGEST,
                keep_io_types=io == "fp32",
                node_block_list=list(in_fp32),
            )
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # those of the converter and of onnx have no common base class
        raise ExportError(
            f"the graph cannot be converted to fp16 ({reason_of(error)})",
            "leave {} out",
            Setting("fp16"),
        ) from error
    return Graph(model)


def convolutions_in_fp32(graph: Graph) -> list[str]:
    """Names of the convolutions of a graph with an fp32 input, weight or output."""
    types = graph.types
    return [
        node.name
        for node in graph.model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
        and TensorProto.FLOAT in {types.get(name) for name in (*node.input, *node.output) if name}
    ]


def check_convolutions(graph: Graph, in_fp32: Iterable[str]) -> None:
    """Reject an fp16 graph with fp32 convolutions other than `in_fp32`.

    Raises:
        ExportError: The graph has other fp32 convolutions.
    """
    left = sorted(set(convolutions_in_fp32(graph)) - set(in_fp32))
    if left:
        raise ExportError(
            f"the fp16 graph holds {len(left)} convolutions in fp32 ({', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''})",
            "convert it again from the checkpoint",
        )


def _rounded(name: str, source: str) -> list[onnx.NodeProto]:
    """Nodes that round `source` to fp16 and store it as `name`, in fp32."""
    rounded = f"{name}__fp16"
    return [
        helper.make_node("Cast", [source], [rounded], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT),
    ]


def simulate_fp16(half: Graph) -> onnx.ModelProto:
    """Return a graph that simulates the fp16 graph `half` in fp32 by rounding every tensor.

    Its input and output are fp32. Tensors that are fp32 in `half` are not rounded.
    """
    types, model = half.types, half.copy()
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    for value in graph.input:
        if types[value.name] == TensorProto.FLOAT16:
            inner = f"{value.name}__rounded"
            nodes += _rounded(inner, value.name)
            for node in graph.node:
                node.input[:] = [inner if name == value.name else name for name in node.input]
    for node in graph.node:
        halves = [o for o in node.output if types.get(o) == TensorProto.FLOAT16]
        for attribute in node.attribute:
            if attribute.t.data_type == TensorProto.FLOAT16:
                array = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(array))
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", TensorProto.FLOAT16):
                attribute.i = TensorProto.FLOAT
        node.output[:] = [f"{o}__exact" if o in halves else o for o in node.output]
        nodes.append(node)
        for name in halves:
            nodes += _rounded(name, f"{name}__exact")
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model
