"""The parity gate: every precision must segment like the trained network in fp32.

It compares the logits of the golden window and, on whole cases, the Dice, HD95 and volume of
every region. What exceeds the budget is judged by `budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from attnseg.evaluation.metrics import dice, hd95_mm
from attnseg.export.gate.samples import Sample
from attnseg.export.graphs.fp16 import open_session, simulate_fp16
from attnseg.export.graphs.graph import Graph
from attnseg.runtime.engines.base import Engine, EngineInfo, reason_of
from attnseg.runtime.errors import EngineError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.golden import Golden
from attnseg.runtime.model.manifest import Budget, Manifest
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.segmenter import Segmenter
from attnseg.runtime.steps.decide import Decision

_FINITE = float(np.finfo(np.float64).max)
LOGIT_TOLERANCE = 1e-3  # for fp32 logits, as a share of the largest logit
_LEAST_ML = 1.0  # divisor for smaller volumes, where single voxels would dominate


@dataclass(frozen=True)
class Drift:
    """Drift of one region of one case from the result of the reference.

    Attributes:
        case: Name of the case.
        region: Name of the region.
        dice: Absolute change of Dice against the ground truth; without ground truth, one minus
            the Dice against the reference.
        hd95_mm: Absolute change of HD95 against the ground truth; without ground truth, HD95
            against the reference.
        volume_percent: Absolute change of the volume, in percent of the reference's volume or
            of 1 ml, whichever is larger.
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
    """Result of one precision on one engine.

    Attributes:
        precision: Precision of the arithmetic.
        engine: Name and version of the engine.
        gated: Whether the budget applies; it does not to a mode without a file in the bundle.
        logits: Largest difference on the golden window, as a share of the largest logit.
        labels: Share of the golden window's voxels whose most likely class differs.
        drifts: Drifts by case and region.
        file: Name of the bundle's file that the engine ran.
        failure: Reason that it was not compared on cases; empty if it was.
    """

    precision: str
    engine: str
    gated: bool
    logits: float
    labels: float
    drifts: tuple[Drift, ...]
    file: str = ""
    failure: str = ""

    def within(self, budget: Budget) -> bool:
        """Whether every drift is within the budget, and its logits are finite.

        In fp32 they must be within `LOGIT_TOLERANCE` too.
        """
        if self.failure or not self.logits <= (
            LOGIT_TOLERANCE if self.precision == "fp32" else _FINITE
        ):
            return False
        return all(drift.within(budget) for drift in self.drifts)


@dataclass(frozen=True)
class NotRun:
    """One precision and engine that could not run on this machine, with the reason."""

    precision: str
    engine: str
    reason: str


class SimulatedFp16:
    """Engine that simulates fp16 on the processor by rounding every tensor to fp16."""

    def __init__(self, half: Graph, threads: int) -> None:
        """Open the simulation of an fp16 graph."""
        self._session = open_session(simulate_fp16(half), threads)
        self._input = self._session.get_inputs()[0].name
        self.info = EngineInfo("simulated by onnxruntime", ort.__version__, "fp16", "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        try:
            return np.asarray(self._session.run(None, {self._input: batch})[0], np.float32)
        except Exception as error:  # its exceptions share no base but Exception
            raise EngineError(f"the fp16 graph cannot be simulated ({reason_of(error)})") from error


def _volume_drift(found: int, expected: int, voxel_ml: float) -> float:
    return 100 * abs(found - expected) * voxel_ml / max(expected * voxel_ml, _LEAST_ML)


def _drifts(
    manifest: Manifest,
    sample: Sample,
    found: NDArray[np.uint8],
    expected: NDArray[np.uint8],
) -> Iterator[Drift]:
    spacing_mm, voxel_ml = sample.volume.spacing_mm, sample.volume.voxel_ml
    for region, values in manifest.task.regions.items():
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
    """Comparison of engines with the reference on a golden window and on cases.

    Attributes:
        reference: Name, version and precision of the reference engine.
        step: Callback that receives the name of each step before it starts.
    """

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
            bundle: Bundle whose manifest defines preprocessing and inference.
            reference: Engine of the trained network in fp32.
            golden: Window that the logits are compared on.
            samples: Cases that the segmentations are compared on.
            progress: Callback that receives the name of each step before it starts.
        """
        self._bundle, self._golden, self._samples = bundle, golden, samples
        self.step = progress or (lambda _: None)
        info = reference.info
        self.reference = f"{info.name} {info.version} {info.precision}"
        self._expected = [self._segment(reference, sample) for sample in samples]

    def _segment(self, engine: Engine, sample: Sample) -> NDArray[np.uint8]:
        self.step(f"{engine.info.name} {engine.info.precision}: {sample.name}")
        bundle = self._bundle
        if sample.phantom:
            manifest = replace(bundle.manifest, foreground_ml=None)
            bundle = replace(bundle, manifest=manifest)
        # Mirror images of windows are more runs of the same network.
        segmenter = Segmenter(bundle, SegmentOptions(tta="none"), engine)
        labels: NDArray[np.uint8] = segmenter.segment(sample.volume).labels
        return labels

    def measure(
        self, engine: Engine, precision: str, gated: bool = True, file: str = ""
    ) -> Measured:
        """Run an engine on the golden window and the cases.

        Args:
            engine: Engine to measure.
            precision: Precision that it computes in.
            gated: Whether the budget applies to it.
            file: Name of the bundle's file that it runs.

        Raises:
            EngineError: The logits have another shape than the reference's, or the engine fails.
        """
        manifest = self._bundle.manifest
        logits = engine.infer(self._golden.image).copy()
        if logits.shape != self._golden.logits.shape:
            raise EngineError(
                f"{engine.info.name} gives logits of shape {logits.shape}, the trained network "
                f"{self._golden.logits.shape}"
            )
        drifts: list[Drift] = []
        for sample, expected in zip(self._samples, self._expected, strict=True):
            # Logits that overflowed yield no labels: count everything as background.
            finite = np.isfinite(logits).all()
            found = self._segment(engine, sample) if finite else np.zeros_like(expected)
            drifts += _drifts(manifest, sample, found, expected)
        return Measured(
            precision=precision,
            engine=f"{engine.info.name} {engine.info.version}",
            gated=gated,
            logits=self._golden.difference(logits),
            labels=self._golden.disagreement(logits, Decision.of(manifest.task)),
            drifts=tuple(drifts),
            file=file,
        )


@dataclass(frozen=True)
class ParityReport:
    """Results of the parity gate.

    Attributes:
        reference: Name, version and precision of the reference engine.
        budget: Largest drift of each case and region.
        measured: Results of the precisions that ran on this machine.
        not_run: Precisions that did not run, with the reasons.
        left_out: Sentences on the files that the bundle was written without.
        notes: Sentences on what the export changed in the model.
    """

    reference: str
    budget: Budget
    measured: tuple[Measured, ...]
    not_run: tuple[NotRun, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def failures(self) -> list[Measured]:
        """Results that exceed the budget."""
        return [m for m in self.measured if m.gated and not m.within(self.budget)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in `parity.json`."""
        return {
            "reference": self.reference,
            "budget": asdict(self.budget),
            "measured": [
                {**asdict(m), "within_budget": m.within(self.budget)} for m in self.measured
            ],
            "not_run": [asdict(n) for n in self.not_run],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }
