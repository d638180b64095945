"""Normalisation on a device: what `attnseg.runtime.normalise` does, with the same statistics.

int16 channels are counted, value by value, and mapped by a table. Floating-point channels are
counted twice by halves of their bits, which gives the exact percentiles, and mapped by the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.device import Device, DeviceBuffer, Region
from attnseg.runtime.cuda.kernels import Shape, Strided, Turn
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.normalise import (
    Curve,
    Foreground,
    Normalisation,
    curve_of,
    table_of_counts,
)
from attnseg.runtime.tta import Transform

HALF = 1 << 16
"""Values of int16, and of half a key of a float."""
LANES = HALF
_ZERO_KEY = 1 << 31  # of 0.0
_INFINITE = (0x007F, 0xFF80)  # upper halves from which on keys are of NaN or infinite numbers


@dataclass(frozen=True)
class DeviceChannel:
    """One channel on a device.

    Attributes:
        buffer: its memory, `(x, y, z)` in one piece, int16 or float32.
        memory: shape of the memory.
        turn: from the memory to the volume.
        shape: X, Y, Z of the volume.
        floating: whether it is float32.
    """

    buffer: DeviceBuffer
    memory: tuple[int, int, int]
    turn: Transform
    shape: tuple[int, int, int]
    floating: bool

    @property
    def voxels(self) -> int:
        """In all."""
        return int(np.prod(self.shape))

    @property
    def layout(self) -> Strided:
        """Where element (x, y, z) of the volume lies."""
        steps = (self.memory[1] * self.memory[2], self.memory[2], 1)
        offset, along = 0, []
        for axis in range(3):
            source = self.turn.axes[axis]
            step = steps[source]
            if axis in self.turn.flips:
                offset += step * (self.memory[source] - 1)
                step = -step
            along.append(step)
        return Strided(offset, *along)


@dataclass(frozen=True)
class Box:
    """Where the foreground lies in the volume, in voxels along X, Y and Z."""

    origin: tuple[int, int, int]
    shape: tuple[int, int, int]


def _with_zeros(counts: NDArray[np.int32], zero: int, voxels: int) -> NDArray[np.int64]:
    """Counts of all voxels from those that are not 0."""
    found = counts.astype(np.int64)
    found[zero] += voxels - int(found.sum())
    return found


def _mapped(channel: DeviceChannel, by: Region, target: int, box: Box) -> tuple[Any, ...]:
    """First arguments of the kernels that map the box of a channel by a table or a curve."""
    pointers = channel.buffer.pointer, by.pointer, target
    return (*pointers, channel.layout, Shape.of(box.shape), Shape.of(box.origin))


def scan_bytes(channels: int) -> int:
    """Device memory that `Scan` takes."""
    return channels * (4 * HALF + 4 * HALF) + 1024


class Scan:
    """The first look at a volume: its box, and the statistics of its channels."""

    def __init__(
        self, device: Device, channels: Sequence[DeviceChannel], memory: Region, scratch: Region
    ) -> None:
        """Scan the channels; waits for the result.

        Args:
            device: where they are.
            channels: of one volume.
            memory: of `scan_bytes`.
            scratch: of `refine_bytes`, if a channel is floating.
        """
        self._device, self._channels, self._scratch = device, channels, scratch
        number = len(channels)
        self._counts = Region.of(memory, 0, 4 * HALF * number)
        self._tables = Region.of(memory, 4 * HALF * number, 4 * HALF * number)
        self._box = Region.of(memory, 8 * HALF * number, 24)
        self.box, self._found = self._look()

    def _look(self) -> tuple[Box | None, NDArray[np.int32]]:
        device, far = self._device, np.iinfo(np.int32).max
        device.clear(self._counts)
        device.upload(np.array([far] * 3 + [-1] * 3, np.int32), self._box)
        for index, channel in enumerate(self._channels):
            args = kernels.ScanArgs(
                channel.buffer.pointer,
                self._counts.pointer + 4 * HALF * index,
                self._box.pointer,
                Shape.of(channel.memory),
                Turn.of(channel.turn),
            )
            device.launch("scan_float" if channel.floating else "scan", channel.voxels, args)
        counts = np.empty((len(self._channels), HALF), np.int32)
        box = np.empty((2, 3), np.int32)
        device.download(self._counts, counts)
        device.download(self._box, box)
        (ax, ay, az), (bx, by, bz) = box.tolist()
        if bx < 0:
            return None, counts
        return Box((ax, ay, az), (bx - ax + 1, by - ay + 1, bz - az + 1)), counts

    def normalise(self, image: DeviceBuffer, box: Box, normalisation: Normalisation) -> None:
        """Write the normalised box, `(C, X, Y, Z)` float32.

        Raises:
            VolumeError: a channel has no foreground, one value only, or is not finite.
        """
        for index, channel in enumerate(self._channels):
            target = image.pointer + 4 * index * int(np.prod(box.shape))
            try:
                if channel.floating:
                    self._by_curve(index, channel, target, box, normalisation)
                else:
                    self._by_table(index, channel, target, box, normalisation)
            except VolumeError as error:
                raise VolumeError(f"channel {index + 1} {error}") from error

    def _by_table(
        self,
        index: int,
        channel: DeviceChannel,
        target: int,
        box: Box,
        normalisation: Normalisation,
    ) -> None:
        counts = _with_zeros(self._found[index], HALF // 2, channel.voxels)
        present = np.flatnonzero(counts)
        low, high = int(present[0]), int(present[-1]) + 1  # only these are ever looked up
        table = table_of_counts(counts[low:high], low - HALF // 2, normalisation, index)
        place = Region.of(self._tables, 4 * HALF * index, 4 * HALF)
        self._device.upload(table, Region.of(place, 4 * low, table.nbytes))
        args = kernels.NormaliseArgs(*_mapped(channel, place, target, box))
        self._device.launch("normalise", int(np.prod(box.shape)), args)

    def _by_curve(
        self,
        index: int,
        channel: DeviceChannel,
        target: int,
        box: Box,
        normalisation: Normalisation,
    ) -> None:
        foreground = normalisation.foreground
        statistics = FloatStatistics(
            self._device, channel, self._found[index], foreground, self._scratch
        )
        curve: Curve = curve_of(statistics, normalisation.landmarks, index)
        knots = np.stack([curve.source, curve.target])
        place = Region.of(self._tables, 4 * HALF * index, knots.nbytes)
        self._device.upload(knots, place)
        how = knots.shape[1], int(foreground == "nonzero")
        args = kernels.NormaliseFloatArgs(*_mapped(channel, place, target, box), *how)
        self._device.launch("normalise_float", int(np.prod(box.shape)), args)


def refine_bytes(percentiles: int) -> int:
    """Device memory that `FloatStatistics` takes for so many percentiles."""
    return 4 * HALF * (2 * percentiles + 3) + 8 * LANES


class FloatStatistics:
    """Mean, deviation and exact percentiles of the foreground of a floating-point channel."""

    def __init__(
        self,
        device: Device,
        channel: DeviceChannel,
        upper: NDArray[np.int32],
        foreground: Foreground,
        scratch: Region,
    ) -> None:
        """Compute mean and deviation.

        Args:
            device: where the channel is.
            channel: the channel.
            upper: counts of the upper halves of the keys of voxels that are not 0.
            foreground: voxels to take.
            scratch: memory of `refine_bytes`.

        Raises:
            VolumeError: it has no foreground, one value only, or is not finite.
        """
        self._device, self._channel, self._scratch = device, channel, scratch
        low, high = _INFINITE
        if upper[: low + 1].any() or upper[high:].any():
            raise VolumeError("holds voxels that are NaN or infinite; replace them")
        self._zeros = channel.voxels - int(upper.sum()) if foreground == "all" else 0
        self._upper = upper.astype(np.int64)
        self._upper[_ZERO_KEY >> 16] += self._zeros
        self.total = int(self._upper.sum())
        if not self.total:
            raise VolumeError("holds only zeros; check that the right file was given")
        self.mean = self._sum(0.0, squared=False) / self.total
        squares = self._sum(self.mean, squared=True) + self._zeros * self.mean**2
        self.std = float(np.sqrt(squares / self.total))
        first, last = self._ranked(np.array([0, self.total - 1]))
        if first == last:
            raise VolumeError(f"holds no value but {first:g}; check that the right file was given")

    def _sum(self, mean: float, squared: bool) -> float:
        lanes = min(LANES, self._channel.voxels)
        sums = np.empty(lanes, np.float64)
        args = kernels.MomentArgs(
            self._channel.buffer.pointer,
            self._scratch.pointer,
            mean,
            self._channel.voxels,
            lanes,
            int(squared),
        )
        self._device.launch("moment", lanes, args)
        self._device.download(self._scratch, sums)
        return float(sums.sum())

    def _ranked(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values at these places in ascending order."""
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
        """Counts of the lower halves of keys with these upper halves, `(chosen, 65536)`."""
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
        """As `attnseg.runtime.normalise.Histogram.percentiles`."""
        rank = np.asarray(percent) / 100 * (self.total - 1)
        below = np.floor(rank).astype(np.int64)
        above = np.minimum(below + 1, self.total - 1)
        low, high = self._ranked(np.concatenate([below, above])).reshape(2, -1)
        return np.asarray(low + (high - low) * (rank - below))


def _values_of(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The floats of keys (`key_of` in kernels.cu)."""
    positive = keys >> 31 == 1
    return np.where(positive, keys ^ np.uint32(_ZERO_KEY), ~keys).astype(np.uint32).view(np.float32)
