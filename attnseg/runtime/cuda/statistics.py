"""Statistics and normalisation on a device, equivalent to `attnseg.runtime.steps.normalise`.

int16 channels are counted per value and mapped by a table. float32 channels are counted twice, by
the upper and lower halves of their bits, which yields exact percentiles, and mapped by the curve.
Statistics and curves are computed in float64, also for the schemes that the host computes in
float32 as nnU-Net does (`SingleScheme`): their results differ by about 1e-6 of the largest value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.device import Device, DeviceBuffer, Region
from attnseg.runtime.cuda.kernels import Extent, LayoutArg
from attnseg.runtime.cuda.upload import DeviceChannel
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.geometry import Box, shape_of
from attnseg.runtime.steps.histogram import Counts, constant, only_zeros
from attnseg.runtime.steps.normalise import naming_channel
from attnseg.runtime.steps.schemes import Scheme, refuses_constant

HALF = 1 << 16
"""Number of values of int16, and of half the key of a float32."""
LANES = HALF
_SPREAD_BYTES = 4 * HALF * kernels.SPREAD
_BOX_BYTES = 256  # of the box of one channel, which has 6 numbers
_ZERO_KEY = 1 << 31  # key of 0.0
_INFINITE = (0x007F, 0xFF80)  # upper halves of -inf and inf; those of NaN lie beyond


@dataclass(frozen=True)
class FilledMask:
    """Voxels of a box that are not 0 in any channel, with the holes between them filled.

    Attributes:
        mask: `(X, Y, Z)` uint8 of the box on the device.
        voxels: Number of voxels of the mask.
    """

    mask: Region
    voxels: int


def statistics_bytes(channels: int) -> int:
    """Device memory that `VolumeStatistics` needs, in bytes."""
    return channels * (4 * HALF + _BOX_BYTES + 4 * HALF)


class VolumeStatistics:
    """Foreground box of a volume, counts of its channels, and their normalisation.

    Attributes:
        box: Box of the voxels that are nonzero in any channel; None if there are none.
    """

    def __init__(
        self, device: Device, channels: Sequence[DeviceChannel], memory: Region, scratch: Region
    ) -> None:
        """Count the voxels of the channels; waits for the result.

        Args:
            device: Device of the channels.
            channels: Channels of one volume.
            memory: Region of `statistics_bytes`.
            scratch: Region of `scratch_bytes`.
        """
        self._device, self._channels, self._scratch = device, channels, scratch
        number = len(channels)
        found_bytes = (4 * HALF + _BOX_BYTES) * number
        self._counts = Region.of(memory, 0, found_bytes)  # and the boxes behind them
        self._tables = Region.of(memory, found_bytes, 4 * HALF * number)
        self.box, self._found = self._look()

    def _look(self) -> tuple[Box | None, NDArray[np.int32]]:
        """Box of all nonzero voxels, None if there are none, and the counts of every channel."""
        device, number = self._device, len(self._channels)
        device.clear(self._counts)
        spread = Region.of(self._scratch, 0, _SPREAD_BYTES)
        for index, channel in enumerate(self._channels):
            device.clear(spread)
            args = kernels.ScanArgs(
                volume=channel.buffer.pointer,
                counts=spread.pointer,
                box=self._counts.pointer + 4 * HALF * number + _BOX_BYTES * index,
                shape=Extent.of(channel.memory),
            )
            groups = -(-channel.voxels // kernels.SCANNED)
            device.launch("scan_float" if channel.floating else "scan", groups, args)
            sums = kernels.SumCountsArgs(spread.pointer, self._counts.pointer + 4 * HALF * index)
            device.launch("sum_counts", HALF, sums)
        found = np.empty(self._counts.size_bytes // 4, np.int32)
        device.download(self._counts, found)  # in one copy, as each waits for the device
        counts = found[: number * HALF].reshape(number, HALF)
        boxes = found[number * HALF :].reshape(number, -1)[:, :6]
        return self._joined(boxes), counts

    def _joined(self, found: NDArray[np.int32]) -> Box | None:
        """Box of all channels, from what the scans found in memory, `(C, 6)`; None if it is empty.

        A scan gives the largest distances of a nonzero voxel from the end and from the start.
        """
        boxes = []
        for channel, (*behind, x, y, z) in zip(self._channels, found.tolist(), strict=True):
            if not x:
                continue
            first = [size - far for size, far in zip(channel.memory, behind, strict=True)]
            box = Box(shape_of(first), shape_of((x, y, z)))
            boxes.append(channel.transform.box(box, channel.memory))
        if not boxes:
            return None
        starts, stops = ([getattr(box, end) for box in boxes] for end in ("start", "stop"))
        return Box(shape_of(np.min(starts, axis=0)), shape_of(np.max(stops, axis=0)))

    def filled(self, box: Box, mask: Region, parents: Region, sizes: Region) -> FilledMask:
        """Foreground of a box with its holes filled, in `mask`; waits for the result.

        Args:
            box: Part of the volume.
            mask: Region of one byte per voxel of the box.
            parents: Region of four bytes per voxel, for the components of voxels of 0.
            sizes: Another one.
        """
        device, voxels, shape = self._device, prod(box.shape), Extent.of(box.shape)
        for index, channel in enumerate(self._channels):
            empty = kernels.EmptyArgs(
                volume=channel.buffer.pointer,
                classes=mask.pointer,
                layout=LayoutArg.of(channel.layout),
                shape=shape,
                origin=Extent.of(box.start),
                floating=int(channel.floating),
                first=int(index == 0),
            )
            device.launch("empty", voxels, empty)
        pointers = mask.pointer, parents.pointer, sizes.pointer
        labels = kernels.LabelArgs(*pointers, None, shape, min_voxels=0, faces=1)
        for name in ("label_start", "label_merge", "label_flatten"):
            device.launch(name, voxels, labels)
        number = Region.of(self._counts, 0, 4)  # the counts have been downloaded
        device.clear(number)
        args = kernels.FillArgs(parents.pointer, sizes.pointer, mask.pointer, number.pointer, shape)
        device.launch("open_border", voxels, args)
        device.launch("fill", voxels // box.shape[2], args)
        found = np.empty(1, np.int32)
        device.download(number, found)
        return FilledMask(mask, int(found[0]))

    def normalise(
        self,
        image: DeviceBuffer,
        box: Box,
        schemes: Sequence[Scheme],
        filled: FilledMask | None = None,
    ) -> None:
        """Write the normalised box, `(C, X, Y, Z)` float32.

        Args:
            image: Memory of the result.
            box: Part of the volume.
            schemes: Scheme of each channel.
            filled: Foreground of the schemes that take the filled one.

        Raises:
            VolumeError: A channel has no foreground, one value only where the scheme refuses that,
                or is not finite.
        """
        for index, (channel, scheme) in enumerate(zip(self._channels, schemes, strict=True)):
            target = image.pointer + 4 * index * prod(box.shape)
            own = filled if scheme.foreground == "filled" else None
            zeros = (own.voxels if own else prod(box.shape)) - int(self._found[index].sum())
            mapped = self._mapped(index, target, box, own)
            with naming_channel(index):
                find = self._by_curve if channel.floating else self._by_table
                args = find(index, scheme, zeros, mapped)
            kernel = "normalise_float" if channel.floating else "normalise"
            self._device.launch(kernel, prod(box.shape), args)

    def _mapped(
        self, index: int, target: int, box: Box, filled: FilledMask | None
    ) -> dict[str, Any]:
        """Arguments common to both normalisation kernels."""
        channel = self._channels[index]
        return {
            "volume": channel.buffer.pointer,
            "mask": filled.mask.pointer if filled else None,
            "image": target,
            "layout": LayoutArg.of(channel.layout),
            "shape": Extent.of(box.shape),
            "origin": Extent.of(box.start),
        }

    def _by_table(
        self, index: int, scheme: Scheme, zeros: int, mapped: dict[str, Any]
    ) -> ctypes.Structure:
        counts = self._found[index].astype(np.int64)
        counts[HALF // 2] = zeros
        present = np.flatnonzero(counts)
        if not len(present):
            raise only_zeros()
        low, high = int(present[0]), int(present[-1]) + 1  # only these are looked up
        table = Counts(low - HALF // 2, counts[low:high]).table(scheme)
        place = Region.of(self._tables, 4 * HALF * index, 4 * HALF)
        self._device.upload(table, Region.of(place, 4 * low, table.nbytes))
        return kernels.NormaliseArgs(table=place.pointer, **mapped)

    def _by_curve(
        self, index: int, scheme: Scheme, zeros: int, mapped: dict[str, Any]
    ) -> ctypes.Structure:
        nonzero = scheme.foreground == "nonzero"
        statistics = FloatStatistics(
            self._device,
            self._channels[index],
            self._found[index],
            0 if nonzero else zeros,
            self._scratch,
        )
        if refuses_constant(scheme):
            statistics.check_varied()
        curve = scheme.curve(statistics)
        knots = np.stack([curve.source, curve.target])
        place = Region.of(self._tables, 4 * HALF * index, knots.nbytes)
        self._device.upload(knots, place)
        return kernels.NormaliseFloatArgs(
            knots=place.pointer,
            count=knots.shape[1],
            keep_zero=int(nonzero),
            **mapped,
        )


def scratch_bytes(floating: bool, percentiles: int) -> int:
    """Device memory that `VolumeStatistics` needs while it computes, in bytes.

    Args:
        floating: Whether any channel is float32.
        percentiles: Largest number of percentiles of a channel.
    """
    refine = 4 * HALF * (2 * percentiles + 3) + 8 * LANES if floating else 0
    return max(_SPREAD_BYTES, refine)


class FloatStatistics:
    """Mean, standard deviation and exact percentiles of a float32 channel's foreground.

    Implements `Distribution`; each number is computed where it is requested first.

    Attributes:
        total: Number of foreground voxels.
    """

    def __init__(
        self,
        device: Device,
        channel: DeviceChannel,
        upper: NDArray[np.int32],
        zeros: int,
        scratch: Region,
    ) -> None:
        """Check that the channel is finite, and has a foreground.

        Args:
            device: Device of the channel.
            channel: The float32 channel.
            upper: `(65536,)` int32 counts of the upper key halves of nonzero voxels.
            zeros: Number of foreground voxels that are 0.
            scratch: Region of `scratch_bytes`.

        Raises:
            VolumeError: The channel has no foreground, or is not finite.
        """
        self._device, self._channel, self._scratch = device, channel, scratch
        self._zeros = zeros
        low, high = _INFINITE
        if upper[: low + 1].any() or upper[high:].any():
            raise VolumeError("holds voxels that are NaN or infinite", "replace them")
        self._upper = upper.astype(np.int64)
        self._upper[_ZERO_KEY >> 16] += self._zeros
        self.total = int(self._upper.sum())
        if not self.total:
            raise only_zeros()

    @cached_property
    def mean(self) -> float:
        """Mean of the foreground."""
        return self._sum(0.0, squared=False) / self.total

    @cached_property
    def std(self) -> float:
        """Standard deviation of the foreground."""
        squares = self._sum(self.mean, squared=True) + self._zeros * self.mean**2
        return float(np.sqrt(squares / self.total))

    def check_varied(self) -> None:
        """Raise `VolumeError` if the foreground has a single value."""
        first, last = self._ranked(np.array([0, self.total - 1]))
        if first == last:
            raise constant(float(first))

    def _sum(self, mean: float, squared: bool) -> float:
        lanes = min(LANES, self._channel.voxels)
        sums = np.empty(lanes, np.float64)
        args = kernels.MomentArgs(
            volume=self._channel.buffer.pointer,
            sums=self._scratch.pointer,
            mean=mean,
            voxels=self._channel.voxels,
            lanes=lanes,
            squared=int(squared),
        )
        self._device.launch("moment", lanes, args)
        self._device.download(self._scratch, sums)
        return float(sums.sum())

    def _ranked(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Values at 0-based ranks of the foreground in ascending order."""
        cumulative = np.cumsum(self._upper)
        halves = np.searchsorted(cumulative, ranks, side="right")
        chosen = np.unique(halves)
        lower = self._lower(chosen)
        keys = []
        for rank, half in zip(ranks.tolist(), halves.tolist(), strict=True):
            counts = lower[np.searchsorted(chosen, half)]
            before = int(cumulative[half] - self._upper[half])
            inner = int(np.searchsorted(np.cumsum(counts), rank - before, side="right"))
            keys.append(half << 16 | inner)
        return _values_of(np.array(keys, np.uint32)).astype(np.float64)

    def _lower(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts of the lower key halves for each chosen upper half, `(len(chosen), 65536)`."""
        numbers = np.full(HALF, -1, np.int32)
        numbers[chosen] = np.arange(len(chosen))
        table = Region.of(self._scratch, 0, 4 * HALF)
        found = Region.of(self._scratch, 4 * HALF, 4 * HALF * len(chosen))
        self._device.upload(numbers, table)
        self._device.clear(found)
        args = kernels.RefineArgs(self._channel.buffer.pointer, table.pointer, found.pointer)
        self._device.launch("refine", self._channel.voxels, args)
        counts = np.empty((len(chosen), HALF), np.int32)
        self._device.download(found, counts)
        lower = counts.astype(np.int64)
        lower[chosen == _ZERO_KEY >> 16, 0] += self._zeros
        return lower

    def percentiles(self, percent: Sequence[float]) -> NDArray[np.float64]:
        """Percentiles, see `attnseg.runtime.steps.histogram.Histogram.percentiles`."""
        rank = np.asarray(percent) / 100 * (self.total - 1)
        below = np.floor(rank).astype(np.int64)
        above = np.minimum(below + 1, self.total - 1)
        low, high = self._ranked(np.concatenate([below, above])).reshape(2, -1)
        return np.asarray(low + (high - low) * (rank - below))


def _values_of(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    """float32 values of keys; the inverse of `key_of` in kernels.cu."""
    positive = keys >> 31 == 1
    return np.where(positive, keys ^ np.uint32(_ZERO_KEY), ~keys).astype(np.uint32).view(np.float32)
