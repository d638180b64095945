"""Engines that run an ONNX file on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from attnseg.runtime.engines.base import PRECISIONS, Engine, ModelFile
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.engines.openvino import OpenVinoEngine
from attnseg.runtime.errors import ConfigError, EngineError
from attnseg.runtime.extras import install, version_of

_OPEN: dict[str, Callable[[ModelFile, str, int], Engine]] = {
    "openvino": OpenVinoEngine,
    "onnxruntime": OnnxRuntimeEngine,
}
CPU_ENGINES = tuple(_OPEN)
"""CPU engines, fastest first (measured by benchmarks/pipeline.py)."""


def installed_engines() -> dict[str, str | None]:
    """Version of each CPU engine, None if it is not installed; fastest first."""
    return {name: _version(name) for name in CPU_ENGINES}


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    return version_of(name) or "unknown"  # installed under another name, such as onnxruntime-gpu


def no_engine() -> EngineError:
    """Error for an installation without a CPU engine."""
    return EngineError(
        "no inference engine is installed",
        f"{install('cpu')}, which brings {' and '.join(CPU_ENGINES)}",
    )


def open_engine(name: str, model: ModelFile, precision: str, threads: int) -> Engine:
    """Open an engine on an ONNX file.

    Args:
        name: Name of the engine, one of `CPU_ENGINES`.
        model: The ONNX file.
        precision: One of `PRECISIONS`; no engine supports all of them.
        threads: Number of CPU threads.

    Raises:
        ConfigError: The engine or the precision does not exist.
        EngineError: The engine is not installed, does not support the precision, or rejects the
            file.
    """
    if name not in _OPEN:
        raise ConfigError(f"engine {name} does not exist", f"choose {', '.join(_OPEN)}")
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision {precision} does not exist", f"choose {', '.join(PRECISIONS)}"
        )
    return _OPEN[name](model, precision, threads)
