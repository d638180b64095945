"""JSON format of `manifest.json` (versions 1 to 3) and spec files, validated with pydantic.

The fields are specified in `docs/bundle.md`. All versions are decoded to the records of `manifest`.
Imported only where a file is read, because importing pydantic takes longer than the rest of the
runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.model.manifest import (
    Budget,
    FileEntry,
    Inference,
    Manifest,
    ModelRecord,
    Training,
    Validation,
)
from attnseg.runtime.model.schemes_format import (
    JsonRecord,
    NormalisationJson,
    SchemeJson,
    encode_scheme,
)
from attnseg.runtime.steps.foreground import Crop
from attnseg.runtime.steps.preprocess import Preprocessing, PreprocessingStep
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.task import Activation, Channel, Label, Output, Task
from attnseg.runtime.user_json import parse_json

FORMAT_VERSION: Literal[3] = 3


class _CommonJson(JsonRecord):
    """Fields that all versions share."""

    name: str
    description: str
    intended_use: str
    channels: tuple[Channel, ...]
    labels: tuple[Label, ...]
    regions: dict[str, tuple[int, ...]]
    display: tuple[str, ...]


class _OldGridJson(JsonRecord):
    """Grid of versions 1 and 2."""

    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None


class _OldInferenceJson(JsonRecord):
    """Inference options of versions 1 and 2."""

    window: tuple[int, int, int]
    overlap: float
    window_multiple: int
    min_voxels: int


class _OldModelJson(_CommonJson):
    """Model of versions 1 and 2."""

    orientation: str
    spacing_mm: tuple[float, float, float]
    grid: _OldGridJson | None
    normalisation: NormalisationJson
    inference: _OldInferenceJson
    foreground_ml: float | None = None

    def record(self) -> dict[str, Any]:
        """Constructor arguments of a `ModelRecord`."""
        schemes = self.normalisation.schemes(len(self.channels))
        crop = self.normalisation.foreground
        grid = None if self.grid is None else Grid(self.grid.shape, self.grid.spacing_mm)
        return {
            "name": self.name,
            "description": self.description,
            "intended_use": self.intended_use,
            "task": Task(self.channels, self.labels, self.regions, self.display),
            "spacing_mm": self.spacing_mm,
            "preprocessing": Preprocessing(self.orientation, grid, crop, schemes),
            "inference": Inference(**self.inference.model_dump()),
            "foreground_ml": self.foreground_ml,
        }


_AXES = "xyz"


class ModelJson(_CommonJson):
    """Model of version 3, and of specs."""

    activation: Activation
    outputs: tuple[Output, ...]
    orientation: str | None
    axes: str
    spacing_mm: tuple[float, float, float] | None
    order: tuple[PreprocessingStep, ...]
    crop: Crop
    grid: Grid | None
    normalisation: tuple[SchemeJson, ...]
    inference: Inference
    foreground_ml: float | None = None

    def record(self) -> dict[str, Any]:
        """Constructor arguments of a `ModelRecord`.

        Raises:
            ConfigError: The axes are not x, y and z.
        """
        if sorted(self.axes) != sorted(_AXES):
            raise ConfigError(f"axes must name x, y and z once, got {self.axes}")
        x, y, z = (_AXES.index(axis) for axis in self.axes)
        return {
            "name": self.name,
            "description": self.description,
            "intended_use": self.intended_use,
            "task": Task(
                channels=self.channels,
                labels=self.labels,
                regions=self.regions,
                display=self.display,
                activation=self.activation,
                outputs=self.outputs,
            ),
            "spacing_mm": self.spacing_mm,
            "preprocessing": Preprocessing(
                orientation=self.orientation,
                grid=self.grid,
                crop=self.crop,
                normalisation=tuple(scheme.decode() for scheme in self.normalisation),
                order=self.order,
                axes=(x, y, z),
            ),
            "inference": self.inference,
            "foreground_ml": self.foreground_ml,
        }


class _FilesJson(JsonRecord):
    """Fields of manifests beside those of the model, in all versions."""

    format: Literal["attnseg-bundle"]
    created_with: str
    network: dict[str, Any]
    training: Training | None
    validation: Validation | None
    budget: Budget | None
    files: dict[str, FileEntry]

    def own(self) -> dict[str, Any]:
        """Constructor arguments of a `Manifest` that a `ModelRecord` does not have."""
        names = ("created_with", "network", "training", "validation", "budget", "files")
        return {name: getattr(self, name) for name in names}


class _OldManifestJson(_FilesJson, _OldModelJson):
    """`manifest.json`, version 2."""

    format_version: Literal[2]

    def manifest(self) -> Manifest:
        """Convert to a `Manifest`."""
        return Manifest(**self.record(), **self.own())


class ManifestJson(_FilesJson, ModelJson):
    """`manifest.json`, version 3."""

    format_version: Literal[3]

    def manifest(self) -> Manifest:
        """Convert to a `Manifest`."""
        return Manifest(**self.record(), **self.own())

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Convert from a `Manifest`."""
        given = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
        task, preprocessing = given.pop("task"), given.pop("preprocessing")
        return cls(
            format="attnseg-bundle",
            format_version=FORMAT_VERSION,
            channels=task.channels,
            labels=task.labels,
            regions=dict(task.regions),
            display=task.display,
            activation=task.activation,
            outputs=task.outputs,
            orientation=preprocessing.orientation,
            axes="".join(_AXES[axis] for axis in preprocessing.axes),
            order=preprocessing.order,
            crop=preprocessing.crop,
            grid=preprocessing.grid,
            normalisation=tuple(encode_scheme(s) for s in preprocessing.normalisation),
            **given,
        )


