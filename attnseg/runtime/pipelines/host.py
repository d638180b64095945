"""The host pipeline: every step on numpy arrays, with an engine on host arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import reorient
from attnseg.runtime.options import Plan
from attnseg.runtime.pipelines.base import (
    Done,
    Pending,
    Progress,
    Segmentation,
    Staged,
    check_classes,
    label_values,
    resampled_to_mm,
    volumes_ml,
)
from attnseg.runtime.pipelines.sliding_window import sliding_window
from attnseg.runtime.steps.check import check_input
from attnseg.runtime.steps.cleanup import remove_small_components
from attnseg.runtime.steps.clock import StageClock, Step
from attnseg.runtime.steps.preprocess import Preprocessed, preprocess
from attnseg.runtime.steps.tta import Fusion, argmax_classes


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
        classes, windows = self._classes(scan, clock, progress)
        with clock.stage(Step.CLEAN_UP):
            classes, removed = remove_small_components(classes, plan.min_voxels)
        with clock.stage(Step.RESTORE):
            labels, voxels = self._restore(classes, scan, staged.volume)
        return Segmentation(
            labels=labels,
            volumes_ml=volumes_ml(staged.volume, plan.task, voxels),
            elapsed_ms=clock.elapsed_ms,
            windows=windows,
            components_removed=removed,
            warnings=staged.warnings,
            engine=self.engine,
            resampled_to_mm=resampled_to_mm(staged, plan.preprocessing),
        )

    def _classes(
        self, scan: Preprocessed, clock: StageClock, progress: Progress | None
    ) -> tuple[NDArray[np.uint8], int]:
        """Classes of the scan's result box over all passes, and the number of windows per pass."""
        transforms = self._plan.transforms
        plans = [self._plan.windows.plan(t.shape(scan.image.shape[1:])) for t in transforms]
        fusion = Fusion(self._plan.fuse)
        for index, (transform, windows) in enumerate(zip(transforms, plans, strict=True)):

            def advance(share: float, before: int = index) -> None:
                if progress:
                    progress((before + share) / len(transforms))

            turned = transform.apply(scan.image)
            logits = sliding_window(turned, self._engine, windows, advance, clock)
            check_classes(len(logits), self._plan.task)
            logits = transform.invert(logits)
            if scan.resampled:
                with clock.stage(Step.RESAMPLE):
                    logits = scan.restore(logits)
            with clock.stage(Step.FUSE):
                if len(transforms) == 1:
                    return argmax_classes(logits), len(windows.windows)
                fusion.add(logits)
        with clock.stage(Step.FUSE):
            return fusion.classes(), len(plans[0].windows)

    def _restore(
        self, classes: NDArray[np.uint8], scan: Preprocessed, volume: Volume
    ) -> tuple[NDArray[np.uint8], list[int]]:
        """Labels in the volume's own grid, and the number of voxels of each class."""
        task, box = self._plan.task, scan.result_box.slices()
        labels = np.zeros(scan.shape, np.uint8, order="F")
        labels[box] = label_values(task)[classes]
        counts = np.bincount(classes.ravel(order="K"), minlength=len(task.labels))
        orientation = self._plan.preprocessing.orientation
        return reorient(labels, orientation, volume.orientation), counts.tolist()
