"""Check of an ONNX graph against the manifest of its bundle, without the package onnx.

An ONNX tensor may name another file as the place of its values. Inference engines read such a file
from the folder of the graph, or from the current folder if they are given the graph's bytes, and
no checksum of the bundle covers it. A graph of a bundle therefore holds all of its values.

The numbers of the fields are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from attnseg.runtime.errors import BundleError
from attnseg.runtime.model.protobuf import read_fields, read_messages
from attnseg.runtime.task import Task

TENSORS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
"""Fields of each message that lead to tensors."""

_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor
_MOST_FIELDS = 1_000_000  # a graph of 1,000 nodes has about 20,000
_GRAPH, _INPUT, _OUTPUT, _INITIALIZER = 7, 11, 12, 5
_TENSOR_NAME, _VALUE_NAME = 8, 1
_TENSOR_TYPE, _ELEMENT_TYPE, _DIMENSION, _SIZE = (2, 1), 1, (2, 1), 1
_FLOATS = (1, 10)  # float32 and float16
_LAYOUT = "(batch, {}, x, y, z)"


@dataclass(frozen=True)
class _End:
    """An input or output: its name, element type and sizes, None for dynamic ones."""

    name: bytes
    element_type: int
    sizes: tuple[int | None, ...]


def check_graph(file: Path, content: bytes, task: Task) -> None:
    """Check that a file is an ONNX graph of a task that refers to no other file.

    Args:
        file: The file, for the texts of errors.
        content: Its content.
        task: Task of the network.

    Raises:
        BundleError: The content is damaged or not ONNX, tensors are stored in other files, or the
            graph does not have one image `(B, C, X, Y, Z)` as input and one tensor of logits
            `(B, K, X, Y, Z)` as output.
    """
    try:
        model = memoryview(content)
        if any(_is_external(tensor) for tensor in _tensors(model)):
            raise BundleError(
                f"{file}: stores values in other files, which the bundle's checksums do not cover",
                "export the model again",
            )
        constants = {
            bytes(name) for name in read_messages(model, _GRAPH, _INITIALIZER, _TENSOR_NAME)
        }
        inputs = [end for end in _ends(model, _INPUT) if end.name not in constants]
        outputs = list(_ends(model, _OUTPUT))
    except ValueError as error:
        raise BundleError(
            f"{file}: is damaged or not an ONNX file ({error})", "export the model again"
        ) from error
    _check_end(file, "input", inputs, len(task.channels), "channels")
    _check_end(file, "output", outputs, task.output_channels, "outputs")


def _tensors(model: memoryview) -> Iterator[memoryview]:
    """All tensors of a model, also those of subgraphs and functions."""
    left, count = [("ModelProto", model)], 0
    while left:
        kind, message = left.pop()
        if kind == "TensorProto":
            yield message
        for number, value in read_fields(message):
            count += 1
            if count > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            if number in TENSORS[kind] and isinstance(value, memoryview):
                left.append((TENSORS[kind][number], value))


def _is_external(tensor: memoryview) -> bool:
    return any(
        number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)
        for number, value in read_fields(tensor)
    )


def _ends(model: memoryview, number: int) -> Iterator[_End]:
    for end in read_messages(model, _GRAPH, number):
        name = b"".join(read_messages(end, _VALUE_NAME))
        element_type, sizes = 0, []
        for tensor in read_messages(end, *_TENSOR_TYPE):
            element_type = _integer(tensor, _ELEMENT_TYPE)
            sizes += [_integer(d, _SIZE) or None for d in read_messages(tensor, *_DIMENSION)]
        yield _End(name, element_type, tuple(sizes))


def _integer(message: memoryview, number: int) -> int:
    """Last value of an integer field; 0 if it is missing."""
    found = [v for n, v in read_fields(message) if n == number and isinstance(v, int)]
    return found[-1] if found else 0


def _check_end(file: Path, what: str, ends: list[_End], count: int, counted: str) -> None:
    layout = _LAYOUT.format(counted)
    if len(ends) != 1:
        raise BundleError(
            f"{file}: has {len(ends)} {what}s, a network has one", "export the model again"
        )
    (end,) = ends
    if end.element_type not in _FLOATS or len(end.sizes) != 5:
        raise BundleError(
            f"{file}: its {what} is no tensor {layout} of float32 or float16",
            "export the model again",
        )
    if end.sizes[1] not in (None, count):
        raise BundleError(
            f"{file}: its {what} has {end.sizes[1]} {counted}, its manifest names {count}",
            "export the model again",
        )
