"""Manifest: description of a bundle's model, as dataclasses (parsed by `manifest_format`).

The runtime is not specific to brains: channels, labels, preprocessing and windows are defined by
the manifest. Records validate themselves and raise `ConfigError` with the name of the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import Shape, along_axes
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.windows import (
    LARGEST_WINDOW,
    Accumulate,
    EmptyWindows,
    Placement,
    Weights,
)
from attnseg.runtime.task import Task

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
LARGEST_FILE = 1 << 32
"""Largest file of a bundle in bytes; a graph has less than 2**31, and an engine holds one."""

Role = Literal["onnx", "engine", "weights", "golden", "parity", "card", "sbom", "log"]
Precision = Literal["fp32", "fp16", "int8"]


class _FileError(ConfigError, ValueError):
    """Error of an entry of `files`; as a `ValueError`, pydantic prefixes it with the file."""


def _require(holds: bool, rule: str, value: object, kind: type[ConfigError] = ConfigError) -> None:
    if not holds:
        raise kind(f"{rule}, got {value}")


@dataclass(frozen=True)
class Inference:
    """Default inference options of a model.

    Attributes:
        window: Number of voxels of a window along X, Y and Z, multiples of `window_multiple`.
        overlap: Overlap of neighbouring windows as a fraction of the window, 0 <= overlap < 1.
        window_multiple: Number of voxels that the network's input sizes must be a multiple of;
            one number, or three along X, Y and Z.
        min_voxels: Minimum component size in voxels; the clean-up removes smaller ones.
        placement: Positions of the windows.
        weights: Weights of a window's voxels.
        mirror_axes: Axes of the image along which windows are mirrored, all combinations, unless
            another test-time augmentation is requested.
        accumulate: Type of the weighted sums of logits.
        empty_windows: Treatment of windows without a non-zero voxel.
    """

    window: Shape
    overlap: float
    window_multiple: int | Shape
    min_voxels: int
    placement: Placement = "stride"
    weights: Weights = "gaussian"
    mirror_axes: tuple[int, ...] = ()
    accumulate: Accumulate = "single"
    empty_windows: EmptyWindows = "skip"

    def __post_init__(self) -> None:
        axes = self.mirror_axes
        distinct = len(set(axes)) == len(axes) and set(axes) <= {0, 1, 2}
        _require(distinct, "inference.mirror_axes must be distinct axes from 0 to 2", axes)
        multiple = self.window_multiple
        multiples = along_axes(multiple)
        _require(min(multiples) > 0, "inference.window_multiple must be positive", multiple)
        fits = len(self.window) == 3 and all(
            s > 0 and s % m == 0 for s, m in zip(self.window, multiples, strict=True)
        )
        _require(fits, f"inference.window is not a multiple of {multiple}", self.window)
        small = math.prod(self.window) <= LARGEST_WINDOW
        _require(small, f"inference.window has more than {LARGEST_WINDOW} voxels", self.window)
        overlap = self.overlap
        _require(0 <= overlap < 1, "inference.overlap must be at least 0 and below 1", overlap)
        _require(self.min_voxels >= 0, "inference.min_voxels must be at least 0", self.min_voxels)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Properties of a model that the runtime uses; shared by manifest and spec.

    Attributes:
        name: Name of the model.
        description: Purpose and training data of the model.
        intended_use: Permitted users and uses.
        task: Channels, labels and regions.
        spacing_mm: Voxel size of the training data along X, Y and Z; None if it is unknown, and
            scans of any voxel size are taken as they are.
        preprocessing: Preprocessing of volumes.
        inference: Default inference options.
        foreground_ml: Largest foreground among the training cases, which have a background of 0
            around it; None if their background is unknown.
    """

    name: str
    description: str
    intended_use: str
    task: Task
    spacing_mm: tuple[float, float, float] | None
    preprocessing: Preprocessing
    inference: Inference
    foreground_ml: float | None = None

    def __post_init__(self) -> None:
        spacing_mm = (1.0, 1.0, 1.0) if self.spacing_mm is None else self.spacing_mm
        fits = len(spacing_mm) == 3 and all(0 < s < float("inf") for s in spacing_mm)
        _require(fits, "spacing_mm must be three positive numbers", spacing_mm)
        largest_ml = self.foreground_ml
        known = largest_ml is None or 0 < largest_ml < float("inf")
        _require(known, "foreground_ml must be a positive number", largest_ml)
        schemes, channels = len(self.preprocessing.normalisation), len(self.task.channels)
        _require(
            schemes == channels,
            f"normalisation must have schemes for {channels} channels",
            schemes,
        )


