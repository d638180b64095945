"""ONNX models of other trainers, described by a JSON spec."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from attnseg.export.graphs.graph import Graph
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.model.manifest import ModelRecord
from attnseg.runtime.model.manifest_format import decode_spec


def read_spec(path: Path) -> ModelRecord:
    """Read the spec of an ONNX file: JSON with the fields of the manifest (docs/export.md).

    Raises:
        ConfigError: The file is missing, not JSON, or invalid; the message names the field.
    """
    try:
        return decode_spec(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.cause}", "see docs/export.md") from error


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # those of protobuf and onnx have no other common base class
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path}: is damaged or not valid ONNX ({reason})") from error
    return model


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """Sizes of a tensor; None for dynamic dimensions."""
    return [d.dim_value or None for d in value.type.tensor_type.shape.dim]


def _check_end(path: Path, value: onnx.ValueInfoProto, count: int, what: str) -> None:
    dims, kind = _dims(value), value.type.tensor_type.elem_type
    if len(dims) != 5:
        space = f"a {len(dims) - 2}-D model" if len(dims) in (3, 4) else "no model of images"
        raise ExportError(
            f"{path}: is {space} ({value.name} has {len(dims)} dimensions)",
            "attnseg runs 3-D models, whose tensors are (batch, channels, x, y, z)",
        )
    if kind != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind).lower()
        raise ExportError(f"{path}: {value.name} is {name}", "give the fp32 model")
    if dims[1] not in (None, count):
        raise ExportError(
            f"{path}: {value.name} has {dims[1]} channels, the spec names {count} {what}"
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


def read_foreign(path: Path, spec: ModelRecord) -> Graph:
    """Read an ONNX file, check it against its spec, and name every unnamed node.

    Raises:
        ExportError: The file is missing or damaged, does not have exactly one input and one output,
            is not 3-D or not fp32, or its channels or window differ from the spec.
    """
    model = _load(path)
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(
            f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs",
            "attnseg runs models of one image and its logits",
        )
    _check_end(path, inputs[0], len(spec.task.channels), "channels")
    _check_end(path, outputs[0], len(spec.task.labels), "labels")
    _check_window(path, inputs[0], spec)
    inputs[0].type.tensor_type.shape.dim[1].dim_value = len(spec.task.channels)
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:  # later steps identify nodes by name
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
    return Graph(model)
