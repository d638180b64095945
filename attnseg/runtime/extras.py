"""Optional dependencies: modules of each extra, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable

from attnseg.runtime.errors import DependencyError

MODULES = {
    "cpu": ("openvino", "onnxruntime"),
    "evaluate": ("matplotlib",),
    "train": ("filelock", "matplotlib", "safetensors", "tensorboard", "torch"),
    "import": ("dynamic_network_architectures", "monai"),
    "export": (
        "cyclonedx",
        "filelock",
        "matplotlib",
        "onnx",
        "onnxconverter_common",
        "onnxruntime",
        "onnxscript",
        "packageurl",
        "safetensors",
        "torch",
    ),
}
"""Modules of each extra that its commands require at start-up."""


def install(extra: str) -> str:
    """Command that installs an extra.

    attnseg is on no package index, where its name could be taken by anybody, so the command is
    for a checkout. This is the only place to change with a release.
    """
    return f"pip install '.[{extra}]' in the checkout of attnseg"


def missing(modules: Iterable[str]) -> list[str]:
    """Modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(purpose: str, extra: str, modules: Iterable[str] | None = None) -> None:
    """Raise `DependencyError` unless the modules of an extra are installed.

    Args:
        purpose: Subject of the message, such as `attnseg train`.
        extra: Extra that installs the modules.
        modules: Required modules; None for those of the extra in `MODULES`.

    Raises:
        DependencyError: A module is missing.
    """
    lacking = missing(MODULES[extra] if modules is None else modules)
    if lacking:
        raise DependencyError(f"{purpose} needs {', '.join(lacking)}", install(extra))
