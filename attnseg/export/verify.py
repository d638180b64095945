"""The parity gate applied to an existing bundle, with or without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from attnseg.export.gate.budget import make_budget
from attnseg.export.gate.measure import measure_engines, measure_graphs
from attnseg.export.gate.parity import LOGIT_TOLERANCE, Gate, ParityReport
from attnseg.export.gate.samples import SampleSource, make_golden, sample_windows, synthetic_sample
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.errors import BundleError
from attnseg.runtime.extras import missing
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.golden import Golden, read_golden
from attnseg.runtime.options import available_threads

_REPEATED = 1e-4  # tolerance: torch rounds differently on other processors


def _torch_reference(bundle: Bundle) -> Engine:
    from attnseg.export.source.checkpoint import load_trained
    from attnseg.trainer.engine import TorchEngine

    return TorchEngine(load_trained(bundle.file("weights")).network)


def _reference(bundle: Bundle) -> tuple[Engine, float, str]:
    """Reference of a bundle, its tolerance on the golden window, and a description.

    It is the trained network in PyTorch. Without PyTorch, and for a model exported from an ONNX
    file, it is the fp32 graph in ONNX Runtime.
    """
    if bundle.has("weights") and not missing(("torch", "safetensors")):
        return _torch_reference(bundle), _REPEATED, "the trained network"
    graph = OnnxRuntimeEngine(bundle.file("onnx"), "fp32", available_threads())
    if bundle.has("weights"):
        return graph, LOGIT_TOLERANCE, "the fp32 graph, as PyTorch is not installed"
    return graph, _REPEATED, "the fp32 graph"


def _golden(bundle: Bundle, reference: Engine, tolerance: float) -> tuple[Golden, str]:
    """The bundle's golden window, and how well the reference gives its logits.

    A bundle of a version without golden windows gets a new one.
    """
    if not bundle.has("golden"):
        windows = sample_windows(bundle.manifest, synthetic_sample(bundle.manifest))
        return make_golden(
            reference, windows, bundle.manifest.task
        ), "the bundle has no golden window to check it with"
    golden = read_golden(bundle)
    difference = golden.difference(reference.infer(golden.image))
    if not difference <= tolerance:
        raise BundleError(
            f"{bundle.folder}: the golden window's logits differ by {difference:.1e} of the "
            "largest from what its weights give: they do not belong together",
            "export it again",
        )
    return golden, f"within {difference:.1e} of the bundle's golden window"


def verify_bundle(
    folder: Path,
    budget_dice: float | None = None,
    budget_volume: float | None = None,
    samples: SampleSource | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compare every precision of a bundle with its reference, which the report names.

    Args:
        folder: Folder of the bundle.
        budget_dice: Largest drift of Dice; None for the bundle's budget, or the default.
        budget_volume: Largest drift of a volume, in percent; None likewise.
        samples: Source of the cases; None for a synthetic case.
        progress: Callback that receives the name of each step before it starts.

    Raises:
        ConfigError: A value of the budget is out of range.
        BundleError: The bundle is damaged, or its golden window does not match its weights.
        EngineError: No engine is installed, or one rejects the graph.
    """
    progress("bundle")
    bundle = Bundle.load(folder)
    budget = make_budget(budget_dice, budget_volume, bundle.manifest.budget)
    progress("reference")
    reference, tolerance, kind = _reference(bundle)
    manifest = bundle.manifest
    progress("cases")
    cases = samples(manifest) if samples else [synthetic_sample(manifest)]
    progress("golden window")
    golden, agreement = _golden(bundle, reference, tolerance)
    gate = Gate(bundle, reference, golden, cases, progress)
    report = measure_engines(gate, bundle, measure_graphs(gate, bundle, budget))
    return replace(report, reference=f"{report.reference} ({kind}, {agreement})")
