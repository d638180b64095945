"""What of a bundle this machine can run, and the parity gate over all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from attnseg.export.parity import (
    Candidate,
    Gate,
    Measured,
    NotRun,
    ParityReport,
    SimulatedFp16,
)
from attnseg.runtime.bundle import Budget, Bundle
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.engines.choice import EngineRequest, Way, ways
from attnseg.runtime.engines.cpu import ENGINES, installed_engines
from attnseg.runtime.errors import EngineError, ExportError, MismatchError, NotHereError
from attnseg.runtime.segmenter import available_threads
from attnseg.trainer.networks import Network


class TorchEngine:
    """The trained network itself, in fp32: what everything else is compared with."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.info = EngineInfo("torch", torch.__version__, "fp32", "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        with torch.inference_mode():
            return np.asarray(self._network(torch.from_numpy(batch)).numpy())


def _open(name: str, file: Path, precision: str, threads: int) -> Iterator[Candidate]:
    try:
        engine = ENGINES[name](file, precision, threads)
    except EngineError:
        return  # the processor has no bf16
    # bf16 is a way to run the fp32 file, not a file
    yield Candidate(precision, engine, gated=precision != "bf16")


def _graphs(bundle: Bundle, threads: int) -> Iterator[Candidate]:
    """The graphs, by what runs them on a processor; made one by one, as each holds memory."""
    installed = [name for name, version in installed_engines().items() if version]
    if not installed:
        raise EngineError("parity needs an inference engine; pip install 'attnseg[cpu]'")
    graph = bundle.file("onnx")
    for name in installed:
        yield Candidate("fp32", ENGINES[name](graph, "fp32", threads))
    if "openvino" in installed:
        yield from _open("openvino", graph, "bf16", threads)
    if bundle.has("onnx", "fp16"):
        content = bundle.file("onnx", "fp16").read_bytes()
        yield Candidate("fp16", SimulatedFp16(content, threads))
    if bundle.has("onnx", "int8"):
        yield from _open("onnxruntime", bundle.file("onnx", "int8"), "int8", threads)


def _try(way: Way) -> Candidate | NotRun:
    try:
        return Candidate(way.precision, way.open())
    except MismatchError as error:
        raise ExportError(f"{way.name} ({way.file.name}): {error}") from error
    except NotHereError as error:
        return NotRun(way.precision, f"{way.name} ({way.file.name})", str(error))


def _measure_ways(
    gate: Gate, bundle: Bundle, name: str
) -> tuple[tuple[Measured, ...], tuple[NotRun, ...]]:
    window = bundle.manifest.inference.window
    requests = [EngineRequest(name, precision, window) for precision in ("fp32", "fp16", "int8")]
    measured, not_run = [], []
    for way in chain.from_iterable(ways(bundle, request) for request in requests):
        tried = _try(way)  # one by one, as each holds memory
        if isinstance(tried, NotRun):
            not_run.append(tried)
        else:
            measured.append(gate.measure(tried))
    return tuple(measured), tuple(not_run)


def measure_graphs(gate: Gate, bundle: Bundle, budget: Budget) -> ParityReport:
    """Compare the ONNX files with the reference, on the processor and on a GPU if there is one.

    Raises:
        EngineError: no engine is installed, or one refuses the graph; ONNX Runtime
            refuses it or fails on the GPU.
        ExportError: ONNX Runtime on the GPU gives other logits.
    """
    on_cpu = tuple(gate.measure(c) for c in _graphs(bundle, available_threads()))
    on_gpu, not_run = _measure_ways(gate, bundle, "onnxruntime-cuda")
    return ParityReport(gate.reference, budget, (*on_cpu, *on_gpu), not_run)


def measure_engines(gate: Gate, bundle: Bundle, report: ParityReport) -> ParityReport:
    """The report with the bundle's engine files, each measured or marked as not run.

    Raises:
        EngineError: an engine for this GPU is refused or fails.
        ExportError: an engine gives other logits.
    """
    for name in ("tensorrt", "tensorrt-rtx"):
        measured, not_run = _measure_ways(gate, bundle, name)
        report = replace(
            report,
            measured=(*report.measured, *measured),
            not_run=(*report.not_run, *not_run),
        )
    return report
