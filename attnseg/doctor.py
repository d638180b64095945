"""What this machine can run, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnseg._version import __version__
from attnseg.runtime.bundle import Bundle
from attnseg.runtime.engines.choice import EngineRequest, Way, ways
from attnseg.runtime.engines.cpu import ENGINES
from attnseg.runtime.errors import AttnsegError, EngineError
from attnseg.runtime.gpu import find_gpu
from attnseg.runtime.segmenter import available_threads

_LIBRARIES = (
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "cuda-core",
)
_USED = "used by --engine auto"
EXPORT_MODULES = ("torch", "safetensors", "onnx", "onnxscript", "onnxconverter_common", "cyclonedx")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do if it is not well."""

    subject: str
    well: bool
    state: str
    advice: str = ""


def _machine() -> Finding:
    state = (
        f"attnseg {__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {available_threads()} threads"
    )
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        state += f", {memory / 2**30:.0f} GiB memory"
    return Finding("machine", True, state)


def _model(folder: Path | None) -> tuple[Finding, Bundle | None]:
    try:
        bundle = Bundle.load(folder) if folder else Bundle.default()
    except AttnsegError as error:
        return Finding("model", False, str(error)), None
    state = f"{bundle.manifest.name}, checksums match ({bundle.manifest.intended_use})"
    return Finding("model", True, state), bundle


def _subject(way: Way) -> str:
    return f"engine {way.name}" + (f" ({way.file.name})" if way.brought else "")


def _engine(way: Way, bundle: Bundle) -> Finding:
    """Open it, and on the processor run it too; on a GPU it was checked when it was opened."""
    manifest = bundle.manifest
    window = np.zeros((1, len(manifest.channels), *manifest.inference.window), np.float32)
    try:
        engine = way.open()
        if way.name in ENGINES:
            engine.infer(window)
    except AttnsegError as error:
        return Finding(_subject(way), False, str(error))
    info = engine.info
    return Finding(_subject(way), True, f"{info.version}, runs the model in {info.precision}")


def _engines(bundle: Bundle | None) -> list[Finding]:
    if bundle is None:
        return [Finding("engines", False, "not tried without a model")]
    window = bundle.manifest.inference.window
    request = EngineRequest(window=window, threads=available_threads())
    found = [_engine(way, bundle) for way in ways(bundle, request)]
    first = next((f.subject for f in found if f.well), None)
    return [replace(f, advice=_USED) if f.subject == first else f for f in found]


def _libraries() -> Finding:
    found = {name: _installed(name) for name in _LIBRARIES}
    here = [f"{name} {version}" for name, version in found.items() if version]
    missing = [name for name, version in found.items() if not version]
    rest = f"; not installed: {', '.join(missing)}" if missing else ""
    return Finding("libraries", bool(here), (", ".join(here) or "none") + rest)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _part(subject: str, modules: tuple[str, ...], extra: str) -> Finding:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        advice = f"pip install 'attnseg[{extra}]'"
        return Finding(subject, False, f"needs {', '.join(missing)}", advice)
    return Finding(subject, True, "installed")


def _gpu() -> Finding:
    try:
        return Finding("gpu", True, str(find_gpu()))
    except EngineError as error:
        return Finding("gpu", False, str(error))


def examine(model: Path | None = None) -> list[Finding]:
    """Look at machine, model, engines and optional parts.

    Args:
        model: bundle to try; None for the shipped one.

    Returns:
        One finding per subject; `--engine auto` takes the first engine that is well.
    """
    finding, bundle = _model(model)
    return [
        _machine(),
        _gpu(),
        _libraries(),
        finding,
        *_engines(bundle),
        _part("attnseg train", ("torch",), "train"),
        _part("attnseg export", EXPORT_MODULES, "export"),
    ]
