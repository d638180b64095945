"""The sliding window on a device: one upload in, one label download out.

The same steps as the numpy path (`attnseg.runtime.segmenter`), each by a kernel, and the same
result: sums are made in the same order, so equal logits give equal labels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.device import DeviceArray, DeviceBuffer, Download, Mark, Region
from attnseg.runtime.cuda.kernels import Shape, Strided, Tiling, Turn
from attnseg.runtime.cuda.memory import (
    MemoryPlan,
    Need,
    aligned,
    explain_shortage,
    explain_upload,
    least_plan,
    plan_memory,
)
from attnseg.runtime.cuda.statistics import Box, DeviceChannel, Scan
from attnseg.runtime.engines.base import DeviceEngine
from attnseg.runtime.errors import DeviceLostError, EngineError, OutOfMemoryError, VolumeError
from attnseg.runtime.executor import WindowOptions
from attnseg.runtime.normalise import Normalisation
from attnseg.runtime.tta import Fuse, Transform
from attnseg.runtime.windows import WindowPlan, importance_map

_STATE = ("not_finite", "removed")  # of one int32 each, before the counts of the classes
_STATE_NUMBERS = len(_STATE) + kernels.MOST_CLASSES


@dataclass(frozen=True)
class DeviceOptions:
    """What the executor does between scan and labels.

    Attributes:
        window: how it slides.
        transforms: one pass each.
        fuse: how passes are joined.
        min_voxels: components of a class with fewer voxels are removed.
        normalisation: of the model.
        labels: value of each class, at most 32.
        most_bytes: device memory that may be taken, or None.
    """

    window: WindowOptions
    transforms: tuple[Transform, ...]
    fuse: Fuse
    min_voxels: int
    normalisation: Normalisation
    labels: tuple[int, ...]
    most_bytes: int | None = None


@dataclass(frozen=True)
class LabelPlace:
    """An array of labels, Fortran-contiguous, and where voxels of the model's orientation go in it.

    Attributes:
        shape: X, Y, Z of the array.
        layout: of the model's orientation.
    """

    shape: tuple[int, int, int]
    layout: Strided

    @classmethod
    def plain(cls, shape: tuple[int, int, int]) -> LabelPlace:
        """In the model's orientation."""
        return cls(shape, Strided(0, 1, shape[0], shape[0] * shape[1]))


@dataclass(frozen=True)
class Uploaded:
    """A volume that is on the device, or on its way there.

    Attributes:
        channels: of the volume.
        shape: X, Y, Z in the model's orientation.
        mark: end of the upload; None if nothing was copied.
        place: where its labels go.
    """

    channels: tuple[DeviceChannel, ...]
    shape: tuple[int, int, int]
    mark: Mark | None
    place: LabelPlace


@dataclass(frozen=True)
class DeviceResult:
    """What a volume gave.

    Attributes:
        labels: `(X, Y, Z)` uint8, Fortran-contiguous; on the device if that was asked for.
        voxels: of each class but background, by class index.
        components_removed: by the clean-up.
        windows: planned of one pass; those without brain are not run.
        elapsed_ms: of the device, per stage.
        memory: what was planned of it, as `MemoryPlan.describe`.
    """

    labels: NDArray[np.uint8] | DeviceArray
    voxels: NDArray[np.int64]
    components_removed: int
    windows: int
    elapsed_ms: dict[str, float]
    memory: dict[str, int | str]


def _memory_order(
    strides: Sequence[int], shape: Sequence[int], itemsize: int
) -> tuple[Transform, tuple[int, int, int]] | None:
    """How a volume is turned out of memory in one piece, and that memory's shape; or None."""
    order = sorted(range(3), key=lambda axis: (-abs(strides[axis]), -shape[axis], axis))
    step = itemsize
    for axis in reversed(order):
        if shape[axis] > 1 and abs(strides[axis]) != step:
            return None  # a slice of something larger
        step *= shape[axis]
    source = [order.index(axis) for axis in range(3)]
    flips = tuple(axis for axis in range(3) if strides[axis] < 0 and shape[axis] > 1)
    turn = Transform("memory", (source[0], source[1], source[2]), flips)
    x, y, z = (shape[axis] for axis in order)
    return turn, (x, y, z)


