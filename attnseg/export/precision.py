"""FP16: which nodes can bear it, the converted graph, and how it computes on a GPU.

Half precision ends at 65504 and loses digits below 6.1e-5 (IEEE 754-2008, binary16). The
conversion is onnxconverter-common's. A processor has no fp16 convolutions, so `simulate_fp16`
makes a graph that computes each node in fp32 and rounds what it gives to fp16: what tensor
cores do, which multiply in fp16 and add up in fp32.
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
from onnxconverter_common import float16

from attnseg.runtime.errors import ExportError

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
HEADROOM = 4  # other scans may have larger activations than those audited


@dataclass(frozen=True)
class TensorRange:
    """Magnitudes of one tensor over all audited windows.

    Attributes:
        name: of the tensor.
        operator: of the node that gives it.
        largest: magnitude.
        overflow_share: of its values, above 65504.
        subnormal_share: of its values other than 0, below 6.1e-5: they lose digits in fp16.
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
    """ONNX Runtime on the processor, running the graph as it stands, without rewriting it.

    Raises:
        ExportError: it refuses the graph.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    content = model.SerializeToString()
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but Exception
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"ONNX Runtime cannot run a form of the graph ({reason})") from error


def with_all_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose outputs are all tensors that its nodes give, in their order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for node in copy.graph.node:
        copy.graph.output.extend(helper.make_empty_tensor_value_info(o) for o in node.output if o)
    return copy


def _magnitudes(
    operators: dict[str, str], session: ort.InferenceSession, window: NDArray[np.float32]
) -> Iterator[TensorRange]:
    values = session.run(None, {session.get_inputs()[0].name: window})
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
    content: bytes, windows: Iterable[NDArray[np.float32]], threads: int
) -> list[TensorRange]:
    """Magnitudes of every tensor of an fp32 graph, over windows of real activations.

    Args:
        content: the graph.
        windows: `(B, C, X, Y, Z)` each, normalised.
        threads: of the processor.

    Returns:
        One entry for each tensor that a node gives, in the order of the nodes; maxima over the
        windows, shares of the window where they are largest.
    """
    model = with_all_tensors(onnx.load_from_string(content))
    operators = {o: node.op_type for node in model.graph.node for o in node.output if o}
    session = open_session(model, threads)
    found: dict[str, TensorRange] = {}
    for window in windows:
        for new in _magnitudes(operators, session, window):
            old = found.get(new.name, new)
            found[new.name] = TensorRange(
                new.name,
                new.operator,
                float(np.fmax(old.largest, new.largest)),
                max(old.overflow_share, new.overflow_share),
                max(old.subnormal_share, new.subnormal_share),
            )
    return list(found.values())


def nodes_at_risk(content: bytes, ranges: Iterable[TensorRange]) -> list[str]:
    """Names of the nodes that must stay in fp32: what they take, give or hold may overflow."""
    model = onnx.load_from_string(content)
    risky = {r.name for r in ranges if r.at_risk}
    for initializer in model.graph.initializer:
        if initializer.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(initializer)
            if values.size and not np.abs(values).max() <= LARGEST:
                risky.add(initializer.name)
    return [n.name for n in model.graph.node if risky & {*n.input, *n.output}]


def convert_to_fp16(content: bytes, in_fp32: Iterable[str] = (), io: str = "fp16") -> bytes:
    """The graph in fp16, the same bytes each time.

    Args:
        content: the fp32 graph; all its nodes have names.
        in_fp32: names of nodes that stay in fp32.
        io: type of input and output, `fp16` or `fp32`.

    Raises:
        ExportError: the converted graph breaks the rules of ONNX.
    """
    with warnings.catch_warnings():
        # It warns of each weight below fp16's smallest; those become that value, or stay 0.
        warnings.simplefilter("ignore")
        model = float16.convert_float_to_float16(
            onnx.load_from_string(content),
            min_positive_val=SMALLEST,
            max_finite_val=LARGEST,
            keep_io_types=io == "fp32",
            node_block_list=list(in_fp32),
        )
    del model.graph.value_info[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the fp16 graph is not valid ONNX ({error})") from error
    return bytes(model.SerializeToString(deterministic=True))


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor in the graph."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {i.name: i.data_type for i in graph.initializer}


def convolutions_in_fp32(content: bytes) -> list[str]:
    """Names of the convolutions of a graph that take or give fp32."""
    model = onnx.load_from_string(content)
    types = _types(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
        and TensorProto.FLOAT in {types[name] for name in (*node.input, *node.output) if name}
    ]


def check_convolutions(content: bytes, in_fp32: Iterable[str]) -> None:
    """Refuse an fp16 graph that holds fp32 convolutions other than those left so on purpose.

    Raises:
        ExportError: it does.
    """
    left = sorted(set(convolutions_in_fp32(content)) - set(in_fp32))
    if left:
        raise ExportError(
            f"the fp16 graph holds {len(left)} convolutions in fp32 ({', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}); convert it again from the checkpoint"
        )


def _rounded(name: str, source: str) -> list[onnx.NodeProto]:
    """`name` is `source` rounded to fp16, in fp32."""
    half = f"{name}__fp16"
    return [
        helper.make_node("Cast", [source], [half], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT),
    ]


def simulate_fp16(content: bytes) -> onnx.ModelProto:
    """A graph that computes in fp32 what `content` computes in fp16, rounding every tensor.

    Its input and output are fp32. Tensors that are fp32 in `content` are left alone.
    """
    model = onnx.load_from_string(content)
    types = _types(model)
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
