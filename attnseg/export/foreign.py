"""A model that was trained elsewhere: its ONNX file, and what the file does not say, in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

import onnx
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attnseg.runtime.bundle import Inference, Label, Millimetres, Share, Size
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.grid import Grid
from attnseg.runtime.normalise import Normalisation
from attnseg.runtime.scans import Channel


class SpecInference(BaseModel):
    """Defaults of the sliding window and the clean-up, fields as in the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: tuple[Size, Size, Size]
    overlap: Share = 0.25
    window_multiple: Size = 1
    min_voxels: Annotated[int, Field(ge=0)] = 0

    def complete(self) -> Inference:
        """As the manifest has it."""
        return Inference(**self.model_dump())


class Spec(BaseModel):
    """What the runtime has to know of a model; the fields are those of the manifest.

    Only `name`, `channels`, `labels` and `inference.window` must be given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    intended_use: str = "research use only, not for clinical use"
    channels: Annotated[tuple[Channel, ...], Field(min_length=1)]
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    regions: dict[str, tuple[int, ...]] = {}
    display: tuple[str, ...] = ()
    orientation: str = "RAS"
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] = (1.0, 1.0, 1.0)
    grid: Grid | None = None
    normalisation: Normalisation = Normalisation(foreground="nonzero")
    inference: SpecInference

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """Each label is a region, and the first channel is shown, unless the file says more."""
        if not isinstance(value, dict):
            return value
        try:
            regions = {label["name"]: [label["value"]] for label in value["labels"][1:]}
            display = [value["channels"][0]["name"]]
        except (KeyError, IndexError, TypeError):
            return value  # the fields' own rules say what is wrong
        return {"regions": regions, "display": display, **value}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.display or not self.regions:
            raise ValueError("regions and display must not be empty")
        return self


def read_spec(path: Path) -> Spec:
    """Read what goes with an ONNX file.

    Raises:
        ConfigError: the file is missing, no JSON, or breaks a rule; names the field.
    """
    try:
        return Spec.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "spec"
        raise ConfigError(f"{path}: {where}: {first['msg']}; see docs/export.md") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from error


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: does not exist; give an ONNX file") from error
    except Exception as error:  # protobuf's and onnx's share no base but Exception
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path}: is damaged or not valid ONNX ({reason})") from error
    return model


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """Sizes of a tensor, None where they are dynamic."""
    return [d.dim_value or None for d in value.type.tensor_type.shape.dim]


def _check_end(path: Path, value: onnx.ValueInfoProto, count: int, what: str) -> None:
    dims, kind = _dims(value), value.type.tensor_type.elem_type
    if len(dims) != 5:
        space = f"a {len(dims) - 2}-D model" if len(dims) in (3, 4) else "no model of images"
        raise ExportError(
            f"{path}: is {space} ({value.name} has {len(dims)} dimensions); attnseg runs 3-D "
            "models, whose tensors are (batch, channels, x, y, z)"
        )
    if kind != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind).lower()
        raise ExportError(f"{path}: {value.name} is {name}; give the fp32 model")
    if dims[1] not in (None, count):
        raise ExportError(
            f"{path}: {value.name} has {dims[1]} channels, the spec names {count} {what}"
        )


def _check_window(path: Path, value: onnx.ValueInfoProto, spec: Spec) -> None:
    dims, window = _dims(value), spec.inference.window
    fixed = [(d, w) for d, w in zip(dims[2:], window, strict=True) if d not in (None, w)]
    if fixed:
        takes = "x".join(str(d) if d else "any" for d in dims[2:])
        raise ExportError(
            f"{path}: takes {takes} voxels, the spec's window is {'x'.join(map(str, window))}; "
            "set inference.window to what it takes"
        )
    if dims[0] not in (None, 1):
        raise ExportError(f"{path}: takes {dims[0]} windows at a time; give a model for 1 or any")


def read_foreign(path: Path, spec: Spec) -> bytes:
    """An ONNX file that fits its spec, with a name for every node.

    Raises:
        ExportError: the file is missing or damaged, has not one input and one output, is not 3-D
            or not fp32, or its channels or window are not those of the spec.
    """
    model = _load(path)
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(
            f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; attnseg runs models of "
            "one image and its logits"
        )
    _check_end(path, inputs[0], len(spec.channels), "channels")
    _check_end(path, outputs[0], len(spec.labels), "labels")
    _check_window(path, inputs[0], spec)
    inputs[0].type.tensor_type.shape.dim[1].dim_value = len(spec.channels)
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:  # nodes are spoken of by name
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
    return bytes(model.SerializeToString(deterministic=True))