_FIRST = ("format", "format_version", "name", "created_with")  # the others in declaration order


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as `manifest.json`; the output is deterministic."""
    record = ManifestJson.of(manifest).model_dump(mode="json")
    ordered = {**{name: record[name] for name in _FIRST}, **record}
    return TypeAdapter(dict[str, Any]).dump_json(ordered, indent=2) + b"\n"


def decode_manifest(stored: bytes) -> Manifest:
    """Decode the bytes of a `manifest.json` of version 1, 2 or 3.

    Raises:
        ConfigError: The bytes violate the format; the message names the field and the rule.
    """
    record = parse_json(stored)
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(
        version, bool | float
    ):  # equal to a version, but not the number that is specified
        raise ConfigError(f"format_version: must be a whole number, got {version!r}")
    if isinstance(record, dict) and version not in range(1, FORMAT_VERSION + 1):
        raise _unknown(version) if "format_version" in record else _missing("format_version")
    try:
        if version in (1, 2):
            return _OldManifestJson.model_validate_json(_as_version_2(stored, record)).manifest()
        return ManifestJson.model_validate_json(stored).manifest()
    except ValidationError as error:
        raise _explain(error, "manifest") from error


def decode_spec(stored: bytes) -> ModelRecord:
    """Decode the bytes of a spec file, which uses the fields of the manifest.

    Only `name`, `channels`, `labels` and `inference.window` are required.

    Raises:
        ConfigError: The bytes are not JSON, or violate a rule; the message names the field.
    """
    record = parse_json(stored)
    try:
        found = ModelRecord(**ModelJson.model_validate(_complete_spec(record)).record())
    except ValidationError as error:
        raise _explain(error, "spec") from error
    if not found.task.regions:
        raise ConfigError("regions: must not be empty; the export compares precisions on them")
    return found


def _complete_spec(record: Any) -> Any:
    """Add the defaults to a spec: each label is a region, and pictures show the first channel."""
    if not isinstance(record, Mapping):
        return record
    defaults: dict[str, Any] = {
        "description": "",
        "intended_use": "research use only, not for clinical use",
        "activation": "softmax",
        "outputs": (),
        "orientation": "RAS",
        "axes": _AXES,
        "spacing_mm": (1.0, 1.0, 1.0),
        "order": ("resample", "crop", "normalise"),
        "crop": "nonzero",
        "grid": None,
        "normalisation": {"scheme": "zscore"},
        "foreground_ml": None,
    }
    try:
        defaults["regions"] = {label["name"]: [label["value"]] for label in record["labels"][1:]}
        defaults["display"] = [record["channels"][0]["name"]]
    except (KeyError, IndexError, TypeError):
        defaults |= {"regions": {}, "display": ()}  # reported by the validation of the fields
    completed: dict[str, Any] = {**defaults, **record}
    inference: dict[str, Any] = {"overlap": 0.25, "window_multiple": 1, "min_voxels": 0}
    if isinstance(completed.get("inference"), Mapping):
        completed["inference"] = {**inference, **completed["inference"]}
    return _for_every_channel(completed, record.get("crop"))


def _for_every_channel(record: dict[str, Any], crop: object) -> dict[str, Any]:
    """A spec whose normalisation is a list; one scheme stands for every channel.

    A normalisation with `foreground` and `landmarks` has the fields of version 2.
    """
    given, channels = record["normalisation"], record.get("channels")
    if not isinstance(given, Mapping) or not isinstance(channels, list):
        return record
    if "scheme" in given:
        return {**record, "normalisation": [given] * len(channels)}
    try:
        fields_of_2 = {"foreground": "nonzero", "landmarks": None, **given}
        old = NormalisationJson.model_validate(fields_of_2)
    except ValidationError as error:
        raise _explain(error, "normalisation", "normalisation.") from error
    if crop not in (None, old.foreground):
        raise ConfigError(
            f"crop: is {crop}, and normalisation.foreground {old.foreground}",
            "give the normalisation as a scheme",
        )
    schemes = [encode_scheme(scheme) for scheme in old.schemes(len(channels))]
    return {**record, "normalisation": schemes, "crop": old.foreground}


def _as_version_2(stored: bytes, record: Any) -> bytes:
    """Convert a manifest of version 1, in which all graphs are fp32, to version 2."""
    if not isinstance(record, dict) or record.get("format_version") != 1:
        return stored
    files = record.get("files")
    for entry in files.values() if isinstance(files, dict) else ():
        if isinstance(entry, dict):
            added = {"precision": "fp32" if entry.get("role") == "onnx" else None, "engine": None}
            entry.update({name: entry.get(name, value) for name, value in added.items()})
    return json.dumps({"grid": None, "budget": None, **record, "format_version": 2}).encode()


def _explain(error: ValidationError, whole: str, prefix: str = "") -> ConfigError:
    """Convert the first validation error to a `ConfigError` that names the field."""
    first = error.errors()[0]
    inner = ".".join(str(part) for part in first["loc"])
    where = f"{prefix}{inner}" if inner else whole
    rule = first.get("ctx", {}).get("error", first["msg"])
    return ConfigError(f"{where}: {rule}")


def _unknown(version: object) -> ConfigError:
    return ConfigError(
        f"format_version {version!r} is not known to this version of attnseg, which reads 1 to "
        f"{FORMAT_VERSION}",
        "install the version of attnseg that wrote the bundle",
    )


def _missing(field: str) -> ConfigError:
    return ConfigError(f"{field}: Field required")
