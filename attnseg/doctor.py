"""What this machine can run, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnseg._version import __version__
from attnseg.runtime.bundle import Bundle
from attnseg.runtime.engines.choice import installed_engines, open_engine
from attnseg.runtime.errors import AttnsegError
from attnseg.runtime.segmenter import available_threads

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


def _engine(name: str, version: str | None, bundle: Bundle | None) -> Finding:
    subject = f"engine {name}"
    if version is None:
        return Finding(subject, False, "not installed", "pip install 'attnseg[cpu]'")
    if bundle is None:
        return Finding(subject, False, f"{version}, not tried without a model")
    edge = bundle.manifest.inference.window_multiple
    window = np.zeros((1, len(bundle.manifest.channels), edge, edge, edge), np.float32)
    try:
        engine = open_engine(name, bundle.file("onnx"), "auto", available_threads())
        engine.infer(window)
    except AttnsegError as error:
        return Finding(subject, False, str(error))
    return Finding(subject, True, f"{version}, runs the model in {engine.info.precision}")


def _part(subject: str, modules: tuple[str, ...], extra: str) -> Finding:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        advice = f"pip install 'attnseg[{extra}]'"
        return Finding(subject, False, f"needs {', '.join(missing)}", advice)
    return Finding(subject, True, "installed")


def _gpu() -> Finding:
    if Path("/proc/driver/nvidia/version").exists():
        state = "an NVIDIA driver is loaded; this version runs on the CPU only"
    else:
        state = "no NVIDIA driver; this version runs on the CPU only"
    return Finding("gpu", True, state)


def examine(model: Path | None = None) -> list[Finding]:
    """Look at machine, model, engines and optional parts.

    Args:
        model: bundle to try; None for the shipped one.

    Returns:
        One finding per subject; `--engine auto` takes the first engine that is well.
    """
    finding, bundle = _model(model)
    engines = [_engine(name, version, bundle) for name, version in installed_engines().items()]
    return [
        _machine(),
        finding,
        *engines,
        _part("attnseg train", ("torch",), "train"),
        _part("attnseg export", EXPORT_MODULES, "export"),
        _gpu(),
    ]
