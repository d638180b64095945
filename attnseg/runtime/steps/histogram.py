"""Histograms of integer and other channels, from which the statistics of a scheme are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import VolumeError
from attnseg.runtime.steps.foreground import Foreground
from attnseg.runtime.steps.schemes import Scheme, refuses_constant

_TABLE_LIMIT = 1 << 17  # range of 32- and 64-bit integers below which a lookup table is used
_SLAB = 16  # voxels along Z; 16 float32 are one cache line
_CHECK_FILE = "check that the right file was given"


def only_zeros() -> VolumeError:
    """Error for a channel without foreground."""
    return VolumeError("holds only zeros", _CHECK_FILE)


def constant(value: float) -> VolumeError:
    """Error for a channel whose foreground has a single value."""
    return VolumeError(f"is constant ({value:g})", _CHECK_FILE)


class Histogram:
    """Exact distribution of the foreground of one channel; implements `Distribution`.

    Attributes:
        values: `(N,)` float64 distinct intensities, ascending.
        counts: `(N,)` int64 number of voxels of each value.
        total: Number of foreground voxels.
        mean: Mean intensity.
        std: Standard deviation of the intensities.
    """

    def __init__(self, values: NDArray[Any], counts: NDArray[np.int64]) -> None:
        """Compute the statistics of ascending `values` and the number of voxels of each."""
        self.values = values.astype(np.float64)
        self.counts = counts
        self.total = int(counts.sum())
        self.mean = float(self.values @ counts) / self.total
        self.std = float(np.sqrt((self.values - self.mean) ** 2 @ counts / self.total))

    @classmethod
    def of(cls, channel: NDArray[Any], foreground: Foreground) -> Self:
        """Histogram of a channel `(X, Y, Z)`.

        Raises:
            VolumeError: The foreground has fewer than two distinct values.
        """
        counted = count_values(channel)
        if counted is None:
            return cls.of_counts(*np.unique(channel, return_counts=True), foreground)
        return cls.of_counts(counted.values, counted.counts, foreground)

    @classmethod
    def of_counts(
        cls,
        values: NDArray[Any],
        counts: NDArray[np.int64],
        foreground: Foreground,
        varied: bool = True,
    ) -> Self:
        """Histogram of ascending values and their counts; see `of`.

        Args:
            values: `(N,)` ascending values.
            counts: `(N,)` number of voxels of each.
            foreground: Voxels to include; the counts are those of a `filled` foreground already.
            varied: Whether a single distinct value is refused.
        """
        keep = counts > 0
        if foreground == "nonzero":
            keep &= values != 0
        if not keep.any():
            raise only_zeros()
        if varied and np.count_nonzero(keep) == 1:
            raise constant(float(values[keep][0]))
        return cls(values[keep], counts[keep])

    def percentiles(self, percent: Sequence[float]) -> NDArray[np.float64]:
        """Percentiles by linear interpolation between order statistics, as `numpy.percentile`."""
        rank = np.asarray(percent) / 100 * (self.total - 1)
        below = np.floor(rank).astype(np.int64)
        cumulative = np.cumsum(self.counts)
        low = self.values[np.searchsorted(cumulative, below, side="right")]
        above = np.minimum(below + 1, self.total - 1)
        high = self.values[np.searchsorted(cumulative, above, side="right")]
        return np.asarray(low + (high - low) * (rank - below))


def slabs(channel: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Slabs along Z: whole cache lines of a C-ordered result, small enough for the CPU cache."""
    for z in range(0, channel.shape[2], _SLAB):
        where = slice(z, min(z + _SLAB, channel.shape[2]))
        yield where, channel[:, :, where]


def table_index(slab: NDArray[Any], low: int) -> NDArray[Any]:
    """Table index of each voxel, for a table that starts at the value `low`."""
    return slab if low == 0 else slab.astype(np.int64) - low


@dataclass(frozen=True)
class Counts:
    """Number of voxels of each integer value in a channel.

    Attributes:
        low: Lowest value.
        counts: `(N,)` int64 number of voxels with the values `low`, `low + 1`, and so on.
    """

    low: int
    counts: NDArray[np.int64]

    @property
    def values(self) -> NDArray[np.int64]:
        """Values of the counts, ascending, `(N,)` int64."""
        return np.arange(self.low, self.low + len(self.counts))

    def table(self, scheme: Scheme) -> NDArray[np.float32]:
        """Normalised value of each of `values`, `(N,)` float32.

        Raises:
            VolumeError: The foreground is empty, or has a single value that the scheme refuses.
        """
        values = self.values
        varied = refuses_constant(scheme)
        histogram = Histogram.of_counts(values, self.counts, scheme.foreground, varied)
        table = scheme.curve(histogram)(values)
        if scheme.foreground == "nonzero" and 0 <= -self.low < len(table):
            table[-self.low] = 0
        return table


def count_values(channel: NDArray[Any]) -> Counts | None:
    """Counts of an integer channel; None for other types or too wide a range of values."""
    if channel.dtype.kind not in "iu":
        return None
    low, high = int(channel.min()), int(channel.max())
    if channel.dtype.itemsize > 2 and high - low >= _TABLE_LIMIT:
        return None
    counts = np.zeros(high - low + 1, np.int64)
    for _, slab in slabs(channel):
        index = table_index(slab.ravel(order="K"), low)
        counts += np.bincount(index, minlength=len(counts))
    return Counts(low, counts)
