"""The parity gate: every precision must segment as the trained network does in fp32.

Compared are the logits of the golden window and, on whole cases, what a user reads off the
result: Dice, HD95 and volume of every region. What is over the budget is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from attnseg.export.precision import open_session, simulate_fp16, with_all_tensors
from attnseg.export.samples import Sample
from attnseg.runtime.bundle import Budget, Bundle, Manifest
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.errors import EngineError, ExportError
from attnseg.runtime.golden import Golden
from attnseg.runtime.segmenter import Segmenter, SegmentOptions
from attnseg.trainer.metrics import dice, hd95_mm

LOGIT_TOLERANCE = 1e-3  # of fp32 logits, as a share of the largest: no other arithmetic is meant
_LEAST_ML = 1.0  # smaller volumes are compared with this: a voxel more is no drift of theirs


@dataclass(frozen=True)
class Drift:
    """How far one region of one case is from what the reference gives.

    Attributes:
        case: name.
        region: name.
        dice: change of the Dice score against the truth; without truth, what is missing to a
            Dice of 1 against the reference.
        hd95_mm: change of the HD95 against the truth; without truth, HD95 to the reference.
        volume_percent: change of the volume, in percent of the reference's, of 1 ml at least.
    """

    case: str
    region: str
    dice: float
    hd95_mm: float
    volume_percent: float

    def within(self, budget: Budget) -> bool:
        """Whether Dice and volume are within the budget."""
        return self.dice <= budget.dice and self.volume_percent <= budget.volume_percent


@dataclass(frozen=True)
class Measured:
    """One precision, run by one engine.

    Attributes:
        precision: of the arithmetic.
        engine: name and version.
        gated: whether the budget holds for it; it does not for what the bundle has no file of.
        logits: largest difference on the golden window, as a share of the largest logit.
        labels: share of the golden window's voxels whose most likely class differs.
        drifts: per case and region.
    """

    precision: str
    engine: str
    gated: bool
    logits: float
    labels: float
    drifts: tuple[Drift, ...]

    def within(self, budget: Budget) -> bool:
        """Whether every drift is within the budget, and fp32 logits are those of the reference."""
        equal = self.precision != "fp32" or self.logits <= LOGIT_TOLERANCE
        return equal and all(drift.within(budget) for drift in self.drifts)


@dataclass(frozen=True)
class NotRun:
    """One precision that no engine of this machine could run, and why."""

    precision: str
    engine: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """An engine to measure, by the precision that it computes in."""

    precision: str
    engine: Engine
    gated: bool = True


class SimulatedFp16:
    """Runs an fp16 graph as a GPU does, on the processor: every tensor is rounded to fp16."""

    def __init__(self, content: bytes, threads: int) -> None:
        self._session = open_session(simulate_fp16(content), threads)
        self._input = self._session.get_inputs()[0].name
        self.info = EngineInfo("simulated by onnxruntime", ort.__version__, "fp16", "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        return np.asarray(self._session.run(None, {self._input: batch})[0], np.float32)


def _volume_drift(found: int, expected: int, voxel_ml: float) -> float:
    return 100 * abs(found - expected) * voxel_ml / max(expected * voxel_ml, _LEAST_ML)


def _drifts(
    manifest: Manifest,
    sample: Sample,
    found: NDArray[np.uint8],
    expected: NDArray[np.uint8],
) -> Iterator[Drift]:
    spacing_mm = sample.volume.spacing_mm
    voxel_ml = float(abs(np.linalg.det(sample.volume.affine[:3, :3]))) / 1000
    for region, values in manifest.regions.items():
        ours, theirs = np.isin(found, values), np.isin(expected, values)
        voxels = int(np.count_nonzero(ours)), int(np.count_nonzero(theirs))
        if sample.truth is None:
            overlap, distance = 1 - dice(ours, theirs), hd95_mm(ours, theirs, spacing_mm)
        else:
            truth = np.isin(sample.truth, values)
            overlap = abs(dice(ours, truth) - dice(theirs, truth))
            distance = abs(hd95_mm(ours, truth, spacing_mm) - hd95_mm(theirs, truth, spacing_mm))
        yield Drift(
            sample.name,
            region,
            round(overlap, 6),
            round(distance, 4),
            round(_volume_drift(*voxels, voxel_ml), 4),
        )


class Gate:
    """Compares engines with the reference on a golden window and on cases."""

    def __init__(
        self,
        bundle: Bundle,
        reference: Engine,
        golden: Golden,
        samples: Sequence[Sample],
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Segment the cases with the reference.

        Args:
            bundle: how its models are run.
            reference: the trained network in fp32.
            golden: window that the logits are compared on.
            samples: cases.
            progress: told what is done next.
        """
        self._bundle, self._golden, self._samples = bundle, golden, samples
        self._progress = progress or (lambda _: None)
        info = reference.info
        self.reference = f"{info.name} {info.version} {info.precision}"
        self._expected = [self._segment(reference, sample) for sample in samples]

    def _segment(self, engine: Engine, sample: Sample) -> NDArray[np.uint8]:
        self._progress(f"{engine.info.name} {engine.info.precision}: {sample.name}")
        segmenter = Segmenter(self._bundle, SegmentOptions(), engine)
        labels: NDArray[np.uint8] = segmenter.segment(sample.volume).labels
        return labels

    def measure(self, candidate: Candidate) -> Measured:
        """Run a candidate on the golden window and the cases."""
        engine, manifest = candidate.engine, self._bundle.manifest
        logits = engine.infer(self._golden.image).copy()
        if logits.shape != self._golden.logits.shape:
            raise EngineError(
                f"{engine.info.name} gives logits of shape {logits.shape}, the trained network "
                f"{self._golden.logits.shape}"
            )
        drifts: list[Drift] = []
        for sample, expected in zip(self._samples, self._expected, strict=True):
            # Overflown logits have no labels: as far off as can be.
            finite = np.isfinite(logits).all()
            found = self._segment(engine, sample) if finite else np.zeros_like(expected)
            drifts += _drifts(manifest, sample, found, expected)
        return Measured(
            candidate.precision,
            f"{engine.info.name} {engine.info.version}",
            candidate.gated,
            self._golden.difference(logits),
            self._golden.disagreement(logits),
            tuple(drifts),
        )