@dataclass(frozen=True)
class Training:
    """Origin of the weights.

    Attributes:
        data: Name of the data set.
        train_cases: Names of the training cases.
        validation_cases: Names of the cases held out.
        synthetic_cases: Number of synthetic phantoms added to the training cases.
        epochs: Number of epochs after which the weights were saved.
        seconds: Training time in seconds.
        device: Name of the training device.
        config: All settings of the training run.
    """

    data: str
    train_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    synthetic_cases: int
    epochs: int
    seconds: float
    device: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """Scores of the weights on the validation cases.

    Attributes:
        dice: Mean Dice coefficient by region.
        method: Description of the measurement.
    """

    dice: dict[str, float]
    method: str


@dataclass(frozen=True)
class Budget:
    """Largest permitted deviation from the trained network in fp32, per case and region.

    Attributes:
        dice: Change of the Dice coefficient.
        volume_percent: Change of the volume, in percent of the reference volume or of 1 ml,
            whichever is larger.
    """

    dice: float = 0.002
    volume_percent: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.dice <= 1, "budget.dice must be above 0 and at most 1", self.dice)
        percent = self.volume_percent
        _require(
            0 < percent <= 100, "budget.volume_percent must be above 0 and at most 100", percent
        )


@dataclass(frozen=True)
class EngineBuild:
    """Builder and target of an engine file.

    Attributes:
        builder: Library that built the engine.
        version: Version of the library; other versions may reject the file.
        target: Compute capability of the GPU, such as `sm86` for 8.6.
        compatibility: `same` for the target only, `ampere+` for capability 8.0 and later.
        version_compatible: Whether later versions of the library can run the engine.
        window: Fixed input size along X, Y and Z, in voxels.
        batch: Fixed number of windows per call.
    """

    builder: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    target: str
    compatibility: Literal["same", "ampere+"]
    version_compatible: bool
    window: Shape
    batch: int

    def __post_init__(self) -> None:
        target = re.fullmatch("sm[0-9]{2,3}", self.target)
        _require(target is not None, "target must have the form sm86", self.target, _FileError)
        three = len(self.window) == 3 and min(self.window) > 0
        _require(three, "window must be three positive numbers", self.window, _FileError)
        _require(self.batch > 0, "batch must be positive", self.batch, _FileError)


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle.

    Attributes:
        role: Role of the file.
        precision: Precision of a graph or an engine; None for other files.
        engine: Builder and target of an engine; None for other files.
        sha256: SHA-256 of the content, 64 hexadecimal digits.
        size_bytes: Size of the file in bytes.
    """

    role: Role
    precision: Precision | None
    engine: EngineBuild | None
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if (self.precision is not None) != (self.role in ("onnx", "engine")):
            raise _FileError("precision belongs to files of role onnx and engine, and no others")
        if (self.engine is not None) != (self.role == "engine"):
            raise _FileError("engine belongs to files of role engine, and no others")
        digest = re.fullmatch("[0-9a-f]{64}", self.sha256)
        _require(
            digest is not None, "sha256 must be 64 hexadecimal digits", self.sha256, _FileError
        )
        _require(
            0 < self.size_bytes <= LARGEST_FILE,
            f"size_bytes must be positive and at most {LARGEST_FILE}",
            self.size_bytes,
            _FileError,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest(ModelRecord):
    """Content of a bundle's manifest.

    Attributes:
        created_with: `attnseg` and the version that wrote the bundle.
        network: Configuration of the network, or the name of the imported ONNX file.
        training: Origin of the weights, if known.
        validation: Scores of the weights, if known.
        budget: Deviation permitted at export; None in bundles of version 1.
        files: Entries of the files by file name.
    """

    created_with: str
    network: dict[str, Any]
    training: Training | None
    validation: Validation | None
    budget: Budget | None
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        super().__post_init__()
        graphs = [entry.precision for entry in self.files.values() if entry.role == "onnx"]
        if graphs.count("fp32") != 1 or len(set(graphs)) < len(graphs):
            raise ConfigError("files must hold one file of role onnx in fp32, no precision twice")
        for name in self.files:
            plain = PurePosixPath(name).name == name and "\\" not in name
            if not plain or name in ("", "..", MANIFEST, SIGNATURE):
                raise ConfigError(f"file {name!r} is not a plain file name")
