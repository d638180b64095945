"""Bundle: a model with everything that the runtime has to know of it.

A folder with `manifest.json` and the files that it names, each with its checksum. The format
is specified field by field in `docs/bundle.md`. A bundle holds data only: nothing in it is
unpickled or executed. Nothing in the runtime is specific to brains; channels, labels,
normalisation and window all come from here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from attnseg.runtime.errors import BundleError, ConfigError
from attnseg.runtime.grid import Grid
from attnseg.runtime.normalise import Normalisation
from attnseg.runtime.scans import Channel

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
FORMAT_VERSION: Literal[2] = 2

_AXIS = {"L": "L", "R": "L", "A": "A", "P": "A", "S": "S", "I": "S"}

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(gt=0)]
Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Role = Literal["onnx", "engine", "weights", "golden", "parity", "card", "sbom", "log"]
Precision = Literal["fp32", "fp16", "int8"]


class _Record(BaseModel):
    """Part of the manifest: unknown fields are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Label(_Record):
    """One output class. Its place in the list is the network's output index."""

    name: str
    value: Annotated[int, Field(ge=0, le=255)]


class Inference(_Record):
    """Defaults of the sliding window and the clean-up."""

    window: tuple[Size, Size, Size]
    overlap: Share
    window_multiple: Size
    min_voxels: Annotated[int, Field(ge=0)]


class Training(_Record):
    """Where the weights come from."""

    data: str
    train_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    synthetic_cases: int
    epochs: int
    seconds: float
    device: str
    config: dict[str, Any]


class Validation(_Record):
    """What the weights achieve on the validation cases, and how that was measured."""

    dice: dict[str, float]
    method: str


class Budget(_Record):
    """How far each precision may be from the trained network in fp32, on every case and region.

    Attributes:
        dice: drift of the Dice score.
        volume_percent: drift of the volume, in percent of it but of 1 ml at least.
    """

    dice: Annotated[float, Field(gt=0, le=1)] = 0.002
    volume_percent: Annotated[float, Field(gt=0, le=100)] = 0.5


class EngineBuild(_Record):
    """What built an engine file, and what it runs on.

    Attributes:
        builder: library.
        version: of the library; another version may refuse the file.
        target: compute capability, `sm86` for 8.6.
        compatibility: `same`, or `ampere+` for that capability and later ones.
        version_compatible: later versions of the library run it too.
        window: the one size of its input along X, Y and Z.
        batch: the one number of windows it takes at a time.
    """

    builder: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    target: Annotated[str, Field(pattern="^sm[0-9]{2,3}$")]
    compatibility: Literal["same", "ampere+"]
    version_compatible: bool
    window: tuple[Size, Size, Size]
    batch: Size


class FileEntry(_Record):
    """One file of the bundle."""

    role: Role
    precision: Precision | None
    engine: EngineBuild | None
    sha256: Sha256
    size_bytes: Size

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.precision is not None) != (self.role in ("onnx", "engine")):
            raise ValueError("precision belongs to files of role onnx and engine, and to no others")
        if (self.engine is not None) != (self.role == "engine"):
            raise ValueError("engine belongs to files of role engine, and to no others")
        return self