@dataclass(frozen=True)
class ParityReport:
    """What the gate found.

    Attributes:
        reference: what all is compared with.
        budget: for each case and region.
        measured: what ran here.
        not_run: what did not, and why.
    """

    reference: str
    budget: Budget
    measured: tuple[Measured, ...]
    not_run: tuple[NotRun, ...]

    def failures(self) -> list[Measured]:
        """What is over the budget and must not be written."""
        return [m for m in self.measured if m.gated and not m.within(self.budget)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in `parity.json`."""
        return {
            "reference": self.reference,
            "budget": self.budget.model_dump(),
            "measured": [
                {**asdict(m), "within_budget": m.within(self.budget)} for m in self.measured
            ],
            "not_run": [asdict(n) for n in self.not_run],
        }


def describe_failure(measured: Measured, budget: Budget) -> str:
    """The worst of what is over the budget, in a line."""
    over = [drift for drift in measured.drifts if not drift.within(budget)]
    if not over:
        return (
            f"its fp32 logits differ by {measured.logits:.1e} of the largest, more than "
            f"{LOGIT_TOLERANCE:.0e}"
        )
    worst = max(over, key=lambda d: max(d.dice / budget.dice, d.volume_percent))
    return (
        f"{worst.region} of {worst.case} drifts by {worst.dice:.4f} Dice and "
        f"{worst.volume_percent:.2f} % volume (budget {budget.dice:g} and "
        f"{budget.volume_percent:g} %)"
    )


@dataclass(frozen=True)
class LayerError:
    """How far one tensor of a graph is from the same tensor in fp32.

    Attributes:
        tensor: name.
        operator: that gives it.
        difference: largest, as a share of the tensor's largest magnitude in fp32.
    """

    tensor: str
    operator: str
    difference: float


def compare_layers(
    exact: bytes, rounded: onnx.ModelProto, window: NDArray[np.float32], threads: int
) -> list[LayerError]:
    """Compare the tensors that two graphs have in common, in the order of the nodes.

    Args:
        exact: the fp32 graph.
        rounded: the other; its input is fp32.
        window: `(B, C, X, Y, Z)`.
        threads: of the processor.
    """
    source = with_all_tensors(onnx.load_from_string(exact))
    operators = {o: node.op_type for node in source.graph.node for o in node.output if o}
    sessions = [open_session(m, threads) for m in (source, with_all_tensors(rounded))]
    values = []
    for session in sessions:
        names = [o.name for o in session.get_outputs()]
        found = session.run(None, {session.get_inputs()[0].name: window})
        values.append(dict(zip(names, found, strict=True)))
    errors = []
    for name, operator in operators.items():
        if name in values[1]:
            expected, got = values[0][name], values[1][name].astype(np.float32)
            scale = float(np.abs(expected).max()) or 1.0
            with np.errstate(invalid="ignore"):
                difference = float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max()) / scale
            errors.append(LayerError(name, operator, difference))
    return errors


def first_wrong_layer(errors: Sequence[LayerError]) -> LayerError | None:
    """The first tensor whose error is more than ten times what came before it, if there is one."""
    before = 1e-3  # what one rounding to fp16 may cost
    for error in errors:
        if not error.difference <= 10 * before:
            return error
        before = max(before, error.difference)
    return None


def check_budget(report: ParityReport, advice: str = "") -> None:
    """Refuse what is over the budget.

    Raises:
        ExportError: something is.
    """
    if failures := report.failures():
        worst = failures[0]
        raise ExportError(
            f"{worst.precision} by {worst.engine} is over the budget: "
            f"{describe_failure(worst, report.budget)}{advice}; no bundle was written"
        )