def _as_taken(channel: NDArray[Any]) -> NDArray[Any]:
    """As int16 if that holds every value, else as float32."""
    if channel.dtype == np.int16 or channel.dtype == np.float32:
        return channel
    if channel.dtype.kind in "iu":
        limits = np.iinfo(np.int16)
        fits = channel.dtype.itemsize == 1
        if fits or (limits.min <= channel.min() and channel.max() <= limits.max):
            return channel.astype(np.int16, order="K")
    return channel.astype(np.float32, order="K")


@dataclass
class _Importance:
    """The window whose importance map lies on the device."""

    window: tuple[int, int, int] | None = None


class DeviceExecutor:
    """Segments volumes on one device, one after the other."""

    def __init__(self, engine: DeviceEngine, options: DeviceOptions) -> None:
        """Nothing is allocated before the first volume."""
        self._engine, self._options, self._device = engine, options, engine.device
        self._need: Need | None = None
        self._plan: MemoryPlan | None = None
        self._block: DeviceBuffer | None = None
        self._importance = _Importance()

    def upload(self, channels: Sequence[Any], place: LabelPlace | None = None) -> Uploaded:
        """Start the upload of a volume; another may be segmented meanwhile, by another thread.

        Args:
            channels: C arrays `(X, Y, Z)` of one shape, in the model's orientation; of numpy, or
                int16 or float32 in one piece on this device.
            place: where its labels go; None for an array like the channels.

        Raises:
            VolumeError: an array on the device is of another type, or not in one piece.
            EngineError: the device failed.
        """
        x, y, z = channels[0].shape
        with self._device.active():
            found = [
                self._taken(index, channel) if isinstance(channel, DeviceArray) else channel
                for index, channel in enumerate(channels)
            ]
            mark = None
            placed: list[DeviceChannel] = []
            for channel in found:
                if not isinstance(channel, DeviceChannel):
                    channel, mark = self._sent(channel)
                placed.append(channel)
        return Uploaded(tuple(placed), (x, y, z), mark, place or LabelPlace.plain((x, y, z)))

    def _taken(self, index: int, array: DeviceArray) -> DeviceChannel:
        """Someone's array on the device, as it is."""
        if array.dtype not in (np.int16, np.float32):
            raise VolumeError(
                f"channel {index + 1}: on a device, voxels must be int16 or float32, got "
                f"{array.dtype}; convert them"
            )
        order = _memory_order(array.strides, array.shape, array.dtype.itemsize)
        if order is None:
            raise VolumeError(
                f"channel {index + 1}: on a device, voxels must lie in one piece, got strides "
                f"{array.strides}; make a contiguous copy"
            )
        turn, memory = order
        back = sum(array.strides[axis] * (array.shape[axis] - 1) for axis in turn.flips)
        size = prod(array.shape) * array.dtype.itemsize
        buffer = Region(array.pointer + back, size, array.owner)
        x, y, z = array.shape
        return DeviceChannel(buffer, memory, turn, (x, y, z), array.dtype == np.float32)

    def _sent(self, channel: NDArray[Any]) -> tuple[DeviceChannel, Mark]:
        channel = _as_taken(channel)
        order = _memory_order(channel.strides, channel.shape, channel.itemsize)
        if order is None:
            channel = np.ascontiguousarray(channel)
            order = _memory_order(channel.strides, channel.shape, channel.itemsize)
        assert order is not None, "it was made contiguous"
        turn, memory = order
        x, y, z = channel.shape
        try:
            buffer, mark = self._device.upload_ahead(turn.invert(channel))
        except OutOfMemoryError as error:
            raise explain_upload(channel.nbytes, self._device.free_bytes()) from error
        return DeviceChannel(buffer, memory, turn, (x, y, z), channel.dtype == np.float32), mark

    def _needed(self, uploaded: Uploaded) -> Need:
        options, engine = self._options, self._engine
        landmarks = options.normalisation.landmarks
        return Need(
            uploaded.shape,
            len(uploaded.channels),
            len(options.labels),
            options.window,
            options.transforms,
            len(landmarks.percentiles) if landmarks else 0,
            any(channel.floating for channel in uploaded.channels),
            engine.half,
            engine.batches,
            options.min_voxels > 1,
            engine.memory_bytes,
        )

    def _prepare(self, uploaded: Uploaded) -> None:
        """Have memory for a volume. If there is not enough, the smallest batch is tried once."""
        need = self._needed(uploaded)
        if need == self._need:
            return
        self._need = self._plan = self._block = None  # freed before more is asked for
        plan = plan_memory(need, self._options.most_bytes, self._device.free_bytes())
        try:
            self._take(need, plan)
        except OutOfMemoryError:
            self._take_least(need, plan)

    def _take(self, need: Need, plan: MemoryPlan) -> None:
        self._need = self._plan = self._block = None  # freed before more is asked for
        self._importance = _Importance()
        self._block = self._device.allocate(plan.block_bytes)
        self._need, self._plan = need, plan

    def _take_least(self, need: Need, plan: MemoryPlan) -> None:
        try:
            self._take(need, least_plan(need))
        except OutOfMemoryError as error:
            raise explain_shortage(need, plan, self._device.free_bytes()) from error
        self._device.trim()  # what this leaves is for the engine

    def submit(
        self,
        uploaded: Uploaded,
        progress: Callable[[float], None] | None = None,
        on_device: bool = False,
    ) -> Submitted:
        """Segment a volume; its labels are on their way when this returns.

        Args:
            uploaded: the volume.
            progress: told the share of passes that were given to the device.
            on_device: leave the labels on the device.

        Raises:
            VolumeError: a channel has no foreground, one value only, or is not finite.
            OutOfMemoryError: the device has not enough memory.
            DeviceLostError: the device does nothing more for this process.
            EngineError: the engine or the device failed.
        """
        with self._device.active():
            self._prepare(uploaded)
            assert self._need and self._plan
            try:
                return self._run(uploaded, progress, on_device)
            except OutOfMemoryError:  # of the engine, which allocates as it runs
                if self._plan == least_plan(self._need):
                    raise
            except DeviceLostError:
                raise
            except EngineError:
                self._device.check()  # if the device is lost, that is the error to tell
                raise
            # Here the error is forgotten, and with it its hold on the memory of the first try.
            self._take_least(self._need, self._plan)
            return self._run(uploaded, progress, on_device)

    def _run(
        self, uploaded: Uploaded, progress: Callable[[float], None] | None, on_device: bool
    ) -> Submitted:
        assert self._plan is not None and self._block is not None
        run = _Run(self._engine, self._options, self._plan, self._block, self._importance)
        return run.volume(uploaded, progress, on_device)

    def segment(self, channels: Sequence[Any]) -> DeviceResult:
        """Segment one volume: `upload`, `submit` and `Submitted.result`."""
        return self.submit(self.upload(channels)).result()


