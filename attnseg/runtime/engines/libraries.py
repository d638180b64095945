"""Import of the inference libraries, without their telemetry.

OpenVINO (seen in 2026.4) and ONNX Runtime (seen in 1.32) look up an analytics host and write an
identifier to the home folder when they are imported; their functions to opt out act too late. Every
import of one of them in attnseg goes through this module. A library that the program has imported
before is left as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OPENVINO_TELEMETRY = "openvino_telemetry"
_ONNXRUNTIME_SWITCH = "ORT_DISABLE_TELEMETRY"


def import_openvino() -> Any:
    """Import OpenVINO, which takes a stub where its telemetry module is missing.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    with _hidden(_OPENVINO_TELEMETRY):
        import openvino
    return openvino


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, which reads its environment variable while it is imported.

    Raises:
        ImportError: ONNX Runtime is not installed.
    """
    with _set(_ONNXRUNTIME_SWITCH, "1"):
        import onnxruntime
    return onnxruntime


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make imports of a module fail in the block, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def _set(variable: str, value: str) -> Iterator[None]:
    """Set an environment variable in the block, unless it is set."""
    if variable in os.environ:
        yield
        return
    os.environ[variable] = value
    try:
        yield
    finally:
        del os.environ[variable]
