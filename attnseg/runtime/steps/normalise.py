"""Intensity normalisation: one scheme per channel.

A scheme computes a `Curve`, a piecewise linear map of intensities, from the distribution of a
channel's intensities. Everything else (tables, threads, the CUDA kernels) works on curves, so a new
scheme requires one class in this module and its fields in the manifest.

Sources: the paper's section 3.3 (zero mean and unit variance per volume and modality over brain
voxels, then histogram matching to the training set). Matching is the piecewise linear landmark
method of Nyul, Udupa and Zhang, "New variants of a method of MRI scale standardization" (2000),
on z-scores, with the landmarks stored in the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Channels
from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.steps.foreground import Foreground
from attnseg.runtime.threads import in_threads

DECILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
_TABLE_LIMIT = 1 << 17  # range of 32- and 64-bit integers below which a lookup table is used
_SLAB = 16  # voxels along Z; 16 float32 are one cache line
_CHECK_FILE = "check that the right file was given"


def only_zeros() -> VolumeError:
    """Error for a channel without foreground."""
    return VolumeError("holds only zeros", _CHECK_FILE)


def constant(value: float) -> VolumeError:
    """Error for a channel whose foreground has a single value."""
    return VolumeError(f"is constant ({value:g})", _CHECK_FILE)


class Distribution(Protocol):
    """Foreground statistics of one channel, from which a scheme computes its curve.

    Attributes:
        mean: Mean intensity.
        std: Standard deviation of the intensities, positive.
    """

    mean: float
    std: float

    def percentiles(self, percent: Sequence[float]) -> NDArray[np.float64]:
        """Intensities at percentiles `percent` (0 to 100), as `numpy.percentile`."""


@dataclass(frozen=True)
class Curve:
    """Piecewise linear map of intensities, extrapolated with the slopes of the end segments.

    For constant extrapolation, repeat the target value in two knots at each end.

    Attributes:
        source: `(N,)` float64 intensities of the knots, strictly ascending.
        target: `(N,)` float64 normalised values of the knots.
    """

    source: NDArray[np.float64]
    target: NDArray[np.float64]

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Map intensities; float32 of the same shape."""
        slopes = np.diff(self.target) / np.diff(self.source)
        mapped = np.interp(values, self.source, self.target)
        mapped += slopes[0] * np.minimum(values - self.source[0], 0)
        mapped += slopes[-1] * np.maximum(values - self.source[-1], 0)
        return np.asarray(mapped, np.float32)


class Scheme(Protocol):
    """Normalisation scheme of one channel."""

    @property
    def foreground(self) -> Foreground:
        """Voxels used for the statistics; with `nonzero`, voxels of 0 remain 0."""

    @property
    def percentile_count(self) -> int:
        """Number of percentiles requested by `curve`."""

    def curve(self, distribution: Distribution) -> Curve:
        """Intensity map for a channel with this distribution."""


@dataclass(frozen=True)
class ZScore:
    """Zero mean and unit variance of the foreground.

    Attributes:
        foreground: Voxels used for the statistics; with `nonzero`, voxels of 0 remain 0.
    """

    foreground: Foreground = "nonzero"
    percentile_count = 0

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`."""
        mean, std = distribution.mean, distribution.std
        return Curve(np.array([mean, mean + std]), np.array([0.0, 1.0]))


_LARGEST_LANDMARK = 1e4  # larger than any z-score among 1e8 voxels
_EQUAL = 1e-12  # distance of percentiles that are equal, as a share of that of the outermost


@dataclass(frozen=True)
class LandmarkMatching:
    """Histogram matching: maps percentiles of the foreground to stored z-scores.

    Attributes:
        percentiles: Percentiles of the landmarks, 0 to 100, strictly ascending.
        values: Mean z-score of the training set at each percentile, strictly ascending.
        foreground: Voxels used for the statistics; with `nonzero`, voxels of 0 remain 0.

    Raises:
        ConfigError: Percentiles or values are out of range, not ascending or of different lengths.
    """

    percentiles: tuple[float, ...]
    values: tuple[float, ...]
    foreground: Foreground = "nonzero"

    def __post_init__(self) -> None:
        if len(self.values) != len(self.percentiles):
            raise ConfigError("landmarks need one value per percentile in every channel")
        if any(not 0 <= p <= 100 for p in self.percentiles):
            raise ConfigError(f"percentiles must be within 0 and 100, got {self.percentiles}")
        if any(abs(v) > _LARGEST_LANDMARK for v in self.values):
            raise ConfigError(
                f"landmarks are z-scores, at most {_LARGEST_LANDMARK:g}, got {self.values}"
            )
        for row in (self.percentiles, self.values):
            if len(row) < 2 or not (np.isfinite(row).all() and (np.diff(row) > 0).all()):
                raise ConfigError(f"landmarks must be at least two, and ascending, got {row}")

    @property
    def percentile_count(self) -> int:
        """See `Scheme.percentile_count`."""
        return len(self.percentiles)

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`."""
        source = distribution.percentiles(self.percentiles)
        # Coarsely quantised images have equal percentiles; such a run maps to its mean target.
        first = np.diff(source, prepend=-np.inf) > _EQUAL * (source[-1] - source[0])
        knots, run = source[first], np.cumsum(first) - 1
        if len(knots) < 2:
            return ZScore().curve(distribution)
        return Curve(knots, np.bincount(run, self.values) / np.bincount(run))


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
        counted = _count(channel)
        if counted is None:
            return cls.of_counts(*np.unique(channel, return_counts=True), foreground)
        return cls.of_counts(counted.values, counted.counts, foreground)

    @classmethod
    def of_counts(
        cls, values: NDArray[Any], counts: NDArray[np.int64], foreground: Foreground
    ) -> Self:
        """Histogram of ascending values and their counts; see `of`."""
        keep = counts > 0
        if foreground == "nonzero":
            keep &= values != 0
        if not keep.any():
            raise only_zeros()
        if np.count_nonzero(keep) == 1:
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


def _slabs(channel: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Slabs along Z: whole cache lines of a C-ordered result, small enough for the CPU cache."""
    for z in range(0, channel.shape[2], _SLAB):
        where = slice(z, min(z + _SLAB, channel.shape[2]))
        yield where, channel[:, :, where]