@dataclass(frozen=True)
class Submitted:
    """A volume whose labels are on their way.

    Attributes:
        labels: on the device, Fortran-contiguous.
        download: of the labels; None if they stay there.
        state: download of the executor's numbers.
        marks: the end of each stage, the first the beginning.
        plan: of the memory.
        classes: of the network.
        windows: planned of one pass.
        engine: that runs the network, for messages.
        uploaded: the volume, which must live as long.
    """

    labels: DeviceArray
    download: Download | None
    state: Download
    marks: tuple[tuple[str, Mark], ...]
    plan: MemoryPlan
    classes: int
    windows: int
    engine: DeviceEngine
    uploaded: Uploaded

    def result(self) -> DeviceResult:
        """Wait for the labels; may be called by another thread than the next volume's.

        Raises:
            EngineError: the device failed, or the network's logits are not finite.
        """
        state = self.state.wait().view(np.int32)
        if state[0]:
            info = self.engine.info
            raise EngineError(
                f"engine {info.name} gave logits that are not finite in {info.precision}; try "
                "--precision fp32 or another engine"
            )
        labels: NDArray[np.uint8] | DeviceArray = self.labels
        if self.download:
            labels = self.download.wait().reshape(self.labels.shape, order="F")
        counts = state[len(_STATE) :][: self.classes].astype(np.int64)
        return DeviceResult(
            labels,
            counts,
            int(state[1]),
            self.windows,
            self._elapsed_ms(),
            self.plan.describe(),
        )

    def _elapsed_ms(self) -> dict[str, float]:
        elapsed: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self.marks, self.marks[1:], strict=False):
            elapsed[stage] = elapsed.get(stage, 0.0) + after.elapsed_ms(before)
        return elapsed