class Manifest(_Record):
    """Content of `manifest.json`; the fields are specified in `docs/bundle.md`."""

    format: Literal["attnseg-bundle"]
    format_version: Literal[2]
    name: str
    created_with: str
    description: str
    intended_use: str
    channels: Annotated[tuple[Channel, ...], Field(min_length=1)]
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    regions: dict[str, tuple[int, ...]]
    display: Annotated[tuple[str, ...], Field(min_length=1)]
    orientation: str
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    grid: Grid | None
    normalisation: Normalisation
    inference: Inference
    network: dict[str, Any]
    training: Training | None
    validation: Validation | None
    budget: Budget | None
    files: dict[str, FileEntry]

    @field_validator("normalisation", mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """In a file nothing is left to defaults."""
        if isinstance(value, dict) and not {"foreground", "landmarks"} <= set(value):
            raise ValueError("foreground and landmarks must both be there")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        values = [label.value for label in self.labels]
        names = [channel.name for channel in self.channels]
        if values[0] != 0 or len(set(values)) < len(values):
            raise ValueError("labels must start with background, 0, and differ in their values")
        if len(set(names)) < len(names):
            raise ValueError("two channels have one name")
        for name, region in self.regions.items():
            if not set(region) <= set(values):
                raise ValueError(f"region {name} names a label that does not exist")
        for channel in self.channels:
            if not channel.suffixes or any(s != s.lower() for s in channel.suffixes):
                raise ValueError(f"channel {channel.name} needs suffixes, in lower case")
        if (
            any("" in c.suffixes for c in self.channels)
            and len({c.suffixes for c in self.channels}) > 1
        ):
            raise ValueError("an empty suffix stands for any file, so all channels must have it")
        if not set(self.display) <= set(names):
            raise ValueError("display names a channel that does not exist")
        if sorted("LAS".find(_AXIS.get(c, "?")) for c in self.orientation) != [0, 1, 2]:
            raise ValueError(f"orientation {self.orientation} does not name each axis once")
        graphs = [entry.precision for entry in self.files.values() if entry.role == "onnx"]
        if graphs.count("fp32") != 1 or len(set(graphs)) < len(graphs):
            raise ValueError("files must hold one file of role onnx in fp32, no precision twice")
        for path in self.files:
            if (
                PurePosixPath(path).name != path
                or "\\" in path
                or path in ("", "..", MANIFEST, SIGNATURE)
            ):
                raise ValueError(f"file {path!r} is not a plain file name")
        if any(size % self.inference.window_multiple for size in self.inference.window):
            raise ValueError("window is not a multiple of window_multiple")
        landmarks = self.normalisation.landmarks
        if landmarks is not None and len(landmarks.values) != len(self.channels):
            raise ValueError("landmarks are not for the number of channels")
        return self


@dataclass(frozen=True)
class Bundle:
    """A model on disk whose files were found to match their checksums.

    Attributes:
        folder: where it lies.
        manifest: what it says.
        sha256: checksum of the manifest, and so, through the checksums in it, of the whole.
    """

    folder: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a bundle and check every file.

        Raises:
            BundleError: the folder is not a bundle, its format version is unknown, its
                manifest breaks the format, or a file is missing or does not match.
        """
        folder = Path(folder)
        manifest_file = folder / MANIFEST
        if not folder.is_dir() or not manifest_file.is_file():
            raise BundleError(
                f"{folder}: is not a bundle (a folder with {MANIFEST}); "
                "make one with: attnseg export CHECKPOINT -o FOLDER"
            )
        stored = manifest_file.read_bytes()
        manifest = _parse(manifest_file, stored)
        for name, entry in manifest.files.items():
            _check_file(folder / name, entry)
        return cls(folder, manifest, hashlib.sha256(stored).hexdigest())

    @classmethod
    def default(cls) -> Self:
        """The bundle that is shipped with attnseg: a research demonstration."""
        return cls.load(default_folder())

    def file(self, role: Role, precision: Precision | None = None) -> Path:
        """The file with a role, for `onnx` in fp32 unless a precision is given.

        Raises:
            BundleError: there is none.
        """
        wanted = precision or ("fp32" if role == "onnx" else None)
        for name, entry in self.manifest.files.items():
            if entry.role == role and wanted in (None, entry.precision):
                return self.folder / name
        kind = f"{role} {precision}" if precision else role
        raise BundleError(f"{self.folder}: has no file of role {kind}; export it again")

    def has(self, role: Role, precision: Precision | None = None) -> bool:
        """Whether there is a file of this role and, if one is given, precision."""
        return any(
            entry.role == role and precision in (None, entry.precision)
            for entry in self.manifest.files.values()
        )


def default_folder() -> Path:
    """Folder of the shipped bundle."""
    return Path(__file__).parent / "models" / "default"


def _as_version_2(stored: bytes) -> bytes:
    """A manifest of version 1, which knew fp32 only, in the words of version 2; others as is."""
    try:
        record = json.loads(stored)
    except ValueError:
        return stored  # the parser says what is wrong
    if not isinstance(record, dict) or record.get("format_version") != 1:
        return stored
    files = record.get("files")
    for entry in files.values() if isinstance(files, dict) else ():
        if isinstance(entry, dict):
            added = {"precision": "fp32" if entry.get("role") == "onnx" else None, "engine": None}
            entry.update({name: entry.get(name, value) for name, value in added.items()})
    return json.dumps({"grid": None, "budget": None, **record, "format_version": 2}).encode()


def _parse(file: Path, stored: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(_as_version_2(stored))
    except ConfigError as error:
        raise BundleError(f"{file}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        if where == "format_version":
            raise BundleError(
                f"{file}: format_version {first['input']!r} is not known to this version of "
                f"attnseg, which reads 1 and {FORMAT_VERSION}; install the version that made it"
            ) from error
        raise BundleError(f"{file}: {where}: {first['msg']}; export the model again") from error


def _check_file(path: Path, entry: FileEntry) -> None:
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror}); copy the bundle again"
        ) from error
    if digest != entry.sha256 or path.stat().st_size != entry.size_bytes:
        raise BundleError(
            f"{path}: does not match its checksum in {MANIFEST}; it was changed or damaged, "
            "copy the bundle again"
        )


def file_entry(
    role: Role,
    content: bytes,
    precision: Precision | None = None,
    engine: EngineBuild | None = None,
) -> FileEntry:
    """The manifest's entry for a file with this content."""
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(
        role=role, precision=precision, engine=engine, sha256=digest, size_bytes=len(content)
    )


def check_free(folder: Path) -> None:
    """Raise `BundleError` unless a bundle can be written as `folder`: it is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder}: exists and is not empty; choose another folder")


def write_bundle(
    folder: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    sign: Callable[[bytes], bytes] | None = None,
) -> Bundle:
    """Write a bundle whole or not at all.

    Args:
        folder: where to; may exist only when it is empty.
        manifest: its `files` must name just what `files` holds.
        files: content by file name.
        sign: gives the signature of the manifest's bytes, to be stored beside it.

    Raises:
        BundleError: the folder is taken, or could not be written.
    """
    check_free(folder)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        stored = (manifest.model_dump_json(indent=2) + "\n").encode()
        (partial / MANIFEST).write_bytes(stored)
        if sign:
            (partial / SIGNATURE).write_bytes(sign(stored))
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except OSError as error:
        raise BundleError(f"{folder}: could not be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.load(folder)
