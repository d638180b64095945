"""The parity gate applied to an existing bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attnseg.export.gate.measure import measure_engines, measure_graphs
from attnseg.export.gate.parity import Gate, ParityReport
from attnseg.export.gate.samples import SampleSource, make_golden, sample_windows, synthetic_sample
from attnseg.export.options import make_budget
from attnseg.export.source.checkpoint import load_trained
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.errors import BundleError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.golden import Golden, read_golden
from attnseg.runtime.options import available_threads
from attnseg.trainer.engine import TorchEngine

_REPEATED = 1e-4  # tolerance: torch rounds differently on other processors


def _reference(bundle: Bundle) -> Engine:
    """The trained network, or ONNX Runtime for a model exported from an ONNX file."""
    if bundle.has("weights"):
        return TorchEngine(load_trained(bundle.file("weights")).network)
    return OnnxRuntimeEngine(bundle.file("onnx"), "fp32", available_threads())


def _golden(bundle: Bundle, reference: Engine) -> Golden:
    """The bundle's golden window, or a new one for a bundle of a version without golden windows."""
    if not bundle.has("golden"):
        return make_golden(
            reference, sample_windows(bundle.manifest, synthetic_sample(bundle.manifest))
        )
    golden = read_golden(bundle)
    difference = golden.difference(reference.infer(golden.image))
    if not difference <= _REPEATED:
        raise BundleError(
            f"{bundle.folder}: the golden window's logits differ by {difference:.1e} of the "
            "largest from what its weights give: they do not belong together",
            "export it again",
        )
    return golden


def verify_bundle(
    folder: Path,
    budget_dice: float | None = None,
    budget_volume: float | None = None,
    samples: SampleSource | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compare every precision of a bundle with its weights, or else with its fp32 graph.

    Args:
        folder: Folder of the bundle.
        budget_dice: Largest drift of Dice; None for the bundle's budget, or the default.
        budget_volume: Largest drift of a volume, in percent; None likewise.
        samples: Source of the cases; None for a synthetic case.
        progress: Callback that receives the name of the next step.

    Raises:
        ConfigError: A value of the budget is out of range.
        BundleError: The bundle is damaged, or its golden window does not match its weights.
        EngineError: No engine is installed, or one rejects the graph.
        ExportError: An engine on a GPU computes different logits on the golden window.
    """
    bundle = Bundle.load(folder)
    budget = make_budget(budget_dice, budget_volume, bundle.manifest.budget)
    reference, manifest = _reference(bundle), bundle.manifest
    cases = samples(manifest) if samples else [synthetic_sample(manifest)]
    golden = _golden(bundle, reference)
    gate = Gate(bundle, reference, golden, cases, progress)
    return measure_engines(gate, bundle, measure_graphs(gate, bundle, budget))
