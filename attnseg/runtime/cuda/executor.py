"""The sliding window on a device: one upload in, one label download out.

The same steps as the numpy path (`attnseg.runtime.segmenter`), each by a kernel, and the same
result: sums are made in the same order, so equal logits give equal labels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.device import Device, DeviceBuffer
from attnseg.runtime.cuda.kernels import Shape, Strided, Turn
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.executor import WindowOptions
from attnseg.runtime.normalise import Normalisation, table_of_counts
from attnseg.runtime.tta import Fuse, Transform
from attnseg.runtime.windows import WindowPlan, importance_map

_VALUES = 1 << 16  # of int16
_FAR = np.iinfo(np.int32).max


class DeviceEngine(Protocol):
    """Runs the network on device memory. The executor owns both buffers."""

    @property
    def batch(self) -> int:
        """Windows that one call takes."""

    @property
    def half(self) -> bool:
        """Whether it takes and gives fp16; otherwise fp32."""

    def enqueue(self, images: DeviceBuffer, logits: DeviceBuffer, window: Sequence[int]) -> None:
        """Run one batch after all work that the device was given before.

        Args:
            images: `(batch, C, x, y, z)`; read only.
            logits: `(batch, K, x, y, z)`; written.
            window: x, y, z.

        Raises:
            EngineError: it failed.
        """


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
    """

    window: WindowOptions
    transforms: tuple[Transform, ...]
    fuse: Fuse
    min_voxels: int
    normalisation: Normalisation
    labels: tuple[int, ...]


@dataclass(frozen=True)
class DeviceResult:
    """What a volume gave.

    Attributes:
        labels: `(X, Y, Z)` uint8, Fortran-contiguous.
        voxels: of each class but background, by class index.
        components_removed: by the clean-up.
        windows: run, over all passes.
    """

    labels: NDArray[np.uint8]
    voxels: NDArray[np.int64]
    components_removed: int
    windows: int