@dataclass(frozen=True)
class _Pass:
    """One pass over the windows that hold anything."""

    transform: Transform
    plan: WindowPlan
    tiling: Tiling
    windows: NDArray[np.int32]
    which: Region  # these, on the device
    places: Region  # per window of the plan, its place among these


class _Run:
    """One volume on its way through the kernels."""

    def __init__(
        self,
        engine: DeviceEngine,
        options: DeviceOptions,
        plan: MemoryPlan,
        block: DeviceBuffer,
        importance: _Importance,
    ) -> None:
        self._engine, self._options, self._plan, self._block = engine, options, plan, block
        self._importance = importance
        self._device = engine.device
        self._marks: list[tuple[str, Mark]] = []

    def _region(self, name: str) -> Region:
        return self._plan.region(self._block, name)

    def _number(self, index: int) -> int:
        """Address of one of the numbers that come back."""
        return self._state.pointer + 4 * index

    def _mark(self, stage: str) -> None:
        self._marks.append((stage, self._device.mark()))

    def volume(
        self, uploaded: Uploaded, progress: Callable[[float], None] | None, on_device: bool
    ) -> Submitted:
        """See `DeviceExecutor.submit`."""
        device = self._device
        self._mark("upload")
        if uploaded.mark:
            device.after(uploaded.mark)
        self._mark("upload")
        voxels = prod(uploaded.shape)
        # Not of the block: they may still be on their way when the next volume begins.
        given = device.allocate(aligned(voxels) + 4 * _STATE_NUMBERS)
        labels = Region.of(given, 0, voxels)
        self._state = Region.of(given, aligned(voxels), 4 * _STATE_NUMBERS)
        device.clear(given)
        box = self._normalise(uploaded)
        self._mark("normalise")
        passes = self._passes(box, len(uploaded.channels))
        self._mark("windows")
        for index in range(len(passes)):
            self._network(passes[index], box, len(uploaded.channels))
            self._mark("network")
            self._blend(passes, index, box)
            self._mark("blend")
            if progress:
                progress((index + 1) / len(passes))
        self._clean(box)
        self._mark("clean-up")
        self._paste(labels, uploaded.place, box)
        self._mark("paste")
        shape = uploaded.place.shape
        strides = (1, shape[0], shape[0] * shape[1])
        whole = DeviceArray(labels.pointer, shape, strides, np.dtype(np.uint8), labels, device)
        return Submitted(
            whole,
            None if on_device else device.download_behind(labels),
            device.download_behind(self._state),
            tuple(self._marks),
            self._plan,
            len(self._options.labels),
            len(passes[0].plan.windows),
            self._engine,
            uploaded,
        )

    def _normalise(self, uploaded: Uploaded) -> Box:
        normalisation = self._options.normalisation
        regions = self._region("scan"), self._region("refine")
        scan = Scan(self._device, uploaded.channels, *regions)
        box = scan.box
        if normalisation.foreground == "all":
            box = Box((0, 0, 0), uploaded.shape)
        elif box is None:
            raise VolumeError(
                "all voxels of all channels are zero; check that the right files were given"
            )
        scan.normalise(self._region("image"), box, normalisation)
        return box

    def _passes(self, box: Box, channels: int) -> list[_Pass]:
        """Find the windows of every pass that hold anything; waits once for all."""
        transforms = self._options.transforms
        plans = [self._options.window.plan([box.shape[a] for a in t.axes]) for t in transforms]
        numbers = [len(plan.windows) for plan in plans]
        starts = np.cumsum([0, *numbers]).tolist()
        flags = Region.of(self._region("flags"), 0, 4 * starts[-1])
        self._device.clear(flags)
        tilings = [Tiling.of(plan) for plan in plans]
        for transform, tiling, start in zip(transforms, tilings, starts, strict=False):
            args = kernels.OccupyArgs(
                self._region("image").pointer,
                flags.pointer + 4 * start,
                Shape.of(box.shape),
                tiling,
                Turn.of(transform),
                channels,
            )
            self._device.launch("occupy", prod(box.shape), args)
        found = np.empty(starts[-1], np.int32)
        self._device.download(flags, found)
        places = np.where(found > 0, 0, -1).astype(np.int32)
        result = []
        for index, (transform, plan) in enumerate(zip(transforms, plans, strict=True)):
            own = slice(starts[index], starts[index + 1])
            windows = np.flatnonzero(found[own]).astype(np.int32)
            places[own][windows] = np.arange(len(windows))
            which = Region.of(self._region("which"), 4 * self._plan.windows * index, windows.nbytes)
            place = Region.of(self._region("places"), 4 * starts[index], 4 * numbers[index])
            result.append(_Pass(transform, plan, tilings[index], windows, which, place))
            if len(windows):
                self._device.upload(windows, which)
        self._device.upload(places, self._region("places"))
        return result

    def _network(self, one: _Pass, box: Box, channels: int) -> None:
        """Logits of every window of a pass, side by side."""
        plan, classes = self._plan, len(self._options.labels)
        if self._importance.window != one.plan.window:  # before the network, for which it may wait
            self._device.upload(importance_map(one.plan.window), self._region("importance"))
            self._importance.window = one.plan.window
        window = prod(one.plan.window)
        kind = 2 if self._engine.half else 4
        image_bytes, logit_bytes = kind * channels * window, kind * classes * window
        images, logits = self._region("images"), self._region("logits")
        narrow = plan.half_logits and not self._engine.half
        for start in range(0, len(one.windows), plan.chunk):
            some = min(plan.chunk, len(one.windows) - start)
            self._gather(one, box, channels, start, some)
            for first in range(0, some, plan.batch):
                batch = plan.batch
                taken = Region.of(images, first * image_bytes, batch * image_bytes)
                place = (start + first) * logit_bytes
                given = Region.of(logits, place, batch * logit_bytes)
                if narrow:
                    given = Region.of(self._region("wide"), 0, batch * logit_bytes)
                shape = (batch, channels, *one.plan.window)
                self._engine.enqueue(taken, given, shape)
                if narrow:
                    count = batch * classes * window
                    kept = logits.pointer + place // 2
                    self._device.launch("narrow", count, kernels.NarrowArgs(given.pointer, kept))

    def _gather(self, one: _Pass, box: Box, channels: int, start: int, some: int) -> None:
        args = kernels.GatherArgs(
            self._region("image").pointer,
            self._region("images").pointer,
            one.which.pointer + 4 * start,
            Shape.of(box.shape),
            one.tiling,
            Turn.of(one.transform),
            channels,
            int(self._engine.half),
        )
        self._device.launch("gather", some * channels * prod(one.plan.window), args)

    def _blend(self, passes: list[_Pass], index: int, box: Box) -> None:
        one, several = passes[index], len(passes) > 1
        args = kernels.BlendArgs(
            self._region("logits").pointer,
            self._region("importance").pointer,
            one.places.pointer,
            None,
            self._region("scores").pointer if several else None,
            self._region("classes").pointer,
            self._number(0),
            Shape.of(box.shape),
            one.tiling,
            Turn.of(one.transform),
            len(self._options.labels),
            int(self._plan.half_logits),
            int(self._options.fuse == "vote"),
            int(index == 0),
            int(index == len(passes) - 1),
        )
        self._device.launch("blend", prod(box.shape), args)

    def _clean(self, box: Box) -> None:
        """Remove small components."""
        if self._options.min_voxels <= 1:
            return
        args = kernels.LabelArgs(
            self._region("classes").pointer,
            self._region("parents").pointer,
            self._region("sizes").pointer,
            self._number(1),
            Shape.of(box.shape),
            self._options.min_voxels,
        )
        for name in kernels.LABELLING:
            self._device.launch(name, prod(box.shape), args)

    def _paste(self, labels: Region, place: LabelPlace, box: Box) -> None:
        args = kernels.PasteArgs(
            self._region("classes").pointer,
            labels.pointer,
            self._number(len(_STATE)),
            place.layout,
            Shape.of(box.shape),
            Shape.of(box.origin),
            (ctypes.c_ubyte * kernels.MOST_CLASSES)(*self._options.labels),
        )
        self._device.launch("paste", prod(box.shape), args)
