"""Model to bundle: export, compare every precision with the model, and only then write."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.export.card import model_card
from attnseg.export.measure import measure_engines, measure_graphs
from attnseg.export.parity import (
    Gate,
    Measured,
    ParityReport,
    check_budget,
    compare_layers,
    first_wrong_layer,
)
from attnseg.export.precision import (
    TensorRange,
    audit_ranges,
    check_convolutions,
    convert_to_fp16,
    nodes_at_risk,
    simulate_fp16,
)
from attnseg.export.quantise import quantise
from attnseg.export.samples import (
    SampleSource,
    calibration_windows,
    make_golden,
    sample_windows,
    synthetic_sample,
)
from attnseg.export.sbom import bill_of_materials
from attnseg.export.source import ONNX_FILE, open_source
from attnseg.export.tensorrt import BuildOptions, Progress
from attnseg.export.worker import build_apart
from attnseg.runtime.bundle import (
    Budget,
    Bundle,
    FileEntry,
    Manifest,
    Precision,
    Role,
    check_free,
    file_entry,
    write_bundle,
)
from attnseg.runtime.golden import Golden, encode_golden
from attnseg.runtime.segmenter import available_threads
from attnseg.runtime.signature import Signer

FP16_FILE, INT8_FILE, WEIGHTS_FILE = "model-fp16.onnx", "model-int8.onnx", "weights.safetensors"
GOLDEN_FILE, PARITY_FILE, CARD_FILE = "golden.npz", "parity.json", "README.md"
SBOM_FILE = "sbom.cdx.json"
AUDIT_WINDOWS = 8  # of the first sample


@dataclass(frozen=True)
class ExportOptions:
    """What goes into a bundle besides the fp32 graph and the weights.

    Attributes:
        fp16: an fp16 graph too.
        io: type of the fp16 graph's input and output.
        engines: TensorRT engines to build, from the fp16 graph if there is one.
        budget: that every file has to keep.
        words: name, description and intended use that differ from those stored with the model.
        signer: signs the bundle.
        spec: what the runtime has to know of an ONNX file.
        calibration: scans for an int8 graph.
    """

    fp16: bool = False
    io: Literal["fp16", "fp32"] = "fp16"
    engines: tuple[BuildOptions, ...] = ()
    budget: Budget = field(default_factory=Budget)
    words: Mapping[str, str] = field(default_factory=dict)
    signer: Signer | None = None
    spec: Path | None = None
    calibration: Path | None = None


@dataclass(frozen=True)
class ExportProgress:
    """Listeners: `step` is told what comes next, `build` how far an engine is."""

    step: Callable[[str], None] = lambda _: None
    build: Progress | None = None


@dataclass(frozen=True)
class _File:
    content: bytes
    entry: FileEntry


_Files = dict[str, _File]


def _file(role: Role, content: bytes, precision: Precision | None = None) -> _File:
    return _File(content, file_entry(role, content, precision))


def _audit(
    content: bytes, windows: NDArray[np.float32], threads: int
) -> tuple[list[TensorRange], list[str]]:
    """Ranges of all tensors, and the nodes that must stay in fp32."""
    chosen = windows[:: max(1, len(windows) // AUDIT_WINDOWS)]
    ranges = audit_ranges(content, (window[None] for window in chosen), threads)
    return ranges, nodes_at_risk(content, ranges)


def _engine_name(options: BuildOptions, precision: str) -> str:
    later = "plus" if options.compatibility == "ampere+" else ""
    return f"model-{precision}-{options.target}{later}.{options.builder}"


def _log_without_times(text: str) -> str:
    """A build log that is the same each time, as the bundle's bytes are."""
    return re.sub(r"\d[\d.e+-]* ?(?=(?:seconds|ms)\b)", "- ", text)


def _build_engines(
    files: _Files,
    window: tuple[int, int, int],
    options: ExportOptions,
    in_fp32: Sequence[str],
    progress: ExportProgress,
) -> _Files:
    """Engines from every graph of less than fp32, or from fp32 if it is the only one."""
    graphs = [file for file in files.values() if file.entry.role == "onnx"]
    chosen = [graph for graph in graphs if graph.entry.precision != "fp32"] or graphs
    built: _Files = {}
    for graph, wanted in product(chosen, options.engines):
        progress.step(f"{wanted.builder} engine for {wanted.target}")
        engine = build_apart(graph.content, window, wanted, tuple(in_fp32), progress.build)
        name = _engine_name(wanted, str(graph.entry.precision))
        entry = file_entry("engine", engine.content, graph.entry.precision, engine.build)
        built[name] = _File(engine.content, entry)
        built[f"{name}.log"] = _file("log", _log_without_times(engine.log).encode())
    return built


