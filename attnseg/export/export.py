"""Export of a model to a bundle of the files that pass the parity gate."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.export.documents.card import model_card
from attnseg.export.documents.sbom import bill_of_materials
from attnseg.export.engines.tensorrt import BuildOptions, BuildProgress
from attnseg.export.engines.worker import build_apart
from attnseg.export.gate.budget import check_budget, left_out
from attnseg.export.gate.layers import first_wrong_layer
from attnseg.export.gate.measure import measure_engines, measure_graphs
from attnseg.export.gate.parity import Gate, Measured, ParityReport
from attnseg.export.gate.samples import (
    SampleSource,
    calibration_windows,
    make_golden,
    sample_windows,
    synthetic_sample,
)
from attnseg.export.graphs.fp16 import (
    TensorRange,
    audit_ranges,
    check_convolutions,
    check_fp32,
    convert_to_fp16,
    nodes_at_risk,
)
from attnseg.export.graphs.graph import Graph
from attnseg.export.graphs.int8 import quantise
from attnseg.export.source.checkpoint import check_file
from attnseg.export.source.first_run import check_first_run
from attnseg.export.source.model import ONNX_FILE, Source, open_source
from attnseg.runtime.errors import AttnsegError, ExportError
from attnseg.runtime.model.bundle import Bundle, BundleDraft, check_free, draft_bundle, file_entry
from attnseg.runtime.model.golden import Golden, encode_golden
from attnseg.runtime.model.manifest import Budget, Precision, Role
from attnseg.runtime.model.signature import Signer
from attnseg.runtime.options import available_threads
from attnseg.runtime.results.output import check_folder

FP16_FILE, INT8_FILE, WEIGHTS_FILE = "model-fp16.onnx", "model-int8.onnx", "weights.safetensors"
GOLDEN_FILE, PARITY_FILE, CARD_FILE = "golden.npz", "parity.json", "README.md"
SBOM_FILE = "sbom.cdx.json"
AUDIT_WINDOWS = 8  # windows of the first sample, in the range audit


@dataclass(frozen=True)
class ExportOptions:
    """Content of a bundle besides the fp32 graph and the weights.

    Attributes:
        fp16: Whether to add an fp16 graph.
        io: Type of the fp16 graph's input and output.
        engines: TensorRT engines to build, from the fp16 graph if there is one.
        budget: Largest drift allowed for every file.
        words: Name, description and intended use that replace those stored with the model.
        signer: Signer of the bundle; None for no signature.
        spec: JSON file that describes an ONNX file.
        calibration: Folder of scans for an int8 graph; None for no such graph.
        overwrite: Whether to replace a bundle that is there; only a complete one does.
    """

    fp16: bool = False
    io: Literal["fp16", "fp32"] = "fp16"
    engines: tuple[BuildOptions, ...] = ()
    budget: Budget = field(default_factory=Budget)
    words: Mapping[str, str] = field(default_factory=dict)
    signer: Signer | None = None
    spec: Path | None = None
    calibration: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class ExportProgress:
    """Callbacks: `step` receives the name of the next step, `build` the progress of a build."""

    step: Callable[[str], None] = lambda _: None
    build: BuildProgress | None = None


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        bundle: The bundle as written.
        report: Report of the parity gate.
        in_fp32: Nodes of the fp16 graph that stayed in fp32.
        left_out: An error for each file that was requested and is over the budget.
    """

    bundle: Bundle
    report: ParityReport
    in_fp32: tuple[str, ...]
    left_out: tuple[ExportError, ...] = ()


@dataclass(frozen=True)
class _Half:
    """The fp16 graph of an export, if one was requested.

    Attributes:
        graph: The fp16 graph; None if none was requested.
        ranges: Ranges of all tensors of the fp32 graph.
        in_fp32: Names of the nodes that stayed in fp32.
    """

    graph: Graph | None = None
    ranges: tuple[TensorRange, ...] = ()
    in_fp32: tuple[str, ...] = ()


