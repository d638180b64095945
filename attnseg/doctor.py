"""Diagnosis of this machine: what it can run, and what to install for the rest."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnseg._version import __version__
from attnseg.runtime.cuda.gpu import find_gpu
from attnseg.runtime.engines.cpu import CPU_ENGINES
from attnseg.runtime.engines.select import Candidate, EngineRequest, candidates
from attnseg.runtime.errors import AttnsegError, EngineError
from attnseg.runtime.extras import MODULES, install, missing, version_of
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.verdict import over_budget
from attnseg.runtime.options import available_threads

_LIBRARIES = (
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "cuda-core",
)
_USED = "used by default"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        subject: Part of the machine or the installation.
        well: Whether the subject can be used.
        state: State as text, or the error that prevents its use.
        advice: Remedy or note; empty if there is none.
    """

    subject: str
    well: bool
    state: str | AttnsegError
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
        return Finding("model", False, error), None
    state = f"{bundle.manifest.name}, checksums match ({bundle.manifest.intended_use})"
    return Finding("model", True, state), bundle


def _subject(candidate: Candidate) -> str:
    return f"engine {candidate.engine}" + (
        f" ({candidate.file.name})" if candidate.prebuilt else ""
    )


def _engine(candidate: Candidate, bundle: Bundle) -> Finding:
    """Open an engine; on the processor also run it, as only GPU engines are checked on opening."""
    manifest = bundle.manifest
    window = np.zeros((1, len(manifest.task.channels), *manifest.inference.window), np.float32)
    try:
        engine = candidate.open()
        if candidate.engine in CPU_ENGINES:
            engine.infer(window)
    except AttnsegError as error:
        return Finding(_subject(candidate), False, error.detached())
    info = engine.info
    state = f"{info.version}, runs the model in {info.precision}"
    verdict = over_budget(bundle, info.name)
    return Finding(_subject(candidate), True, f"{state}, as {verdict}" if verdict else state)


def _engines(bundle: Bundle | None) -> list[Finding]:
    if bundle is None:
        return [Finding("engines", False, "not tried without a model")]
    window = bundle.manifest.inference.window
    request = EngineRequest(window=window, threads=available_threads())
    found = [_engine(candidate, bundle) for candidate in candidates(bundle, request)]
    first = next((f.subject for f in found if f.well), None)
    return [replace(f, advice=_USED) if f.subject == first else f for f in found]


def _libraries() -> Finding:
    found = {name: version_of(name) for name in _LIBRARIES}
    here = [f"{name} {version}" for name, version in found.items() if version]
    missing = [name for name, version in found.items() if not version]
    rest = f"; not installed: {', '.join(missing)}" if missing else ""
    return Finding("libraries", bool(here), (", ".join(here) or "none") + rest)


def _part(subject: str, extra: str) -> Finding:
    lacking = missing(MODULES[extra])
    if lacking:
        return Finding(subject, False, f"needs {', '.join(lacking)}", install(extra))
    return Finding(subject, True, "installed")


def _gpu() -> Finding:
    try:
        return Finding("gpu", True, str(find_gpu()))
    except EngineError as error:
        return Finding("gpu", False, error)


def examine(model: Path | None = None) -> list[Finding]:
    """Examine the machine, the model, the engines and the optional components.

    Args:
        model: Folder of the bundle to examine; None for the shipped bundle.

    Returns:
        One finding per subject; the first usable engine is the default.
    """
    finding, bundle = _model(model)
    return [
        _machine(),
        _gpu(),
        _libraries(),
        finding,
        *_engines(bundle),
        _part("attnseg evaluate", "evaluate"),
        _part("attnseg train", "train"),
        _part("attnseg export", "export"),
        _part("attnseg import", "import"),
    ]
