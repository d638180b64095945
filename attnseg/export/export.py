"""Checkpoint to bundle: export, compare every precision with torch, and only then write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg._version import __version__
from attnseg.export.card import model_card
from attnseg.export.checkpoint import TrainedModel, encode_weights, load_trained
from attnseg.export.measure import TorchEngine, measure, not_run
from attnseg.export.onnx import export_onnx
from attnseg.export.parity import (
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
from attnseg.export.samples import SampleSource, make_golden, sample_windows, synthetic_sample
from attnseg.export.sbom import bill_of_materials
from attnseg.export.tensorrt import BuildOptions, Progress, build_engine
from attnseg.runtime.bundle import (
    FORMAT_VERSION,
    Budget,
    Bundle,
    FileEntry,
    Inference,
    Label,
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

ONNX_FILE, FP16_FILE, WEIGHTS_FILE = "model.onnx", "model-fp16.onnx", "weights.safetensors"
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
        words: fields of `Description` that differ from those stored with the weights.
        signer: signs the bundle.
    """

    fp16: bool = False
    io: Literal["fp16", "fp32"] = "fp16"
    engines: tuple[BuildOptions, ...] = ()
    budget: Budget = field(default_factory=Budget)
    words: Mapping[str, str] = field(default_factory=dict)
    signer: Signer | None = None


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


def _manifest(model: TrainedModel, budget: Budget, files: _Files) -> Manifest:
    edge, description, preparation = model.patch, model.description, model.preparation
    task = preparation.task
    return Manifest(
        format="attnseg-bundle",
        format_version=FORMAT_VERSION,
        name=description.name,
        created_with=f"attnseg {__version__}",
        description=description.description,
        intended_use=description.intended_use,
        channels=task.channels,
        labels=tuple(Label(name=name, value=value) for name, value in task.labels),
        regions=dict(task.regions),
        display=task.display,
        orientation=task.orientation,
        spacing_mm=task.spacing_mm,
        grid=preparation.grid,
        normalisation=preparation.normalisation,
        inference=Inference(
            window=(edge, edge, edge),
            overlap=model.overlap,
            window_multiple=model.network.config.stride,
            min_voxels=task.min_voxels,
        ),
        network=model.network.config.to_dict(),
        training=model.training,
        validation=model.validation,
        budget=budget,
        files={name: file.entry for name, file in files.items()},
    )


def _audit(
    content: bytes, windows: NDArray[np.float32], threads: int
) -> tuple[list[TensorRange], list[str]]:
    """Ranges of all tensors, and the nodes that must stay in fp32."""
    chosen = windows[:: max(1, len(windows) // AUDIT_WINDOWS)]
    ranges = audit_ranges(content, (window[None] for window in chosen), threads)
    return ranges, nodes_at_risk(content, ranges)


def _engine_name(options: BuildOptions, precision: str) -> str:
    return f"model-{precision}-{options.target}.{options.builder}"


def _build_engines(
    content: bytes,
    precision: Precision,
    window: tuple[int, int, int],
    options: ExportOptions,
    in_fp32: Sequence[str],
    progress: ExportProgress,
) -> Iterator[tuple[str, _File]]:
    for wanted in options.engines:
        progress.step(f"{wanted.builder} engine for {wanted.target}")
        built = build_engine(content, window, wanted, tuple(in_fp32), progress.build)
        entry = file_entry("engine", built.content, precision, built.build)
        yield _engine_name(wanted, precision), _File(built.content, entry)


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
    checkpoint: Path,
    folder: Path,
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Export a checkpoint to a bundle.

    Args:
        checkpoint: `.pt` of the trainer, or `weights.safetensors` of a bundle.
        folder: the bundle to write; must not exist or be empty.
        options: what goes into it.
        samples: gives the cases that every precision is compared on; None for a synthetic one.
        progress: told what is done.

    Raises:
        TrainingError: the checkpoint cannot be read.
        ExportError: a precision is over the budget, an engine could not be built or has not
            kept its precision; nothing is written.
        EngineError: no engine is installed, or one refuses the graph; nothing is written.
        BundleError: the folder is taken or cannot be written.
    """
    check_free(folder)
    options, progress = options or ExportOptions(), progress or ExportProgress()
    threads = available_threads()
    model = load_trained(checkpoint)
    model = replace(model, description=replace(model.description, **options.words))
    reference = TorchEngine(model.network)
    progress.step("graph")
    files: _Files = {
        ONNX_FILE: _file("onnx", export_onnx(model.network), "fp32"),
        WEIGHTS_FILE: _file("weights", encode_weights(model)),
    }
    manifest = _manifest(model, options.budget, files)
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
        ranges, in_fp32 = _audit(files[ONNX_FILE].content, windows, threads)
        content = convert_to_fp16(files[ONNX_FILE].content, in_fp32, options.io)
        check_convolutions(content, in_fp32)
        files[FP16_FILE] = _file("onnx", content, "fp16")
    with tempfile.TemporaryDirectory() as scratch:
        draft = _write(Path(scratch) / "draft", manifest, files)
        report = measure(draft, reference, golden, cases, options.budget, progress.step)
    failures = report.failures()
    check_budget(report, _wrong_layer(files, failures[0], golden, threads) if failures else "")
    source = FP16_FILE if options.fp16 else ONNX_FILE
    precision: Precision = "fp16" if options.fp16 else "fp32"
    content, window = files[source].content, manifest.inference.window
    files.update(_build_engines(content, precision, window, options, in_fp32, progress))
    entries = {name: file.entry for name, file in files.items()}
    report = replace(report, not_run=not_run(entries))
    files[SBOM_FILE] = _file("sbom", bill_of_materials(manifest, entries))
    files[PARITY_FILE] = _file("parity", _encode_report(report, ranges, in_fp32))
    files[CARD_FILE] = _file("card", model_card(manifest, report).encode())
    return Exported(_write(folder, manifest, files, options.signer), report, tuple(in_fp32))


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
