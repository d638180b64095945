"""Workspace: device memory that is reused from volume to volume, and its requirements."""

from __future__ import annotations

from collections.abc import Sequence

from attnseg.runtime.cuda.device import DeviceBuffer, Region
from attnseg.runtime.cuda.memory import (
    MemoryPlan,
    MemoryRequirements,
    explain_shortage,
    plan_memory,
    smallest_plan,
)
from attnseg.runtime.cuda.statistics import scratch_bytes, statistics_bytes
from attnseg.runtime.cuda.upload import Upload
from attnseg.runtime.engines.device import DeviceEngine
from attnseg.runtime.errors import OutOfMemoryError
from attnseg.runtime.geometry import shape_of
from attnseg.runtime.options import Plan
from attnseg.runtime.steps.windows import importance_map


def requirements(plan: Plan, engine: DeviceEngine, upload: Upload) -> MemoryRequirements:
    """Memory requirements of a volume."""
    scan, schemes = upload.scan, plan.preprocessing.normalisation
    floating = scan is not None or any(channel.floating for channel in upload.channels)
    percentiles = max(scheme.percentile_count for scheme in schemes)
    filled = scan is None and any(scheme.foreground == "filled" for scheme in schemes)
    return MemoryRequirements(
        shape=shape_of(scan.image.shape[1:]) if scan else upload.shape,
        result=scan.result_box.shape if scan and scan.resampled else None,
        channels=len(plan.task.channels),
        classes=plan.decision.channels,
        windows=plan.windows,
        transforms=plan.transforms,
        statistics_bytes=statistics_bytes(len(upload.channels)),
        scratch_bytes=scratch_bytes(floating, percentiles),
        floating=floating,
        half=engine.half,
        batches=engine.batches,
        components=plan.min_voxels > 1 or filled,
        probabilities=len(plan.task.regions) if plan.probabilities else 0,
        engine_bytes=engine.memory_bytes,
    )


class Workspace:
    """One block of device memory, reused while the memory requirements stay the same.

    Nothing is allocated before the first volume.
    """

    def __init__(self, plan: Plan, engine: DeviceEngine) -> None:
        self._options, self._engine, self._device = plan, engine, engine.device
        self._need: MemoryRequirements | None = None
        self._memory: MemoryPlan | None = None
        self._block: DeviceBuffer | None = None
        self._importance: tuple[int, ...] | None = None  # window whose map is on the device

    @property
    def memory(self) -> MemoryPlan:
        """Plan of the block."""
        assert self._memory is not None, "it was reserved"
        return self._memory

    def region(self, name: str) -> Region:
        """Region of the block by name."""
        assert self._block is not None, "it was reserved"
        return self.memory.region(self._block, name)

    def reserve(self, upload: Upload) -> None:
        """Reserve memory for a volume. If that fails, the smallest plan is tried once.

        Raises:
            OutOfMemoryError: No plan fits the limit, or not even the smallest one the device.
        """
        need = requirements(self._options, self._engine, upload)
        if need == self._need:
            return
        self._release()
        memory = plan_memory(need, self._options.engine.max_memory_bytes, self._device.free_bytes())
        try:
            self._take(need, memory)
        except OutOfMemoryError:
            self._take_smallest(need, memory)

    def shrink(self) -> bool:
        """Replace the block by that of the smallest plan; return False if it already is."""
        need, memory = self._need, self._memory
        assert need is not None and memory is not None, "it was reserved"
        if memory == smallest_plan(need):
            return False
        self._take_smallest(need, memory)
        return True

    def _release(self) -> None:
        self._need = self._memory = self._block = self._importance = None

    def _take(self, need: MemoryRequirements, memory: MemoryPlan) -> None:
        self._release()  # before the new block is allocated
        self._block = self._device.allocate(memory.block_bytes)
        self._need, self._memory = need, memory

    def _take_smallest(self, need: MemoryRequirements, tried: MemoryPlan) -> None:
        try:
            self._take(need, smallest_plan(need))
        except OutOfMemoryError as error:
            raise explain_shortage(need, tried, self._device.free_bytes()) from error
        self._device.trim()  # leave the rest to the engine

    def load_importance(self, window: Sequence[int]) -> None:
        """Upload the importance map of a window, unless it is on the device already."""
        if self._importance != tuple(window):
            weights = self._options.windows.blending.weights
            self._device.upload(importance_map(window, weights), self.region("importance"))
            self._importance = tuple(window)
