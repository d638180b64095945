"""The software bill of materials of a bundle, in CycloneDX format (cyclonedx-python-lib)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from attnseg._version import __version__
from attnseg.runtime.model.manifest import FileEntry, Manifest

# Packages that affect the content of a bundle, by their names on PyPI.
_PACKAGES = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxconverter-common",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "torch",
)
_BUILDERS = {
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
    "tensorrt": ("tensorrt",),
}


def _library(name: str, version: str) -> Component:
    url = PackageURL("pypi", name=name, version=version)
    return Component(
        type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=str(url)
    )


def _file(name: str, entry: FileEntry) -> Component:
    checksum = HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)
    return Component(
        type=ComponentType.FILE, name=name, hashes=[checksum], bom_ref=f"{name}@{entry.sha256}"
    )


def _versions(files: Mapping[str, FileEntry]) -> dict[str, str]:
    builders = {entry.engine.builder for entry in files.values() if entry.engine}
    names = [*_PACKAGES, *(package for b in sorted(builders) for package in _BUILDERS[b])]
    found = {"attnseg": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for example onnxruntime, where onnxruntime-gpu is installed instead
    return found


def bill_of_materials(manifest: Manifest, files: Mapping[str, FileEntry]) -> bytes:
    """CycloneDX 1.6 JSON of the model's files with checksums, and the packages that created them.

    It contains no timestamp or machine name, so the same export yields the same bytes.
    """
    model = Component(type=ComponentType.MACHINE_LEARNING_MODEL, name=manifest.name)
    model.bom_ref.value = manifest.name
    parts = [_file(name, entry) for name, entry in files.items()]
    libraries = [_library(name, version) for name, version in _versions(files).items()]
    checksums = ",".join(entry.sha256 for entry in files.values())
    bom = Bom(components=[*parts, *libraries], serial_number=uuid5(NAMESPACE_URL, checksums))
    bom.metadata.component = model
    bom.metadata.timestamp = None  # type: ignore[assignment]
    bom.register_dependency(model, [*parts, *libraries])
    return (JsonV1Dot6(bom).output_as_string(indent=2) + "\n").encode()
