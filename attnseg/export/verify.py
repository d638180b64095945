"""The parity gate over a bundle that was made before, perhaps elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attnseg.export.checkpoint import load_trained
from attnseg.export.measure import TorchEngine, measure_engines, measure_graphs
from attnseg.export.parity import Gate, ParityReport
from attnseg.export.samples import SampleSource, make_golden, sample_windows, synthetic_sample
from attnseg.runtime.bundle import Budget, Bundle
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.errors import BundleError
from attnseg.runtime.golden import Golden, read_golden
from attnseg.runtime.segmenter import available_threads

_REPEATED = 1e-4  # torch on another processor rounds otherwise


def _reference(bundle: Bundle) -> Engine:
    """The trained network, or ONNX Runtime for a model that came as an ONNX file."""
    if bundle.has("weights"):
        return TorchEngine(load_trained(bundle.file("weights")).network)
    return OnnxRuntimeEngine(bundle.file("onnx"), "fp32", available_threads())


def _golden(bundle: Bundle, reference: Engine) -> Golden:
    """The bundle's golden window, or one made now for a bundle that is older than they are."""
    if not bundle.has("golden"):
        return make_golden(
            reference, sample_windows(bundle.manifest, synthetic_sample(bundle.manifest))
        )
    golden = read_golden(bundle)
    difference = golden.difference(reference.infer(golden.image))
    if not difference <= _REPEATED:
        raise BundleError(
            f"{bundle.folder}: the golden window's logits differ by {difference:.1e} of the "
            "largest from what its weights give: they do not belong together; export it again"
        )
    return golden


def verify_bundle(
    folder: Path,
    budget: Budget | None = None,
    samples: SampleSource | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Measure a bundle against the weights that it carries, or else its fp32 graph.

    Args:
        folder: the bundle.
        budget: None for the bundle's own, or the default where it has none.
        samples: gives the cases; None for a synthetic one.
        progress: told what is run next.

    Raises:
        BundleError: the bundle is damaged, or its golden window is not of its weights.
        EngineError: no engine is installed, or one refuses the graph.
        ExportError: an engine on a GPU gives other logits.
    """
    bundle = Bundle.load(folder)
    reference, manifest = _reference(bundle), bundle.manifest
    cases = samples(manifest) if samples else [synthetic_sample(manifest)]
    golden = _golden(bundle, reference)
    chosen = budget or manifest.budget or Budget()
    gate = Gate(bundle, reference, golden, cases, progress)
    return measure_engines(gate, bundle, measure_graphs(gate, bundle, chosen))
