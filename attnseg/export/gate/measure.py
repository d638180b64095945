"""The parity gate applied to every file of a bundle that this machine can run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from attnseg.export.gate.parity import Gate, Measured, NotRun, ParityReport, SimulatedFp16
from attnseg.export.graphs.graph import Graph
from attnseg.runtime.engines.cpu import installed_engines, no_engine, open_engine
from attnseg.runtime.engines.select import Candidate, EngineRequest, candidates
from attnseg.runtime.errors import EngineError, MismatchError, UnavailableError
from attnseg.runtime.model.bundle import Bundle, BundleFile
from attnseg.runtime.model.manifest import Budget
from attnseg.runtime.options import available_threads


def _on_cpu(gate: Gate, bundle: Bundle) -> Iterator[Measured]:
    """Measure the graphs with every engine of the processor, one at a time to limit memory."""
    threads = available_threads()
    installed = [name for name, version in installed_engines().items() if version]
    if not installed:
        raise no_engine()
    graph = bundle.file("onnx")
    for name in installed:
        gate.step(f"{name} fp32: golden window")
        yield gate.measure(open_engine(name, graph, "fp32", threads), "fp32", file=graph.name)
    if "openvino" in installed:
        # bf16 is a mode of running the fp32 file, not a file of its own
        yield from _if_it_opens(gate, "openvino", graph, "bf16")
    if bundle.has("onnx", "fp16"):
        gate.step("simulated fp16: golden window")
        half = bundle.file("onnx", "fp16")
        engine = SimulatedFp16(Graph.read(half), threads)
        yield gate.measure(engine, "fp16", file=half.name)
    if bundle.has("onnx", "int8"):
        yield from _if_it_opens(gate, "onnxruntime", bundle.file("onnx", "int8"), "int8")


def _if_it_opens(gate: Gate, name: str, file: BundleFile, precision: str) -> Iterator[Measured]:
    gate.step(f"{name} {precision}: golden window")
    try:
        engine = open_engine(name, file, precision, available_threads())
    except EngineError:
        return  # the processor has no bf16, or the engine is not installed
    yield gate.measure(engine, precision, gated=precision != "bf16", file=file.name)


def _measure_candidate(gate: Gate, candidate: Candidate) -> Measured | NotRun:
    name = f"{candidate.engine} ({candidate.file.name})"
    gate.step(f"{candidate.engine} {candidate.precision}: golden window")
    try:
        engine = candidate.open()
    except MismatchError as error:
        return Measured(
            candidate.precision,
            name,
            gated=True,
            logits=math.inf,
            labels=1.0,
            drifts=(),
            file=candidate.file.name,
            failure=error.cause,
        )
    except UnavailableError as error:
        return NotRun(candidate.precision, name, str(error))
    return gate.measure(engine, candidate.precision, file=candidate.file.name)


def _measure_on_gpu(
    gate: Gate, bundle: Bundle, name: str
) -> tuple[tuple[Measured, ...], tuple[NotRun, ...]]:
    window = bundle.manifest.inference.window
    measured: list[Measured] = []
    not_run: list[NotRun] = []
    for precision in ("fp32", "fp16", "int8"):
        request = EngineRequest(engine=name, precision=precision, window=window)
        for candidate in candidates(bundle, request):  # one at a time to limit memory
            found = _measure_candidate(gate, candidate)
            if isinstance(found, NotRun):
                not_run.append(found)
            else:
                measured.append(found)
    return tuple(measured), tuple(not_run)


def measure_graphs(gate: Gate, bundle: Bundle, budget: Budget) -> ParityReport:
    """Compare the ONNX files with the reference, on the processor and on a GPU if there is one.

    Raises:
        EngineError: No engine is installed, an engine rejects the graph, or ONNX Runtime fails on
            the GPU.
    """
    on_cpu = tuple(_on_cpu(gate, bundle))
    on_gpu, not_run = _measure_on_gpu(gate, bundle, "onnxruntime-cuda")
    return ParityReport(gate.reference, budget, (*on_cpu, *on_gpu), not_run)


def measure_engines(gate: Gate, bundle: Bundle, report: ParityReport) -> ParityReport:
    """Add the bundle's engine files to a report, each measured or marked as not run.

    Raises:
        EngineError: An engine for this GPU is rejected or fails.
    """
    for name in ("tensorrt", "tensorrt-rtx"):
        measured, not_run = _measure_on_gpu(gate, bundle, name)
        report = replace(
            report,
            measured=(*report.measured, *measured),
            not_run=(*report.not_run, *not_run),
        )
    return report
