"""JSON format of `manifest.json` (versions 1 and 2) and spec files, validated with pydantic.

The fields are specified in `docs/bundle.md`. All versions are decoded to the records of `manifest`.
Imported only where a file is read, because importing pydantic takes longer than the rest of the
runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

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
from attnseg.runtime.steps.foreground import Foreground
from attnseg.runtime.steps.normalise import LandmarkMatching, Scheme, ZScore
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.task import Channel, Label, Task
from attnseg.runtime.user_json import parse_json

FORMAT_VERSION: Literal[2] = 2


class _Record(BaseModel):
    """Base class of JSON objects; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LandmarksJson(_Record):
    """Landmarks of all channels; `values[c][p]` is the z-score of channel c at percentile p."""

    percentiles: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


class NormalisationJson(_Record):
    """Normalisation of all channels; all fields are required."""

    foreground: Foreground
    landmarks: LandmarksJson | None

    def schemes(self, channels: int) -> tuple[Scheme, ...]:
        """Normalisation scheme of each channel."""
        if self.landmarks is None:
            return (ZScore(self.foreground),) * channels
        percentiles = self.landmarks.percentiles
        return tuple(
            LandmarkMatching(percentiles, row, self.foreground) for row in self.landmarks.values
        )


def encode_normalisation(schemes: tuple[Scheme, ...]) -> dict[str, Any]:
    """Convert schemes to JSON values of format version 2.

    Raises:
        ConfigError: Version 2 cannot represent the schemes.
    """
    first = schemes[0]
    landmarks = None
    if isinstance(first, LandmarkMatching):
        rows = [s.values for s in schemes if isinstance(s, LandmarkMatching)]
        landmarks = {"percentiles": first.percentiles, "values": rows}
    record = {"foreground": first.foreground, "landmarks": landmarks}
    if decode_normalisation(record, len(schemes)) != schemes:
        raise ConfigError("normalisation: version 2 of the format has one scheme for all channels")
    return record


def decode_normalisation(values: Any, channels: int) -> tuple[Scheme, ...]:
    """Convert JSON values to schemes; inverse of `encode_normalisation`."""
    return NormalisationJson.model_validate(values).schemes(channels)


class ModelJson(_Record):
    """Fields common to manifests and specs."""

    name: str
    description: str
    intended_use: str
    channels: tuple[Channel, ...]
    labels: tuple[Label, ...]
    regions: dict[str, tuple[int, ...]]
    display: tuple[str, ...]
    orientation: str
    spacing_mm: tuple[float, float, float]
    grid: Grid | None
    normalisation: NormalisationJson
    inference: Inference
    foreground_ml: float | None = None

    def record(self) -> dict[str, Any]:
        """Constructor arguments of a `ModelRecord`."""
        schemes = self.normalisation.schemes(len(self.channels))
        crop = self.normalisation.foreground
        return {
            "name": self.name,
            "description": self.description,
            "intended_use": self.intended_use,
            "task": Task(self.channels, self.labels, self.regions, self.display),
            "spacing_mm": self.spacing_mm,
            "preprocessing": Preprocessing(self.orientation, self.grid, crop, schemes),
            "inference": self.inference,
            "foreground_ml": self.foreground_ml,
        }


class ManifestJson(ModelJson):
    """`manifest.json`, version 2."""

    format: Literal["attnseg-bundle"]
    format_version: Literal[2]
    created_with: str
    network: dict[str, Any]
    training: Training | None
    validation: Validation | None
    budget: Budget | None
    files: dict[str, FileEntry]

    def manifest(self) -> Manifest:
        """Convert to a `Manifest`."""
        own = ("created_with", "network", "training", "validation", "budget", "files")
        return Manifest(**self.record(), **{name: getattr(self, name) for name in own})

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
            orientation=preprocessing.orientation,
            grid=preprocessing.grid,
            normalisation=encode_normalisation(preprocessing.normalisation),
            **given,
        )


_FIRST = ("format", "format_version", "name", "created_with")  # the others in declaration order


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as `manifest.json`; the output is deterministic."""
    record = ManifestJson.of(manifest).model_dump(mode="json")
    ordered = {**{name: record[name] for name in _FIRST}, **record}
    return TypeAdapter(dict[str, Any]).dump_json(ordered, indent=2) + b"\n"


def decode_manifest(stored: bytes) -> Manifest:
    """Decode the bytes of a `manifest.json` of version 1 or 2.

    Raises:
        ConfigError: The bytes violate the format; the message names the field and the rule.
    """
    record = parse_json(stored)
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(version, bool | float):  # equal to 1 or 2, but not the number that is specified
        raise ConfigError(f"format_version: must be a whole number, got {version!r}")
    try:
        return ManifestJson.model_validate_json(_as_version_2(stored, record)).manifest()
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
        "orientation": "RAS",
        "spacing_mm": (1.0, 1.0, 1.0),
        "grid": None,
        "normalisation": {},
    }
    try:
        defaults["regions"] = {label["name"]: [label["value"]] for label in record["labels"][1:]}
        defaults["display"] = [record["channels"][0]["name"]]
    except (KeyError, IndexError, TypeError):
        defaults |= {"regions": {}, "display": ()}  # reported by the validation of the fields
    completed: dict[str, Any] = {**defaults, **record}
    nested: dict[str, dict[str, Any]] = {
        "normalisation": {"foreground": "nonzero", "landmarks": None},
        "inference": {"overlap": 0.25, "window_multiple": 1, "min_voxels": 0},
    }
    for name, missing in nested.items():
        if isinstance(completed.get(name), Mapping):
            completed[name] = {**missing, **completed[name]}
    return completed


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


def _explain(error: ValidationError, whole: str) -> ConfigError:
    """Convert the first validation error to a `ConfigError` that names the field."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    if where == "format_version":
        return ConfigError(
            f"format_version {first['input']!r} is not known to this version of attnseg, which "
            f"reads 1 and {FORMAT_VERSION}",
            "install the version of attnseg that wrote the bundle",
        )
    rule = first.get("ctx", {}).get("error", first["msg"])
    return ConfigError(f"{where}: {rule}")
