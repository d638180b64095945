"""An ONNX graph in memory, parsed and serialised once."""

from __future__ import annotations

from functools import cached_property

import onnx

from attnseg.runtime.engines.base import ModelFile, reason_of
from attnseg.runtime.errors import ExportError


class Graph:
    """An immutable ONNX graph: `model` must not be modified; `copy` returns a modifiable model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Wrap a parsed model."""
        self.model = model

    @classmethod
    def of(cls, content: bytes) -> Graph:
        """Parse the bytes of a file; `content` holds the same bytes."""
        graph = cls(onnx.load_from_string(content))
        graph.__dict__["content"] = content
        return graph

    @classmethod
    def read(cls, file: ModelFile) -> Graph:
        """Read a file."""
        return cls.of(file.read_bytes())

    @cached_property
    def content(self) -> bytes:
        """Serialised graph, deterministic."""
        return bytes(self.model.SerializeToString(deterministic=True))

    def copy(self) -> onnx.ModelProto:
        """A copy of the model."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        return copy

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type (`onnx.TensorProto.DataType`) of every tensor, by name.

        Raises:
            ExportError: A node contradicts the types or shapes of its inputs.
        """
        try:
            graph = onnx.shape_inference.infer_shapes(self.model, strict_mode=True).graph
        except onnx.shape_inference.InferenceError as error:
            raise ExportError(f"the graph contradicts itself ({reason_of(error)})") from error
        values = (*graph.input, *graph.output, *graph.value_info)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        return types | {i.name: i.data_type for i in graph.initializer}
