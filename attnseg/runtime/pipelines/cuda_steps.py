"""Steps of the CUDA pipeline, implemented by kernels.

The results equal those of the host pipeline: sums are computed in the same order, so equal logits
yield equal labels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.device import Region
from attnseg.runtime.cuda.kernels import (
    BlendArgs,
    DecisionArg,
    Extent,
    LayoutArg,
    Tiling,
    TransformArg,
)
from attnseg.runtime.cuda.memory import aligned
from attnseg.runtime.cuda.statistics import VolumeStatistics
from attnseg.runtime.cuda.upload import Upload
from attnseg.runtime.engines.device import DeviceEngine
from attnseg.runtime.geometry import AxisTransform, Box, Layout, Shape, shape_of
from attnseg.runtime.options import Plan
from attnseg.runtime.pipelines.cuda_results import COUNTS, NOT_FINITE, REMOVED, Results
from attnseg.runtime.pipelines.cuda_workspace import Workspace
from attnseg.runtime.steps.decide import region_channels
from attnseg.runtime.steps.foreground import no_foreground
from attnseg.runtime.steps.resample import Quantity, Sampling
from attnseg.runtime.steps.windows import WindowPlan


@dataclass(frozen=True)
class DevicePass:
    """One test-time pass over the windows that are run: all, or those that are not all zero.

    Attributes:
        transform: Transform of the image in this pass.
        plan: Windows of the transformed image.
        tiling: The plan as a kernel argument.
        windows: Indices in the plan of the windows that are run.
        which: Copy of `windows` on the device.
        places: Element of the logits at which those of each window of the plan begin, on the
            device; -1 if the window is not run.
    """

    transform: AxisTransform
    plan: WindowPlan
    tiling: Tiling
    windows: NDArray[np.int32]
    which: Region
    places: Region


class DeviceSteps:
    """Steps of one volume; every method must be called within `device.active()`."""

    def __init__(
        self, plan: Plan, engine: DeviceEngine, workspace: Workspace, upload: Upload
    ) -> None:
        """Allocate the results of a volume.

        Args:
            plan: Everything between a volume and its labels.
            engine: Engine that runs the network.
            workspace: Memory reserved for the volume.
            upload: The volume on the device.
        """
        self._plan, self._engine, self._device = plan, engine, engine.device
        self._workspace, self._memory, self._upload = workspace, workspace.memory, upload
        self._channels, self._outputs = len(plan.task.channels), plan.decision.channels
        self._box = Box.whole(upload.shape)  # of the image in the volume, or in its grid
        self._result = self._box
        self._image: Region | None = None
        self._results = Results.allocate(
            self._device, prod(upload.shape), len(plan.task.regions) if plan.probabilities else 0
        )

    def _region(self, name: str) -> Region:
        return self._workspace.region(name)

    def _launch(self, kernel: str, args: ctypes.Structure) -> None:
        """Launch a kernel with one index per voxel of the results."""
        self._device.launch(kernel, prod(self._result.shape), args)

    @property
    def _pixels(self) -> int:
        """Device address of the normalised image."""
        assert self._image is not None, "it was preprocessed"
        return self._image.pointer

    def preprocess(self) -> None:
        """Crop and normalise the volume, unless the host preprocessed it."""
        scan, image = self._upload.scan, self._upload.image
        if scan is not None and image is not None:
            shape = shape_of(scan.image.shape[1:])
            start = scan.box.start if scan.box_on_grid else (0, 0, 0)
            stop = shape_of([a + size for a, size in zip(start, shape, strict=True)])
            self._box, self._result = Box(start, stop), scan.result_box
            self._image = Region.of(image, 0, image.size_bytes)
            return
        self._image = self._region("image")
        preprocessing = self._plan.preprocessing
        regions = self._region("statistics"), self._region("scan")
        statistics = VolumeStatistics(self._device, self._upload.channels, *regions)
        if preprocessing.crop == "nonzero":
            if statistics.box is None:
                raise no_foreground()
            self._box = statistics.box
        schemes = preprocessing.normalisation
        filled = None
        if any(scheme.foreground == "filled" for scheme in schemes):
            names = ("classes", "parents", "sizes")  # not used before the windows are blended
            filled = statistics.filled(self._box, *(self._region(name) for name in names))
        statistics.normalise(self._image, self._box, schemes, filled)
        self._result = self._box

    def find_windows(self) -> list[DevicePass]:
        """Find the windows of every pass that are run; waits for the device if some may not be."""
        transforms = self._plan.transforms
        plans = [self._plan.windows.plan(t.shape(self._box.shape)) for t in transforms]
        tilings = self._tilings(plans)
        ends = np.cumsum([len(plan.windows) for plan in plans]).tolist()
        starts = [0, *ends[:-1]]
        if self._plan.windows.blending.empty_windows == "run":
            found = np.ones(ends[-1], np.int32)
        else:
            found = self._occupied(tilings, starts, ends[-1])
        places = np.full(len(found), -1, np.int64)
        passes = []
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            windows = np.flatnonzero(found[start:end]).astype(np.int32)
            places[start:end][windows] = self._logit_places(len(windows), plans[index].window)
            first = 4 * self._memory.windows * index
            which = Region.of(self._region("which"), first, windows.nbytes)
            if len(windows):
                self._device.upload(windows, which)
            passes.append(
                DevicePass(
                    transform=transforms[index],
                    plan=plans[index],
                    tiling=tilings[index],
                    windows=windows,
                    which=which,
                    places=Region.of(self._region("places"), 8 * start, 8 * (end - start)),
                )
            )
        self._device.upload(places, self._region("places"))
        return passes

    def _tilings(self, plans: list[WindowPlan]) -> list[Tiling]:
        """Window plans as kernel arguments, with their tables on the device."""
        table = [np.concatenate(plan.starts).astype(np.int32) for plan in plans]
        region = self._region("starts")
        self._device.upload(np.concatenate(table), region)
        first = np.cumsum([0, *(own.nbytes for own in table)]).tolist()
        return [
            Tiling.of(plan, region.pointer + at) for plan, at in zip(plans, first, strict=False)
        ]

    def _stride(self, window: Shape, channels: int, half: bool) -> int:
        """Elements from one batch of windows to the next."""
        kind = 2 if half else 4
        return aligned(kind * self._memory.batch * channels * prod(window)) // kind

    def _logit_places(self, count: int, window: Shape) -> NDArray[np.int64]:
        """Element at which the logits of each of `count` windows begin, `(count,)`."""
        stride = self._stride(window, self._outputs, self._memory.half_logits)
        call, slot = np.divmod(np.arange(count, dtype=np.int64), self._memory.batch)
        return np.asarray(call * stride + slot * self._outputs * prod(window))

    def _occupied(self, tilings: list[Tiling], starts: list[int], count: int) -> NDArray[np.int32]:
        """Flags of the windows of all passes, `(count,)`: 1 unless a window is all zero."""
        flags = Region.of(self._region("flags"), 0, 4 * count)
        self._device.clear(flags)
        for transform, tiling, start in zip(self._plan.transforms, tilings, starts, strict=True):
            args = kernels.OccupyArgs(
                image=self._pixels,
                occupied=flags.pointer + 4 * start,
                shape=Extent.of(self._box.shape),
                tiling=tiling,
                transform=TransformArg.of(transform),
                channels=self._channels,
            )
            rows = tiling.windows * tiling.window.x * tiling.window.y
            self._device.launch("occupy", rows, args)
        found = np.empty(count, np.int32)
        self._device.download(flags, found)
        return found

    def run_network(self, one: DevicePass) -> None:
        """Compute the logits of every window of a pass, one after another in memory.

        If windows are mirrored, their logits are averaged batch by batch.
        """
        memory, half, window = self._memory, self._engine.half, one.plan.window
        self._workspace.load_importance(window)  # first, as it may wait
        kind = 2 if half else 4
        size = kind * memory.batch * self._channels * prod(window)
        stride = kind * self._stride(window, self._channels, half)
        images = self._region("images")
        shape = (memory.batch, self._channels, *window)
        for start in range(0, len(one.windows), memory.chunk):
            count = min(memory.chunk, len(one.windows) - start)
            for which, mirror in enumerate(one.plan.blending.mirrors):
                self._gather(one, start, count, mirror)
                for first in range(0, count, memory.batch):
                    call = first // memory.batch
                    taken = Region.of(images, call * stride, size)
                    self._infer(one, taken, start // memory.batch + call, shape, which)

    def _gather(self, one: DevicePass, start: int, count: int, mirror: tuple[int, ...]) -> None:
        """Copy windows of the transformed image to the engine's input, reversed along some axes."""
        args = kernels.GatherArgs(
            image=self._pixels,
            batches=self._region("images").pointer,
            windows=one.which.pointer + 4 * start,
            stride=self._stride(one.plan.window, self._channels, self._engine.half),
            shape=Extent.of(self._box.shape),
            tiling=one.tiling,
            transform=TransformArg.of(one.transform),
            mirror=Extent.mirror(mirror),
            channels=self._channels,
            batch=self._memory.batch,
            half=int(self._engine.half),
        )
        groups = kernels.groups_along_z(one.plan.window, kernels.GATHERED)
        self._device.launch("gather", count * self._channels * groups, args)

    def _infer(
        self, one: DevicePass, images: Region, call: int, shape: tuple[int, ...], which: int
    ) -> None:
        """Run one batch of a pass, number `call`, of one of its mirrors, and store its logits."""
        memory, window, mirrors = self._memory, one.plan.window, one.plan.blending.mirrors
        kind, kept_kind = (2 if half else 4 for half in (self._engine.half, memory.half_logits))
        offset = call * self._stride(window, self._outputs, memory.half_logits)
        kept = self._region("logits").pointer + kept_kind * offset
        output = self._region("output")
        direct = not output.size_bytes  # neither converted nor averaged
        logit_bytes = kind * shape[0] * self._outputs * prod(window)
        given = (
            Region.of(self._region("logits"), kept_kind * offset, logit_bytes)
            if direct
            else Region.of(output, 0, logit_bytes)
        )
        self._engine.enqueue(images, given, shape)
        if direct:
            return
        args = kernels.AverageArgs(
            logits=given.pointer,
            sums=self._region("sums").pointer if memory.half_logits else kept,
            mean=kept,
            window=Extent.of(window),
            mirror=Extent.mirror(mirrors[which]),
            count=self._outputs,
            half=int(self._engine.half),
            half_mean=int(memory.half_logits),
            which=which,
            mirrors=len(mirrors),
        )
        self._device.launch("average", shape[0] * prod(window), args)

    def blend(self, one: DevicePass, index: int, passes: int) -> None:
        """Blend the windows of a pass, and combine the result with the previous passes.

        The last pass writes the classes. If the image was resampled, so are the logits, or the
        probabilities if the model resamples these.
        """
        grid = self._plan.preprocessing.grid
        back: Quantity = "logits" if grid is None else grid.back
        resampled = self._upload.resampled
        quantity: Quantity = back if resampled or passes == 1 else "probabilities"
        decision = DecisionArg.of(self._plan.decision, quantity)
        if resampled and back == "logits":
            decision.activation = 0  # the kernel that resamples them computes probabilities
        args = self._fusing(index, passes, decision, self._box, "logits")
        args.logits = self._region("logits").pointer
        args.importance = self._region("importance").pointer
        args.places = one.places.pointer
        args.tiling, args.transform = one.tiling, TransformArg.of(one.transform)
        args.half = int(self._memory.half_logits)
        args.half_sums = int(one.plan.blending.accumulate == "half")
        if resampled:
            args.blended = self._region("blended").pointer
        kernel, voxels = kernels.blend_kernel(self._outputs)
        turned = one.transform.shape(self._box.shape)
        self._device.launch(kernel, kernels.groups_along_z(turned, voxels), args)
        scan = self._upload.scan
        if scan is not None and scan.sampling is not None:
            self._resample(index, passes, back, scan.sampling.inverse())

    def _fusing(
        self, index: int, passes: int, decision: DecisionArg, box: Box, given: Quantity
    ) -> BlendArgs:
        """Arguments of a pass that combine its result with those of the previous passes."""
        return BlendArgs(
            scores=self._region("scores").pointer if passes > 1 else None,
            classes=self._region("classes").pointer,
            not_finite=self._results.number(NOT_FINITE),
            shape=Extent.of(box.shape),
            decision=decision,
            count=self._outputs,
            vote=int(passes > 1 and self._plan.fuse == "vote"),
            which=index,
            passes=passes,
            background=(ctypes.c_float * kernels.MOST_CLASSES)(
                *self._plan.decision.background(given)
            ),
            **self._regions(decision, given),
        )

    def _regions(self, decision: DecisionArg, given: Quantity) -> dict[str, Any]:
        """Arguments of the probabilities of regions, of values that are decided on."""
        wanted = self._results.probabilities
        if wanted is None:
            return {}
        are_logits = given == "logits" and not decision.activation
        channels = region_channels(self._plan.task).values()
        masks = [sum(1 << channel for channel in own) for own in channels]
        return {
            "probabilities": wanted.pointer,
            "region_channels": (ctypes.c_uint * kernels.MOST_CLASSES)(*masks),
            "regions": len(masks),
            "to_probabilities": kernels.ACTIVATIONS[self._plan.decision.activation]
            if are_logits
            else 0,
        }

    def probabilities(self) -> tuple[Region, Box] | None:
        """Probabilities `(R, X, Y, Z)` of the box of the results, if they are requested."""
        given = self._results.probabilities
        if given is None:
            return None
        size_bytes = 4 * len(self._plan.task.regions) * prod(self._result.shape)
        return Region(given.pointer, size_bytes, given.buffer), self._result

    def _resample(self, index: int, passes: int, back: Quantity, sampling: Sampling) -> None:
        """Resample what a pass blended to the scan's own grid, and decide there."""
        quantity: Quantity = "probabilities" if passes > 1 else back
        decision = DecisionArg.of(self._plan.decision, quantity)
        if back == "probabilities":
            decision.activation = 0  # they are probabilities already
        taps = [sampling.taps(axis) for axis in range(3)]
        first, second, share = (np.concatenate(own) for own in zip(*taps, strict=True))
        region, count = self._region("taps"), len(first)
        self._device.upload(share, region)  # first, as it has the largest alignment
        indices = np.stack([first, second]).astype(np.int32)
        self._device.upload(indices, Region.of(region, share.nbytes, indices.nbytes))
        args = kernels.ResampleArgs(
            values=self._region("blended").pointer,
            first=region.pointer + share.nbytes,
            second=region.pointer + share.nbytes + 4 * count,
            share=region.pointer,
            image=Extent.of(self._box.shape),
            start=Extent.of(self._box.start),
            half=int(self._plan.windows.blending.accumulate == "half"),
            result=self._fusing(index, passes, decision, self._result, back),
        )
        self._launch(kernels.resample_kernel(self._outputs), args)

    def clean_up(self) -> None:
        """Remove small components."""
        if self._plan.min_voxels <= 1:
            return
        args = kernels.LabelArgs(
            classes=self._region("classes").pointer,
            parents=self._region("parents").pointer,
            sizes=self._region("sizes").pointer,
            removed=self._results.number(REMOVED),
            shape=Extent.of(self._result.shape),
            min_voxels=self._plan.min_voxels,
        )
        for name in kernels.LABELLING:
            self._launch(name, args)

    def restore(self, layout: Layout) -> Results:
        """Write the labels of the whole volume.

        Args:
            layout: Layout, in the model's orientation, of the memory of the labels.
        """
        args = kernels.RestoreArgs(
            classes=self._region("classes").pointer,
            labels=self._results.labels.pointer,
            counts=self._results.number(COUNTS),
            layout=LayoutArg.of(layout),
            shape=Extent.of(self._result.shape),
            origin=Extent.of(self._result.start),
            values=(ctypes.c_ubyte * kernels.MOST_CLASSES)(*self._plan.task.label_values),
        )
        self._launch("restore", args)
        return self._results
