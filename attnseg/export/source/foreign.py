"""ONNX models of other trainers, described by a JSON spec."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from attnseg.export.graphs.graph import Graph
from attnseg.export.graphs.norms import spell_out_norms
from attnseg.export.source.ending import LOGITS, refuse_training_mode, use_logits
from attnseg.export.source.onnx_file import load_onnx
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.files import read_file
from attnseg.runtime.model.manifest import ModelRecord
from attnseg.runtime.model.manifest_format import decode_spec


def read_spec(path: Path) -> ModelRecord:
    """Read the spec of an ONNX file: JSON with the fields of the manifest (docs/export.md).

    Raises:
        ConfigError: The file is missing, not JSON, or invalid; the message names the field.
    """
    try:
        return decode_spec(read_file(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.cause}", "see docs/export.md") from error


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """Sizes of a tensor; None for dynamic dimensions."""
    return [d.dim_value or None for d in value.type.tensor_type.shape.dim]


_LAYOUT = "(batch, channels, x, y, z)"


def _check_end(path: Path, value: onnx.ValueInfoProto, count: int, what: str) -> None:
    dims, kind = _dims(value), value.type.tensor_type.elem_type
    if len(dims) != 5:
        space = f"a {len(dims) - 2}-D model" if len(dims) in (3, 4) else "no model of images"
        raise ExportError(
            f"{path}: is {space} ({value.name} has {len(dims)} dimensions)",
            f"attnseg runs 3-D models, whose tensors are {_LAYOUT}",
        )
    if kind != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind).lower()
        whole = "float" not in name and what == "labels"
        raise ExportError(
            f"{path}: {value.name} is {name}", LOGITS if whole else "give the fp32 model"
        )
    if dims[1] != count and dims[4] == count:
        raise ExportError(
            f"{path}: {value.name} has its channels last", f"transpose it in the graph to {_LAYOUT}"
        )
    if dims[1] not in (None, count):
        raise ExportError(
            f"{path}: {value.name} has {dims[1]} channels, the spec names {count} {what}",
            f"list its {dims[1]} {what} in the spec",
        )


def _check_window(path: Path, value: onnx.ValueInfoProto, spec: ModelRecord) -> None:
    dims, window = _dims(value), spec.inference.window
    fixed = [(d, w) for d, w in zip(dims[2:], window, strict=True) if d not in (None, w)]
    if fixed:
        takes = "x".join(str(d) if d else "any" for d in dims[2:])
        raise ExportError(
            f"{path}: takes {takes} voxels, the spec's window is {'x'.join(map(str, window))}",
            "set inference.window to what it takes",
        )
    if dims[0] not in (None, 1):
        raise ExportError(f"{path}: takes {dims[0]} windows at a time", "give a model for 1 or any")


def read_foreign(path: Path, spec: ModelRecord) -> tuple[Graph, tuple[str, ...]]:
    """Read an ONNX file, check it against its spec, and name every unnamed node.

    Returns:
        The graph, whose output are logits, and sentences on what was changed to that end.

    Raises:
        ExportError: The file is damaged, see `load_onnx`; it does not have exactly one input and
            one output, is not 3-D or not fp32, its channels or window differ from the spec, it is
            in training mode, or it does not end in logits or their softmax.
    """
    return foreign_graph(path, load_onnx(path), spec)


def foreign_graph(
    path: Path, model: onnx.ModelProto, spec: ModelRecord
) -> tuple[Graph, tuple[str, ...]]:
    """Check a model that was read; see `read_foreign`. The model is modified."""
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        names = [[value.name for value in values] for values in (inputs, outputs)]
        raise ExportError(
            f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs "
            f"({'; '.join(', '.join(own) for own in names)})",
            "attnseg runs models of one image and its logits; export without deep supervision"
            if len(outputs) > 1
            else "attnseg runs models of one image and its logits",
        )
    refuse_training_mode(path, model)
    _check_end(path, inputs[0], len(spec.task.channels), "channels")
    notes = use_logits(path, model, spec.task.activation)
    _check_end(path, outputs[0], spec.task.output_channels, "labels")
    _check_window(path, inputs[0], spec)
    inputs[0].type.tensor_type.shape.dim[1].dim_value = len(spec.task.channels)
    _name_nodes(model)
    spell_out_norms(model)
    return Graph(model), notes


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, by which later steps identify it."""
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        seen.add(node.name)