def _make_half(graph: Graph, windows: NDArray[np.float32], io: str) -> _Half:
    """Convert a graph to fp16, except nodes that may overflow on `windows` `(N, C, X, Y, Z)`."""
    check_fp32(graph)
    chosen = windows[:: max(1, len(windows) // AUDIT_WINDOWS)]
    ranges = audit_ranges(graph, (window[None] for window in chosen), available_threads())
    in_fp32 = nodes_at_risk(graph, ranges)
    half = convert_to_fp16(graph, in_fp32, io)
    check_convolutions(half, in_fp32)
    return _Half(half, tuple(ranges), tuple(in_fp32))


def _add(
    draft: BundleDraft, name: str, role: Role, content: bytes, precision: Precision | None = None
) -> None:
    draft.add(name, content, file_entry(role, content, precision))


def _engine_name(options: BuildOptions, precision: str) -> str:
    later = "plus" if options.compatibility == "ampere+" else ""
    return f"model-{precision}-{options.target}{later}.{options.builder}"


def _log_without_times(text: str) -> str:
    """A build log without durations, so that bundles are reproducible byte for byte."""
    return re.sub(r"\d[\d.e+-]* ?(?=(?:seconds|ms)\b)", "- ", text)


def _graphs_of_engines(
    wanted: Mapping[Precision, Graph], draft: BundleDraft
) -> Iterator[Precision]:
    """Precisions of the graphs that engines are built from.

    They are those below fp32, without those that were left out, or fp32 if none was requested.
    """
    below = [precision for precision in wanted if precision != "fp32"]
    for precision in below or wanted:
        if draft.bundle.has("onnx", precision):
            yield precision


def _build_engines(
    graphs: Mapping[Precision, Graph],
    draft: BundleDraft,
    options: ExportOptions,
    in_fp32: tuple[str, ...],
    progress: ExportProgress,
) -> None:
    """Build the engines of a bundle, and add each with its log."""
    window = draft.bundle.manifest.inference.window
    for precision, wanted in product(_graphs_of_engines(graphs, draft), options.engines):
        progress.step(f"{precision} {wanted.builder} engine for {wanted.target}")
        built = build_apart(graphs[precision], window, wanted, in_fp32, progress.build)
        name = _engine_name(wanted, precision)
        draft.add(name, built.content, file_entry("engine", built.content, precision, built.build))
        _add(draft, f"{name}.log", "log", _log_without_times(built.log).encode())


@contextmanager
def _naming(model: Path, folder: Path) -> Iterator[None]:
    """Name the user's model in errors in place of the graph in a temporary folder."""
    try:
        yield
    except AttnsegError as error:
        if str(folder) not in f"{error.cause}{error.mend}":
            raise
        cause, mend = (
            text.replace(str(folder / ONNX_FILE), str(model)).replace(f"{folder}{os.sep}", "")
            for text in (error.cause, error.mend)
        )
        raise type(error)(cause, mend, *error.settings) from error


def export_bundle(
    model: Path,
    folder: Path,
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Export a model to a bundle.

    A graph below fp32 or an engine that is over the budget is left out, and the rest is written.

    Args:
        model: `.pt` file of the trainer, `weights.safetensors` of a bundle, or `.onnx` file (which
            requires `options.spec`).
        folder: Folder to write the bundle to; must be absent, empty, or a bundle to overwrite.
        options: Content of the bundle.
        samples: Source of the cases that every precision is compared on; None for a synthetic case.
        progress: Callbacks that receive the progress.

    Raises:
        ConfigError: Options contradict each other, or the spec is invalid.
        TrainingError: The checkpoint cannot be read.
        ExportError: The ONNX file cannot be exported or converted, the fp32 graph is over the
            budget, or an engine cannot be built in the precision of its graph; nothing is written.
        EngineError: No engine is installed, or one rejects the graph; nothing is written.
        OutputError: The folder is a file or a dangling link.
        BundleError: The folder holds other files, or a bundle that is not to be replaced.
    """
    check_file(model)

    def read(given: ExportOptions) -> Source:
        return open_source(model, given.spec, given.words, given.budget)

    return export_source(model, read, folder, options, samples, progress)


def export_source(
    model: Path,
    read: Callable[[ExportOptions], Source],
    folder: Path,
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Export a model that a function reads, after the folder of the bundle was checked.

    Args:
        model: Path of the model, for the texts of errors.
        read: Function that reads the model.
        folder: See `export_bundle`, as for the other arguments and the errors.
        options: Content of the bundle.
        samples: Source of the cases that every precision is compared on.
        progress: Callbacks that receive the progress.
    """
    options, progress = options or ExportOptions(), progress or ExportProgress()
    check_folder(folder)
    check_free(folder, options.overwrite)
    progress.step("graph")
    source = read(options)
    for note in source.notes:
        progress.step(note)
    with (
        draft_bundle(folder, source.manifest, options.overwrite) as draft,
        _naming(model, draft.folder),
    ):
        filled = _fill(draft, model, source, options, samples, progress)
        draft.commit(options.signer.sign if options.signer else None)
    return replace(filled, bundle=Bundle.load(folder))


def _fill(
    draft: BundleDraft,
    model: Path,
    source: Source,
    options: ExportOptions,
    samples: SampleSource | None,
    progress: ExportProgress,
) -> Exported:
    """Add every file to a bundle; engines are built after the graphs have passed the gate."""
    manifest = source.manifest
    graphs: dict[Precision, Graph] = {"fp32": source.graph}
    _add(draft, ONNX_FILE, "onnx", source.graph.content, "fp32")
    if source.weights is not None:
        _add(draft, WEIGHTS_FILE, "weights", source.weights)
    progress.step("cases")
    phantom = synthetic_sample(manifest)
    cases = samples(manifest) if samples else [phantom]
    # The golden window is part of the bundle, so it never contains patient data.
    phantom_windows = sample_windows(manifest, phantom)
    windows = phantom_windows
    if samples and cases and (options.fp16 or source.weights is None):
        windows = sample_windows(manifest, cases[0])
    if source.weights is None:
        progress.step("first run")
        middle = windows[len(windows) // 2]
        check_first_run(model, source.reference, middle[None], manifest)
    progress.step("golden window")
    golden = make_golden(source.reference, phantom_windows, manifest.task)
    _add(draft, GOLDEN_FILE, "golden", encode_golden(golden))
    half = _Half()
    if options.fp16:
        progress.step("range audit and fp16 graph")
        half = _make_half(source.graph, windows, options.io)
        assert half.graph is not None
        graphs["fp16"] = half.graph
        _add(draft, FP16_FILE, "onnx", half.graph.content, "fp16")
    if options.calibration:
        progress.step("calibration and int8 graph")
        scans = calibration_windows(options.calibration, manifest)
        graphs["int8"] = quantise(source.graph, scans)
        _add(draft, INT8_FILE, "onnx", graphs["int8"].content, "int8")
    gate = Gate(draft.bundle, source.reference, golden, cases, progress.step)
    report = measure_graphs(gate, draft.bundle, options.budget)
    check_budget(report, ONNX_FILE)
    detail = partial(_wrong_layer, graph=source.graph, half=half, golden=golden, step=progress.step)
    errors = _leave_out(draft, report, detail)
    _build_engines(graphs, draft, options, half.in_fp32, progress)
    report = measure_engines(gate, draft.bundle, report)
    errors += _leave_out(draft, report, lambda _: "")
    report = replace(report, left_out=tuple(e.cause for e in errors), notes=source.notes)
    _add(draft, SBOM_FILE, "sbom", bill_of_materials(manifest, draft.entries))
    _add(draft, PARITY_FILE, "parity", _encode_report(report, half))
    _add(draft, CARD_FILE, "card", model_card(manifest, report).encode())
    in_fp32 = half.in_fp32 if FP16_FILE in draft.entries else ()
    return Exported(draft.bundle, report, in_fp32, tuple(errors))


def _leave_out(
    draft: BundleDraft, report: ParityReport, detail: Callable[[Measured], str]
) -> list[ExportError]:
    """Remove the files that are over the budget from a bundle, and return why."""
    errors = []
    for failed in report.failures():
        if failed.file in draft.entries:  # the first failure of a file is the one to state
            errors.append(left_out(failed, report, detail(failed)))
            for name in {failed.file, f"{failed.file}.log"} & {*draft.entries}:
                draft.remove(name)
    return errors


def _wrong_layer(
    failed: Measured, graph: Graph, half: _Half, golden: Golden, step: Callable[[str], None]
) -> str:
    """Error text that names the first wrong layer of an fp16 graph; empty if none stands out."""
    if failed.precision != "fp16" or half.graph is None:
        return ""
    step("first wrong layer")
    try:
        wrong = first_wrong_layer(graph, half.graph, golden.image, available_threads())
    except ExportError:
        return ""  # the comparison is a help, not a condition
    if wrong is None:
        return ""
    return (
        f"; the first wrong layer is {wrong.tensor} ({wrong.operator}), off by "
        f"{wrong.difference:.1e} of its largest value"
    )


def _encode_report(report: ParityReport, half: _Half) -> bytes:
    record = report.to_dict()
    record["fp16"] = {
        "nodes_in_fp32": list(half.in_fp32),
        "ranges": [asdict(r) for r in half.ranges],
    }
    return (json.dumps(_as_json(record), indent=2, allow_nan=False) + "\n").encode()


def _as_json(value: Any) -> Any:
    """A copy of nested values with null for numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