def _offsets(slab: NDArray[Any], low: int) -> NDArray[Any]:
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
            VolumeError: The foreground has fewer than two distinct values.
        """
        values = self.values
        histogram = Histogram.of_counts(values, self.counts, scheme.foreground)
        table = scheme.curve(histogram)(values)
        if scheme.foreground == "nonzero" and 0 <= -self.low < len(table):
            table[-self.low] = 0
        return table


def _count(channel: NDArray[Any]) -> Counts | None:
    """Counts of an integer channel; None for other types or too wide a range of values."""
    if channel.dtype.kind not in "iu":
        return None
    low, high = int(channel.min()), int(channel.max())
    if channel.dtype.itemsize > 2 and high - low >= _TABLE_LIMIT:
        return None
    counts = np.zeros(high - low + 1, np.int64)
    for _, slab in _slabs(channel):
        offsets = _offsets(slab.ravel(order="K"), low)
        counts += np.bincount(offsets, minlength=len(counts))
    return Counts(low, counts)


def normalise_channel(channel: NDArray[Any], scheme: Scheme, out: NDArray[np.float32]) -> None:
    """Normalise one channel.

    Integers are mapped through a lookup table, other types voxel by voxel. The results agree to
    float32 rounding.

    Args:
        channel: `(X, Y, Z)`, any real dtype, finite.
        scheme: Normalisation scheme.
        out: `(X, Y, Z)` float32 output array.

    Raises:
        VolumeError: The foreground has fewer than two distinct values.
    """
    counted = _count(channel)
    if counted is not None:
        table = counted.table(scheme)
        for where, slab in _slabs(channel):
            out[:, :, where] = np.take(table, _offsets(slab.T, counted.low)).T
        return
    distinct = np.unique(channel, return_counts=True)
    curve = scheme.curve(Histogram.of_counts(*distinct, scheme.foreground))
    for where, slab in _slabs(channel):
        out[:, :, where] = curve(slab)
        if scheme.foreground == "nonzero":
            out[:, :, where][slab == 0] = 0


@contextmanager
def naming_channel(index: int) -> Iterator[None]:
    """Prefix a `VolumeError` of one channel with the channel's 1-based position."""
    try:
        yield
    except VolumeError as error:
        raise VolumeError(f"channel {index + 1} {error.cause}", error.mend) from error


def z_score_percentiles(channels: Channels, foreground: Foreground) -> NDArray[np.float64]:
    """Deciles of the z-scores of each channel, `(C, N)`; the trainer averages them to landmarks.

    Raises:
        VolumeError: The foreground of a channel has fewer than two distinct values.
    """
    rows = []
    for index, channel in enumerate(channels):
        with naming_channel(index):
            found = Histogram.of(channel, foreground)
        rows.append((found.percentiles(DECILES) - found.mean) / found.std)
    return np.array(rows)


def normalise(
    channels: Channels, schemes: Sequence[Scheme], threads: int = 1
) -> NDArray[np.float32]:
    """Normalise all channels of a volume, cropped to the foreground box or not.

    Args:
        channels: C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`.
        schemes: One scheme per channel.
        threads: Number of channels normalised concurrently.

    Returns:
        `(C, X, Y, Z)` float32, C-contiguous.

    Raises:
        VolumeError: The foreground of a channel has fewer than two distinct values.
        ConfigError: The numbers of schemes and channels differ.
        ResourceError: No thread can be started.
    """
    if len(schemes) != len(channels):
        raise ConfigError(f"normalisation is for {len(schemes)} channels, got {len(channels)}")
    out = np.empty((len(channels), *channels[0].shape), np.float32)

    def one(index: int) -> None:
        with naming_channel(index):
            normalise_channel(channels[index], schemes[index], out[index])

    in_threads(one, range(len(channels)), threads)
    return out
