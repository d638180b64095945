"""The host pipeline: every step on numpy arrays, with an engine on host arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import AxisTransform
from attnseg.runtime.options import Plan
from attnseg.runtime.pipelines.base import (
    Done,
    Pending,
    Progress,
    Segmentation,
    Staged,
    label_values,
    resampled_to_mm,
    volumes_ml,
)
from attnseg.runtime.pipelines.sliding_window import collected, sweep
from attnseg.runtime.steps.check import check_input
from attnseg.runtime.steps.cleanup import remove_small_components
from attnseg.runtime.steps.clock import StageClock, Step
from attnseg.runtime.steps.decide import check_probabilities, region_probabilities
from attnseg.runtime.steps.preprocess import Preprocessed, preprocess
from attnseg.runtime.steps.restore import Planes, placed, restored
from attnseg.runtime.steps.tta import Fusion


class HostPipeline:
    """Segments volumes on the CPU, one after the other."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan

    @property
    def engine(self) -> EngineInfo:
        """See `Pipeline.engine`."""
        return self._engine.info

    def stage(self, volume: Volume) -> Staged:
        """See `Pipeline.stage`."""
        plan, clock = self._plan, StageClock()
        with clock.stage(Step.CHECK):
            checked = check_input(volume, plan.rules, plan.threads)
        warnings = (*plan.notes, *checked.warnings)
        return Staged(checked.volume, checked.preprocessing, warnings, clock)

    def submit(
        self, staged: Staged, progress: Progress | None = None, on_device: bool = False
    ) -> Pending:
        """See `Pipeline.submit`; the result is complete on return."""
        if on_device:
            raise ConfigError(
                "labels can stay on a GPU only where the volume is segmented on it, and "
                f"{self.engine.name} runs on the CPU"
            )
        return Done(self._segment(staged, progress))

    def _segment(self, staged: Staged, progress: Progress | None) -> Segmentation:
        plan, clock = self._plan, staged.clock
        with clock.stage(Step.PREPROCESS):
            scan = preprocess(staged.volume, staged.preprocessing, plan.threads)
        found = self._decided(scan, clock, progress)
        with clock.stage(Step.CLEAN_UP):
            classes, removed = remove_small_components(found.classes, plan.min_voxels)
        with clock.stage(Step.RESTORE):
            target = staged.preprocessing.orientation_of_image(staged.volume)
            turn = AxisTransform.between(staged.volume.orientation, target)
            labels, voxels = self._labels(classes, scan, turn)
            probabilities = None
            if found.probabilities is not None:
                probabilities = placed(found.probabilities, scan.result_box, scan.shape, turn)
        return Segmentation(
            labels=labels,
            volumes_ml=volumes_ml(staged.volume, plan.task, voxels),
            elapsed_ms=clock.elapsed_ms,
            windows=found.windows,
            components_removed=removed,
            warnings=staged.warnings,
            engine=self.engine,
            resampled_to_mm=resampled_to_mm(staged, plan.preprocessing),
            probabilities=probabilities,
        )

    def _decided(
        self, scan: Preprocessed, clock: StageClock, progress: Progress | None
    ) -> _Decided:
        """Classes of the scan's result box over all passes."""
        plan = self._plan
        if plan.probabilities:
            check_probabilities(len(plan.task.regions), scan.shape)
        passes, channels = plan.transforms, plan.decision.channels
        windows = [plan.windows.plan(t.shape(scan.image.shape[1:])) for t in passes]

        def outputs(index: int) -> Iterator[NDArray[np.float32]]:
            """Parts of the logits of a pass."""

            def advance(share: float) -> None:
                if progress:
                    progress((index + share) / len(passes))

            turned = passes[index].apply(scan.image)
            return sweep(
                turned, self._engine, windows[index], plan.decision.background(), advance, clock
            )

        count = len(windows[0].windows)
        if len(passes) == 1:
            return self._decided_in_parts(outputs(0), scan, clock, count)
        fusion = Fusion(plan.fuse, plan.decision)
        for index, transform in enumerate(passes):
            logits = collected(outputs(index), channels, windows[index].shape)
            with clock.stage(Step.RESAMPLE if scan.resampled else Step.FUSE):
                parts = self._on_scan([transform.invert(logits)], scan)
                restored_logits = collected(iter(parts), channels, scan.result_box.shape)
            with clock.stage(Step.FUSE):
                fusion.add(restored_logits, scan.back)
        with clock.stage(Step.FUSE):
            found = _Decided(fusion.classes(), count)
            if plan.probabilities:
                found.probabilities = region_probabilities(fusion.probabilities, plan.task)
        return found

    def _on_scan(self, parts: Iterable[NDArray[np.float32]], scan: Preprocessed) -> Planes:
        """Logits, or probabilities if the model resamples these, of the scan's result box."""
        decision = self._plan.decision
        if scan.back == "probabilities":
            parts = (decision.activate(part) for part in parts)
        half = self._plan.windows.blending.accumulate == "half"
        return restored(parts, scan, decision.background(scan.back), half)

    def _decided_in_parts(
        self,
        parts: Iterator[NDArray[np.float32]],
        scan: Preprocessed,
        clock: StageClock,
        windows: int,
    ) -> _Decided:
        """Classes of a single pass, decided plane by plane, so that no whole logits are held."""
        plan, shape = self._plan, scan.result_box.shape
        found = _Decided(np.empty(shape, np.uint8), windows)
        if plan.probabilities:
            found.probabilities = np.empty((len(plan.task.regions), *shape), np.float32)
        start = 0
        step = Step.RESAMPLE if scan.resampled else Step.BLEND
        for part in clock.iterate(step, self._on_scan(parts, scan)):
            with clock.stage(Step.FUSE):
                where = slice(start, start + part.shape[1])
                found.classes[where] = plan.decision.classes(part, scan.back)
                if found.probabilities is not None:
                    given = part if scan.back == "probabilities" else plan.decision.activate(part)
                    found.probabilities[:, where] = region_probabilities(given, plan.task)
            start += part.shape[1]
        return found

    def _labels(
        self, classes: NDArray[np.uint8], scan: Preprocessed, turn: AxisTransform
    ) -> tuple[NDArray[np.uint8], list[int]]:
        """Labels in the volume's own grid, and the number of voxels of each class."""
        task, box = self._plan.task, scan.result_box.slices()
        labels = np.zeros(scan.shape, np.uint8, order="F")
        labels[box] = label_values(task)[classes]
        counts = np.bincount(classes.ravel(order="K"), minlength=len(task.labels))
        return turn.invert(labels), counts.tolist()


@dataclass
class _Decided:
    """Classes of the result box of a scan.

    Attributes:
        classes: `(X, Y, Z)` class indices.
        windows: Number of windows per pass.
        probabilities: `(R, X, Y, Z)` probability of each region; None unless requested.
    """

    classes: NDArray[np.uint8]
    windows: int
    probabilities: NDArray[np.float32] | None = None