def _placed(view: NDArray[Any]) -> tuple[NDArray[Any], Strided]:
    """The memory of a flipped or permuted array in one piece, and where its elements lie there."""
    steps = [stride // view.itemsize for stride in view.strides]
    forward = view[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]
    order = sorted(range(3), key=lambda axis: -forward.strides[axis])
    flat = forward.transpose(order)
    if not flat.flags.c_contiguous:  # a slice of something larger
        return _placed(np.ascontiguousarray(view))
    offset = sum(-s * (n - 1) for s, n in zip(steps, view.shape, strict=True) if s < 0)
    return flat.reshape(-1), Strided(offset, *steps)


class DeviceExecutor:
    """Segments volumes on one device, one after the other."""

    def __init__(self, device: Device, engine: DeviceEngine, options: DeviceOptions) -> None:
        """Nothing is allocated before the first volume."""
        self._device, self._engine, self._options = device, engine, options

    def _uploaded(self, array: NDArray[Any]) -> DeviceBuffer:
        buffer = self._device.allocate(array.nbytes)
        self._device.upload(array, buffer)
        return buffer

    def _zeros(self, size_bytes: int) -> DeviceBuffer:
        buffer = self._device.allocate(size_bytes)
        self._device.clear(buffer)
        return buffer

    def _downloaded(self, buffer: DeviceBuffer, shape: Any, kind: Any) -> NDArray[Any]:
        array = np.empty(shape, kind)
        self._device.download(buffer, array)
        return array

    def _image(
        self, channels: Sequence[NDArray[np.int16]]
    ) -> tuple[DeviceBuffer, tuple[int, int, int], tuple[int, int, int]]:
        """The normalised box `(C, X, Y, Z)`, its shape, and its origin in the volume."""
        device, normalisation = self._device, self._options.normalisation
        shape = channels[0].shape
        placed = [_placed(channel) for channel in channels]
        volumes = [self._uploaded(flat) for flat, _ in placed]
        counts = [self._zeros(4 * _VALUES) for _ in channels]
        box = self._uploaded(np.array([_FAR] * 3 + [-1] * 3, np.int32))
        for volume, count, (flat, layout) in zip(volumes, counts, placed, strict=True):
            pointers = (volume.pointer, count.pointer, box.pointer)
            args = kernels.ScanArgs(*pointers, layout, Shape.of(shape))
            device.launch("scan", flat.size, args)
        low, high = self._downloaded(box, (2, 3), np.int32)
        if normalisation.foreground == "all":
            low, high = np.zeros(3, int), np.array(shape) - 1
        elif high[0] < 0:
            raise VolumeError(
                "all voxels of all channels are zero; check that the right files were given"
            )
        size = [int(n) for n in high - low + 1]
        image = device.allocate(4 * len(channels) * int(np.prod(size)))
        for index, (volume, count) in enumerate(zip(volumes, counts, strict=True)):
            found = self._downloaded(count, _VALUES, np.int32).astype(np.int64)
            table = self._uploaded(table_of_counts(found, -(_VALUES // 2), normalisation, index))
            target = image.pointer + 4 * index * int(np.prod(size))
            normalise = kernels.NormaliseArgs(
                volume.pointer,
                table.pointer,
                target,
                placed[index][1],
                Shape.of(size),
                Shape.of([int(n) for n in low]),
            )
            device.launch("normalise", int(np.prod(size)), normalise)
        return image, (size[0], size[1], size[2]), (int(low[0]), int(low[1]), int(low[2]))

    def _occupied(
        self, image: DeviceBuffer, shape: Any, channels: int, transform: Transform, plan: WindowPlan
    ) -> NDArray[np.int32]:
        """Starts of the windows that hold anything, `(windows, 3)`."""
        starts = np.array([window.start for window in plan.windows], np.int32)
        flags, places = self._zeros(4 * len(starts)), self._uploaded(starts)
        args = kernels.OccupyArgs(
            image.pointer,
            flags.pointer,
            places.pointer,
            Shape.of(shape),
            Shape.of(plan.pad_before),
            Shape.of(plan.window),
            Turn.of(transform),
            channels,
            len(starts),
        )
        self._device.launch("occupy", int(np.prod(shape)), args)
        keep = self._downloaded(flags, len(starts), np.int32) > 0
        return np.ascontiguousarray(starts[keep])

    def _pass(
        self, image: DeviceBuffer, shape: Any, channels: int, transform: Transform
    ) -> tuple[DeviceBuffer, DeviceBuffer, WindowPlan, int]:
        """Blended logits and weights of the turned, padded image, its plan, and windows run."""
        device, engine = self._device, self._engine
        classes = len(self._options.labels)
        plan = self._options.window.plan([shape[axis] for axis in transform.axes])
        starts = self._occupied(image, shape, channels, transform, plan)
        importance = self._uploaded(importance_map(plan.window))
        voxels, padded = int(np.prod(plan.window)), int(np.prod(plan.padded_shape))
        blended, weights = self._zeros(4 * classes * padded), self._zeros(4 * padded)
        kind = 2 if engine.half else 4
        batch = self._zeros(kind * engine.batch * channels * voxels)
        logits = device.allocate(kind * engine.batch * classes * voxels)
        for first in range(0, len(starts), engine.batch):
            some = np.ascontiguousarray(starts[first : first + engine.batch])
            places = self._uploaded(some)
            gather = kernels.GatherArgs(
                image.pointer,
                batch.pointer,
                places.pointer,
                Shape.of(shape),
                Shape.of(plan.pad_before),
                Shape.of(plan.window),
                Turn.of(transform),
                channels,
                int(engine.half),
            )
            device.launch("gather", len(some) * channels * voxels, gather)
            engine.enqueue(batch, logits, plan.window)
            blend = kernels.BlendArgs(
                logits.pointer,
                importance.pointer,
                blended.pointer,
                weights.pointer,
                places.pointer,
                Shape.of(plan.padded_shape),
                Shape.of(plan.window),
                len(some),
                classes,
                int(engine.half),
            )
            device.launch("blend", padded, blend)
        return blended, weights, plan, len(starts)

    def _classes(self, image: DeviceBuffer, shape: Any, channels: int) -> tuple[DeviceBuffer, int]:
        """Class per voxel of the box over all passes, and windows run."""
        options, count = self._options, len(self._options.labels)
        voxels, windows = int(np.prod(shape)), 0
        found = self._device.allocate(voxels)
        several = len(options.transforms) > 1
        scores = self._zeros(4 * count * voxels) if several else None
        for transform in options.transforms:
            blended, weights, plan, run = self._pass(image, shape, channels, transform)
            windows += run
            fuse = kernels.FuseArgs(
                blended.pointer,
                weights.pointer,
                scores.pointer if scores else None,
                None if scores else found.pointer,
                Shape.of(shape),
                Shape.of(plan.padded_shape),
                Shape.of(plan.pad_before),
                Turn.of(transform),
                count,
                int(options.fuse == "vote"),
            )
            self._device.launch("fuse", voxels, fuse)
        if scores:
            decide = kernels.DecideArgs(scores.pointer, found.pointer, voxels, count)
            self._device.launch("decide", voxels, decide)
        return found, windows

    def _clean(self, classes: DeviceBuffer, shape: Any) -> int:
        """Remove small components; how many."""
        if self._options.min_voxels <= 1:
            return 0
        voxels = int(np.prod(shape))
        parents, sizes = (self._device.allocate(4 * voxels) for _ in range(2))
        removed = self._zeros(4)
        args = kernels.LabelArgs(
            classes.pointer,
            parents.pointer,
            sizes.pointer,
            removed.pointer,
            Shape.of(shape),
            self._options.min_voxels,
        )
        for name in ("label_start", "label_merge", "label_count", "label_remove"):
            self._device.launch(name, voxels, args)
        return int(self._downloaded(removed, 1, np.int32)[0])

    def segment(self, channels: Sequence[NDArray[np.int16]]) -> DeviceResult:
        """Segment one volume.

        Args:
            channels: C arrays `(X, Y, Z)` int16 of one shape, in the model's orientation.

        Raises:
            VolumeError: a channel has no foreground, or one value only.
            EngineError: the engine or the device failed.
        """
        shape = channels[0].shape
        image, box, origin = self._image(channels)
        classes, windows = self._classes(image, box, len(channels))
        removed = self._clean(classes, box)
        labels, counts = self._zeros(int(np.prod(shape))), self._zeros(4 * kernels.MOST_CLASSES)
        paste = kernels.PasteArgs(
            classes.pointer,
            labels.pointer,
            counts.pointer,
            Strided(0, 1, shape[0], shape[0] * shape[1]),
            Shape.of(box),
            Shape.of(origin),
            (ctypes.c_ubyte * kernels.MOST_CLASSES)(*self._options.labels),
        )
        self._device.launch("paste", int(np.prod(box)), paste)
        found = self._downloaded(labels, shape[::-1], np.uint8).T
        voxels = self._downloaded(counts, kernels.MOST_CLASSES, np.int32).astype(np.int64)
        return DeviceResult(found, voxels[: len(self._options.labels)], removed, windows)
