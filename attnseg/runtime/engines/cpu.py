"""Engines that run an ONNX file on the processor: one by name, or the fastest installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.engines.openvino import OpenVinoEngine
from attnseg.runtime.errors import EngineError

# Fastest first, as measured by benchmarks/pipeline.py on a CPU.
ENGINES: dict[str, Callable[[Path, str, int], Engine]] = {
    "openvino": OpenVinoEngine,
    "onnxruntime": OnnxRuntimeEngine,
}
PRECISIONS = ("auto", "bf16", "fp16", "fp32", "int8")


def installed_engines() -> dict[str, str | None]:
    """Version of each engine, None where it is not installed; fastest first."""
    return {name: _version(name) for name in ENGINES}


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # installed under another distribution's name, such as onnxruntime-gpu


def _first_that_opens(names: Sequence[str], model: Path, precision: str, threads: int) -> Engine:
    """The first engine that opens; if none does, the first one's error."""
    errors: list[EngineError] = []
    for name in names:
        try:
            return open_engine(name, model, precision, threads)
        except EngineError as error:
            errors.append(error)
    raise errors[0]


def open_engine(name: str, model: Path, precision: str, threads: int) -> Engine:
    """Open an engine on an ONNX file.

    Args:
        name: `auto` or a name of `ENGINES`.
        model: the ONNX file.
        precision: `auto` or one of `PRECISIONS`, not all of which every engine has.
        threads: of the processor that it may use.

    Raises:
        EngineError: the engine does not exist, is not installed, has no such precision, or
            refuses the file; with `auto`, none is installed.
    """
    if name == "auto":
        installed = [n for n, version in installed_engines().items() if version]
        if not installed:
            raise EngineError(
                "no inference engine is installed; pip install 'attnseg[cpu]' brings "
                + " and ".join(ENGINES)
            )
        return _first_that_opens(installed, model, precision, threads)
    if name not in ENGINES:
        raise EngineError(f"engine {name} does not exist; choose auto, {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision} does not exist; choose {', '.join(PRECISIONS)}")
    return ENGINES[name](model, precision, threads)