def _wrong_layer(files: _Files, failed: Measured, golden: Golden, threads: int) -> str:
    """In words: the first layer of an fp16 graph that is wrong, if one stands out."""
    if failed.precision != "fp16":
        return ""
    errors = compare_layers(
        files[ONNX_FILE].content, simulate_fp16(files[FP16_FILE].content), golden.image, threads
    )
    wrong = first_wrong_layer(errors)
    if wrong is None:
        return ""
    return (
        f"; the first wrong layer is {wrong.tensor} ({wrong.operator}), off by "
        f"{wrong.difference:.1e} of its largest value"
    )


@dataclass(frozen=True)
class Exported:
    """What an export gave.

    Attributes:
        bundle: as written.
        report: of the parity gate.
        in_fp32: nodes of the fp16 graph that stayed in fp32.
    """

    bundle: Bundle
    report: ParityReport
    in_fp32: tuple[str, ...]


def export_bundle(
    model: Path,
    folder: Path,
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Export a model to a bundle.

    Args:
        model: `.pt` of the trainer, `weights.safetensors` of a bundle, or `.onnx` (which needs
            `options.spec`).
        folder: the bundle to write; must not exist or be empty.
        options: what goes into it.
        samples: gives the cases that every precision is compared on; None for a synthetic one.
        progress: told what is done.

    Raises:
        ConfigError: options contradict each other, or the spec breaks a rule.
        TrainingError: the checkpoint cannot be read.
        ExportError: the ONNX file cannot be exported, a precision is over the budget, an engine
            could not be built or has not kept its precision; nothing is written.
        EngineError: no engine is installed, or one refuses the graph; nothing is written.
        BundleError: the folder is taken or cannot be written.
    """
    check_free(folder)
    options, progress = options or ExportOptions(), progress or ExportProgress()
    threads = available_threads()
    progress.step("graph")
    source = open_source(model, options.spec, options.words, options.budget)
    manifest, reference = source.manifest, source.reference
    files: _Files = {ONNX_FILE: _file("onnx", source.graph, "fp32")}
    if source.weights is not None:
        files[WEIGHTS_FILE] = _file("weights", source.weights)
    phantom = synthetic_sample(manifest)
    cases = samples(manifest) if samples else [phantom]
    # The golden window travels in the bundle, so it never shows a patient.
    golden = make_golden(reference, sample_windows(manifest, phantom))
    windows = sample_windows(manifest, cases[0] if cases else phantom)
    files[GOLDEN_FILE] = _file("golden", encode_golden(golden))
    ranges: list[TensorRange] = []
    in_fp32: list[str] = []
    if options.fp16:
        progress.step("range audit")
        ranges, in_fp32 = _audit(source.graph, windows, threads)
        content = convert_to_fp16(source.graph, in_fp32, options.io)
        check_convolutions(content, in_fp32)
        files[FP16_FILE] = _file("onnx", content, "fp16")
    if options.calibration:
        progress.step("calibration")
        scans = calibration_windows(options.calibration, manifest)
        files[INT8_FILE] = _file("onnx", quantise(source.graph, scans), "int8")
    with tempfile.TemporaryDirectory() as scratch:
        draft = _write(Path(scratch) / "graphs", manifest, files)
        gate = Gate(draft, reference, golden, cases, progress.step)
        report = measure_graphs(gate, draft, options.budget)
        _refuse_failures(report, files, golden, threads)
        files |= _build_engines(files, manifest.inference.window, options, in_fp32, progress)
        whole = _write(Path(scratch) / "engines", manifest, files)
        report = measure_engines(gate, whole, report)
        _refuse_failures(report, files, golden, threads)
    entries = {name: file.entry for name, file in files.items()}
    files[SBOM_FILE] = _file("sbom", bill_of_materials(manifest, entries))
    files[PARITY_FILE] = _file("parity", _encode_report(report, ranges, in_fp32))
    files[CARD_FILE] = _file("card", model_card(manifest, report).encode())
    return Exported(_write(folder, manifest, files, options.signer), report, tuple(in_fp32))


def _refuse_failures(report: ParityReport, files: _Files, golden: Golden, threads: int) -> None:
    failures = report.failures()
    check_budget(report, _wrong_layer(files, failures[0], golden, threads) if failures else "")


def _write(folder: Path, manifest: Manifest, files: _Files, signer: Signer | None = None) -> Bundle:
    named = manifest.model_copy(update={"files": {n: f.entry for n, f in files.items()}})
    contents = {name: file.content for name, file in files.items()}
    return write_bundle(folder, named, contents, signer.sign if signer else None)


def _encode_report(
    report: ParityReport, ranges: Sequence[TensorRange], in_fp32: Sequence[str]
) -> bytes:
    record = report.to_dict()
    record["fp16"] = {
        "nodes_in_fp32": list(in_fp32),
        "ranges": [asdict(r) for r in ranges],
    }
    return (json.dumps(record, indent=2) + "\n").encode()
