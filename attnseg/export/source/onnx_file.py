"""An ONNX file on disk, with the weights that it stores in other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from attnseg.runtime.engines.base import reason_of
from attnseg.runtime.errors import ExportError
from attnseg.runtime.files import is_file

LARGEST_BYTES = 2**31 - 1
"""Largest ONNX file: the limit of protobuf, which a bundle's `model.onnx` is bound by too."""

_INEXACT = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, and all weights that it stores in other files.

    Raises:
        ExportError: The file is empty, damaged, too new or not valid ONNX, a file of weights is
            missing or too short, the whole exceeds 2 GB, or a weight is not finite.
    """
    _check_bytes(path, path.stat().st_size)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # those of protobuf and onnx have no other common base class
        raise _invalid(path, error) from error
    _check_versions(path, model)
    _check_external(path, model)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        _complete_outputs(model)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise _invalid(path, error) from error
    _check_weights(path, model)
    return model


def _invalid(path: Path, error: Exception) -> ExportError:
    return ExportError(f"{path}: is damaged or not valid ONNX ({reason_of(error)})")


def _check_versions(path: Path, model: onnx.ModelProto) -> None:
    """Refuse a file of a version that the installed packages do not know."""
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    for what, version, known in (
        ("IR version", model.ir_version, onnx.IR_VERSION),
        ("opset", opset, onnx.defs.onnx_opset_version()),
    ):
        if version > known:
            raise ExportError(
                f"{path}: has ONNX {what} {version}, the installed onnx {onnx.__version__} knows "
                f"{known} at most",
                f"export it with {what} {known} or earlier",
            )


def _check_bytes(path: Path, count: int) -> None:
    if count == 0:
        raise ExportError(f"{path}: is empty", "copy or export it again")
    if count > LARGEST_BYTES:
        raise ExportError(
            f"{path}: holds {count / 1e9:.1f} GB with its weights, more than the 2 GB of an ONNX "
            "file, which a bundle's graph is",
            "give a smaller network",
        )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constant tensors of the main graph, with names."""
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensor = onnx.TensorProto()
                tensor.CopyFrom(attribute.t)
                tensor.name = node.output[0]
                yield tensor


def _check_external(path: Path, model: onnx.ModelProto) -> None:
    """Check the files of weights before they are read."""
    stored = [ExternalDataInfo(t) for t in _tensors(model) if uses_external_data(t)]
    for name in dict.fromkeys(info.location for info in stored):
        file = path.parent / name
        if not is_file(file):
            raise ExportError(
                f"{path}: stores its weights in {name}, which is not beside it",
                f"copy {name} to {path.parent}",
            )
        ends = [(i.offset or 0) + (i.length or 0) for i in stored if i.location == name]
        if file.stat().st_size < max(ends):
            raise ExportError(
                f"{file}: has {file.stat().st_size} bytes, {path.name} expects {max(ends)}",
                "copy or export both again",
            )
    _check_bytes(path, path.stat().st_size + sum(info.length or 0 for info in stored))


def _complete_outputs(model: onnx.ModelProto) -> None:
    """Give outputs without a shape the one that shape inference finds; ONNX requires a shape."""
    if all(value.type.tensor_type.HasField("shape") for value in model.graph.output):
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    for value, found in zip(model.graph.output, inferred, strict=True):
        value.CopyFrom(found)


def _check_weights(path: Path, model: onnx.ModelProto) -> None:
    """Refuse weights that are NaN, or infinite; a single infinite number may be a bound."""
    for tensor in _tensors(model):
        if tensor.data_type in _INEXACT:
            values = numpy_helper.to_array(tensor).astype(np.float32, copy=False)
            wrong = ~np.isfinite(values) if values.size > 1 else np.isnan(values)
            if wrong.any():
                raise ExportError(
                    f"{path}: {np.count_nonzero(wrong)} of the {values.size} values of "
                    f"{tensor.name} are NaN or infinite",
                    "export an earlier state of the training",
                )
