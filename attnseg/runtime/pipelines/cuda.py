"""The CUDA pipeline: one upload of the volume, every step on the device, one label download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume, check_affine
from attnseg.runtime.cuda.device import DeviceArray, Download, Mark
from attnseg.runtime.cuda.kernels import MOST_CLASSES
from attnseg.runtime.cuda.memory import MemoryPlan
from attnseg.runtime.cuda.upload import Upload, device_arrays, upload, upload_image
from attnseg.runtime.engines.base import EngineInfo, not_finite
from attnseg.runtime.engines.device import DeviceEngine
from attnseg.runtime.errors import (
    DeviceLostError,
    EngineError,
    OutOfMemoryError,
    Setting,
    VolumeError,
)
from attnseg.runtime.geometry import AxisTransform, Box, Layout
from attnseg.runtime.options import Plan
from attnseg.runtime.pipelines.base import (
    Pending,
    Progress,
    Segmentation,
    Staged,
    resampled_to_mm,
    volumes_ml,
)
from attnseg.runtime.pipelines.cuda_results import Outcome, Results
from attnseg.runtime.pipelines.cuda_steps import DeviceSteps
from attnseg.runtime.pipelines.cuda_workspace import Workspace
from attnseg.runtime.steps.check import (
    Checked,
    InputRules,
    check_channel_count,
    check_input,
    check_strict,
    choose_grid,
)
from attnseg.runtime.steps.clock import StageClock, Step
from attnseg.runtime.steps.decide import check_probabilities
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.restore import placed
from attnseg.runtime.steps.schemes import Range


def missing_kernel(plan: Plan) -> str | None:
    """Step of a plan that has no kernel; None if all have one.

    A plan without one uses the host pipeline, and only its network runs on the device.
    """
    decision, schemes = plan.decision, plan.preprocessing.normalisation
    most = max(len(plan.task.labels), decision.channels, len(decision.outputs))
    regions = len(plan.task.regions) if plan.probabilities else 0
    steps = {
        f"more than {MOST_CLASSES} classes": most > MOST_CLASSES,
        f"probabilities of more than {MOST_CLASSES} regions": regions > MOST_CLASSES,
        "moments of a range": any(isinstance(s, Range) and s.moments for s in schemes),
    }
    return next((step for step, needed in steps.items() if needed), None)


class LostBeforeError(DeviceLostError):
    """The device had been lost before this volume was tried."""


@dataclass(frozen=True)
class CudaStaged(Staged):
    """A checked volume that is being uploaded to the device.

    Attributes:
        upload: The volume on the device.
    """

    upload: Upload


class Timeline:
    """Marks at the end of each step on the device."""

    def __init__(self, engine: DeviceEngine) -> None:
        self._device = engine.device
        self._marks: list[tuple[Step, Mark]] = [(Step.UPLOAD, self._device.mark())]

    def mark(self, step: Step) -> None:
        """Mark the end of a step."""
        self._marks.append((step, self._device.mark()))

    def elapsed_ms(self) -> dict[str, float]:
        """Device time of each step in milliseconds; waits for the last step."""
        elapsed: dict[str, float] = {}
        for (_, before), (step, after) in zip(self._marks, self._marks[1:], strict=False):
            elapsed[str(step)] = elapsed.get(str(step), 0.0) + after.elapsed_ms(before)
        return elapsed


def _on_device(volume: Volume, rules: InputRules) -> Checked:
    """Check of a volume whose voxels are on the device, and cannot be looked at or resampled."""
    check_affine("volume", volume.affine)
    preprocessing, resampled = choose_grid(volume, replace(rules, resample="never"))
    warnings = (*volume.warnings, *resampled)
    check_strict(warnings, rules)
    return Checked(volume, preprocessing, warnings)


class CudaPipeline:
    """Segments volumes on one device, one after the other.

    Attributes:
        lost: Error that made the device unusable for this process, or None.
    """

    def __init__(self, engine: DeviceEngine, plan: Plan) -> None:
        """Create the pipeline; it allocates nothing before the first volume."""
        self._engine, self._plan, self._device = engine, plan, engine.device
        self._workspace = Workspace(plan, engine)
        self.lost: DeviceLostError | None = None

    @property
    def engine(self) -> EngineInfo:
        """See `Pipeline.engine`."""
        return self._engine.info

    def stage(self, volume: Volume) -> Staged:
        """See `Pipeline.stage`. Arrays on the device are neither copied nor checked there.

        The host preprocesses a volume that is resampled, or may be, and its image is uploaded.

        Raises:
            VolumeError: Arrays on the device would have to be resampled.
        """
        self._refuse_if_lost()
        clock = StageClock()
        with self._noting_loss():
            with clock.stage(Step.CHECK):
                check_channel_count(volume, self._plan.task)
                arrays = device_arrays(self._device, volume)
                rules, threads = self._plan.rules, self._plan.threads
                checked = (
                    check_input(volume, rules, threads)
                    if arrays is None
                    else _on_device(volume, rules)
                )
            warnings = (*self._plan.notes, *checked.warnings)
            if self._is_resampled(checked):
                return self._stage_resampled(checked, arrays is not None, warnings, clock)
            with clock.stage(Step.UPLOAD):
                given: Any = arrays or checked.volume.channels
                sent = upload(self._device, given, self._transform(volume), threads)
        return CudaStaged(checked.volume, checked.preprocessing, warnings, clock, sent)

    def _stage_resampled(
        self, checked: Checked, on_device: bool, warnings: tuple[str, ...], clock: StageClock
    ) -> CudaStaged:
        """Preprocess a volume on the host, and start the upload of its image."""
        if on_device:
            raise VolumeError(
                "channels on a GPU are not resampled to the grid of the model",
                "give arrays on the host",
            )
        with clock.stage(Step.PREPROCESS):
            scan = preprocess(checked.volume, checked.preprocessing, self._plan.threads)
        with clock.stage(Step.UPLOAD):
            sent = upload_image(self._device, scan)
        return CudaStaged(checked.volume, checked.preprocessing, warnings, clock, sent)

    def _is_resampled(self, checked: Checked) -> bool:
        """Whether a volume is not on the grid of the model, or on one that depends on its box."""
        preprocessing, volume = checked.preprocessing, checked.volume
        grid = preprocessing.grid
        if grid is None:
            return False
        if grid.shape is not None or (grid.alignment == "centres" and preprocessing.crop != "all"):
            return True
        turn = self._transform(volume)
        shape, affine = turn.shape(volume.shape), volume.affine @ turn.matrix(volume.shape)
        spacing_mm = [volume.spacing_mm[axis] for axis in turn.axes]
        return grid.sampling(shape, spacing_mm, affine).changes

    def submit(
        self, staged: Staged, progress: Progress | None = None, on_device: bool = False
    ) -> Pending:
        """See `Pipeline.submit`. If memory runs out, the smallest batch is tried once."""
        self._refuse_if_lost()
        assert isinstance(staged, CudaStaged), "it was staged by this pipeline"
        if self._plan.probabilities:
            check_probabilities(len(self._plan.task.regions), staged.volume.shape)
        with self._noting_loss(), self._device.active():
            self._workspace.reserve(staged.upload)
            try:
                return self._enqueue(staged, progress, on_device)
            except OutOfMemoryError as error:  # raised by the engine, which allocates while it runs
                shortage = error.detached()
            except DeviceLostError:
                raise
            except EngineError:
                self._device.check()  # raises DeviceLostError instead, if the device is lost
                raise
            # Here the error is released, and with it the memory of the first attempt.
            if not self._workspace.shrink():
                raise shortage
            return self._enqueue(staged, progress, on_device)

    def _enqueue(self, staged: CudaStaged, progress: Progress | None, on_device: bool) -> Pending:
        """Enqueue every step of a volume on the device."""
        timeline = Timeline(self._engine)
        for mark in staged.upload.marks:
            self._device.after(mark)
        timeline.mark(Step.UPLOAD)
        steps = DeviceSteps(self._plan, self._engine, self._workspace, staged.upload)
        steps.preprocess()
        if staged.upload.scan is None:  # otherwise the host did it
            timeline.mark(Step.PREPROCESS)
        passes = steps.find_windows()
        timeline.mark(Step.WINDOWS)
        for index, one in enumerate(passes):
            steps.run_network(one)
            timeline.mark(Step.NETWORK)
            steps.blend(one, index, len(passes))
            timeline.mark(Step.BLEND)
            if progress:
                progress((index + 1) / len(passes))
        steps.clean_up()
        timeline.mark(Step.CLEAN_UP)
        results = steps.restore(self._label_layout(staged.volume))
        timeline.mark(Step.RESTORE)
        maps = steps.probabilities()
        return CudaPending(
            pipeline=self,
            staged=staged,
            labels=self._label_array(staged.volume, results),
            download=None if on_device else self._device.download_behind(results.labels),
            numbers=self._device.download_behind(results.numbers),
            maps=maps and (self._device.download_behind(maps[0]), maps[1]),
            timeline=timeline,
            windows=len(passes[0].plan.windows),
            memory=self._workspace.memory,
        )

    def _label_layout(self, volume: Volume) -> Layout:
        """Layout, in the model's orientation, of labels stored in the volume's orientation."""
        return self._transform(volume).layout(Layout.fortran(volume.shape))

    def _transform(self, volume: Volume) -> AxisTransform:
        """Transform from a volume's orientation to the model's."""
        target = self._plan.preprocessing.orientation_of_image(volume)
        return AxisTransform.between(volume.orientation, target)

    def _label_array(self, volume: Volume, results: Results) -> DeviceArray:
        layout = Layout.fortran(volume.shape)
        return DeviceArray(
            pointer=results.labels.pointer,
            shape=layout.shape,
            strides=layout.strides,
            dtype=np.dtype(np.uint8),
            owner=results.labels,
            device=self._device,
        )

    def finish(self, pending: CudaPending) -> Segmentation:
        """Wait for the result of a volume; see `Pending.result`."""
        staged, task = pending.staged, self._plan.task
        with staged.clock.stage(Step.DOWNLOAD), self._noting_loss():
            outcome = Outcome.of(pending.numbers.wait(), len(task.labels))
            if not outcome.finite:
                raise not_finite(self.engine)
            labels: NDArray[np.uint8] | DeviceArray = pending.labels
            if pending.download:
                labels = pending.download.wait().reshape(staged.volume.shape, order="F")
            elapsed_ms = pending.timeline.elapsed_ms()
            probabilities = self._placed(pending)
        return Segmentation(
            labels=labels,
            volumes_ml=volumes_ml(staged.volume, task, outcome.voxels.tolist()),
            elapsed_ms=staged.clock.elapsed_ms | elapsed_ms,
            windows=pending.windows,
            components_removed=outcome.components_removed,
            warnings=staged.warnings,
            engine=self.engine,
            memory=pending.memory.describe() | {"recorded": self._engine.recorded},
            resampled_to_mm=resampled_to_mm(staged, self._plan.preprocessing),
            probabilities=probabilities,
        )

    def _placed(self, pending: CudaPending) -> NDArray[np.float32] | None:
        """Probabilities in the volume's own grid, on the host."""
        if pending.maps is None:
            return None
        (download, box), volume = pending.maps, pending.staged.volume
        turn = self._transform(volume)
        found = download.wait().view(np.float32).reshape(-1, *box.shape)
        return placed(found, box, turn.shape(volume.shape), turn)

    @contextmanager
    def _noting_loss(self) -> Iterator[None]:
        try:
            yield
        except DeviceLostError as error:
            self.lost = self.lost or error.detached()
            raise

    def _refuse_if_lost(self) -> None:
        if self.lost:
            raise LostBeforeError(
                f"not tried, as {self.lost.cause}",
                "run it again in a new process, or with {}",
                Setting("fallback", "cpu"),
            )


@dataclass(frozen=True, kw_only=True)
class CudaPending:
    """A volume that is being segmented.

    Attributes:
        pipeline: Pipeline that segments the volume.
        staged: The staged volume, referenced until the work has ended.
        labels: Labels on the device, Fortran-contiguous.
        download: Download of the labels; None if they stay on the device.
        numbers: Download of the numbers of `Outcome`.
        maps: Download of the probabilities of the regions, and their box in the turned volume;
            None if they are not requested.
        timeline: Marks at the end of each step.
        windows: Number of windows planned per pass.
        memory: Plan of the device memory.
    """

    pipeline: CudaPipeline
    staged: CudaStaged
    labels: DeviceArray
    download: Download | None
    numbers: Download
    maps: tuple[Download, Box] | None
    timeline: Timeline
    windows: int
    memory: MemoryPlan

    def result(self) -> Segmentation:
        """See `Pending.result`."""
        return self.pipeline.finish(self)
