"""Intensity normalisation: one scheme per channel.

A scheme computes a `Curve`, a piecewise linear map of intensities, from the distribution of a
channel's intensities. Everything else (tables, threads, the CUDA kernels) works on curves, so a new
scheme requires one class in this module and its fields in the manifest.

Sources: the paper's section 3.3 (zero mean and unit variance per volume and modality over brain
voxels, then histogram matching to the training set). Matching is the piecewise linear landmark
method of Nyul, Udupa and Zhang, "New variants of a method of MRI scale standardization" (2000),
on z-scores, with the landmarks stored in the bundle. The schemes of other trainers are nnU-Net's
`ZScoreNormalization` and `CTNormalization`, and MONAI's `NormalizeIntensity` and
`ScaleIntensityRange`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Channels
from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.steps.foreground import Foreground, filled_foreground
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
    """Foreground statistics of one channel, from which a scheme computes its curve."""

    @property
    def mean(self) -> float:
        """Mean intensity."""

    @property
    def std(self) -> float:
        """Standard deviation of the intensities."""

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
        """Voxels used for the statistics; those outside keep their values."""

    @property
    def percentile_count(self) -> int:
        """Number of percentiles requested by `curve`."""

    def curve(self, distribution: Distribution) -> Curve:
        """Intensity map for a channel with this distribution."""


Single = NDArray[np.float32]
Statistics = Literal["double", "single"]
"""Arithmetic of mean and standard deviation: float64 sums, or float32 sums as in nnU-Net."""


@runtime_checkable
class SingleScheme(Protocol):
    """A scheme computed voxel by voxel in float32, in the order of operations of its source."""

    @property
    def foreground(self) -> Foreground:
        """See `Scheme.foreground`."""

    def function(self, foreground: Single) -> Callable[[Single], Single]:
        """Intensity map for a channel with these foreground voxels `(N,)`."""


def refuses_constant(scheme: Scheme) -> bool:
    """Whether a scheme is undefined for a foreground of a single value."""
    return not isinstance(scheme, SingleScheme)


@dataclass(frozen=True)
class ZScore:
    """Zero mean and unit variance of the foreground.

    Attributes:
        foreground: Voxels used for the statistics; those outside keep their values.
    """

    foreground: Foreground = "nonzero"
    percentile_count = 0

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`."""
        mean, std = distribution.mean, distribution.std
        return Curve(np.array([mean, mean + std]), np.array([0.0, 1.0]))


_LEAST_STD = 1e-8  # nnU-Net's eps


def _apart(low: float, high: float) -> NDArray[np.float64]:
    """Both numbers, the second raised to at least `low` + 1e-8 and to another float64."""
    least = max(_LEAST_STD, float(np.spacing(abs(low))))
    return np.array([low, max(high, low + least)])


@dataclass(frozen=True)
class SingleZScore(ZScore):
    """`ZScore` with mean and standard deviation in float32: nnU-Net's `ZScoreNormalization`."""

    def function(self, foreground: Single) -> Callable[[Single], Single]:
        """See `SingleScheme.function`."""
        mean, std = foreground.mean(), max(foreground.std(), np.float32(_LEAST_STD))
        return lambda values: (values - mean) / std

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`; the statistics are those of the distribution, in float64."""
        ends = _apart(distribution.mean, distribution.mean + distribution.std)
        return Curve(ends, np.array([0.0, 1.0]))


@dataclass(frozen=True)
class ClipZScore:
    """Clipping, and a fixed mean and standard deviation: nnU-Net's `CTNormalization`.

    Attributes:
        low: Least intensity; smaller ones are raised to it.
        high: Largest intensity; larger ones are lowered to it.
        mean: Intensity that is mapped to 0.
        std: Difference of intensities that is mapped to 1.

    Raises:
        ConfigError: The numbers are not finite, not ascending, or `std` is not positive.
    """

    low: float
    high: float
    mean: float
    std: float
    foreground: Foreground = field(default="all", init=False)
    percentile_count = 0

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.mean, self.std)
        if not (np.isfinite(numbers).all() and self.low < self.high and self.std > 0):
            raise ConfigError(
                "clip-zscore needs finite low < high, mean and a positive std, "
                f"got {', '.join(f'{n:g}' for n in numbers)}"
            )

    def function(self, foreground: Single) -> Callable[[Single], Single]:
        """See `SingleScheme.function`."""
        low, high, mean = (np.float32(n) for n in (self.low, self.high, self.mean))
        std = np.float32(max(self.std, _LEAST_STD))
        return lambda values: (np.clip(values, low, high) - mean) / std

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`."""
        ends = np.array([self.low, self.high])
        return _clipped(ends, (ends - self.mean) / self.std)


@dataclass(frozen=True)
class Range:
    """Linear map of a range of intensities: MONAI's `ScaleIntensityRange` and its like.

    Attributes:
        source: Intensities that are mapped to the ends of `target`; None if percentiles are given.
        percentiles: Percentiles (0 to 100) of all voxels that are mapped to the ends of `target`;
            None if `source` is given.
        target: Normalised values of the two intensities.
        clip: Whether values beyond the ends are clipped to `target`.
        moments: Mean and standard deviation that the result is shifted and scaled to; None to leave
            it.

    Raises:
        ConfigError: Both or neither of `source` and `percentiles` are given, or a pair is not
            finite or not ascending.
    """

    source: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    target: tuple[float, float] = (0.0, 1.0)
    clip: bool = False
    moments: tuple[float, float] | None = None
    foreground: Foreground = field(default="all", init=False)

    def __post_init__(self) -> None:
        if self.moments is not None and not (
            np.isfinite(self.moments).all() and self.moments[1] > 0
        ):
            raise ConfigError(
                f"range.moments must be a mean and a positive std, got {self.moments}"
            )
        if (self.source is None) == (self.percentiles is None):
            raise ConfigError("range needs either a source or percentiles")
        for name, pair in (("source", self.source), ("target", self.target)):
            if pair is not None and not (np.isfinite(pair).all() and pair[0] < pair[1]):
                raise ConfigError(f"range.{name} must be two ascending numbers, got {pair}")
        percent = self.percentiles
        if percent is not None and not 0 <= percent[0] < percent[1] <= 100:
            raise ConfigError(f"range.percentiles must ascend from 0 to 100, got {percent}")

    @property
    def percentile_count(self) -> int:
        """See `Scheme.percentile_count`."""
        return 0 if self.percentiles is None else 2

    def function(self, foreground: Single) -> Callable[[Single], Single]:
        """See `SingleScheme.function`."""
        if self.source is None:
            low, high = np.percentile(foreground, self.percentiles or ())
        else:
            low, high = self.source
        first, last = (np.float32(t) for t in self.target)
        low, span = np.float32(low), max(np.float32(high - low), np.float32(_LEAST_STD))

        def scale(values: Single) -> Single:
            scaled = (values - low) / span * (last - first) + first
            return np.clip(scaled, first, last) if self.clip else scaled

        if self.moments is None:
            return scale
        found = scale(foreground)
        mean, std = (np.float32(moment) for moment in self.moments)
        shift, factor = found.mean(), std / max(found.std(), np.float32(_LEAST_STD))
        return lambda values: (scale(values) - shift) * factor + mean

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`."""
        low, high = (
            distribution.percentiles(self.percentiles or ()).tolist()
            if self.source is None
            else self.source
        )
        ends = _apart(low, high)
        target = np.array(self.target)
        return _clipped(ends, target) if self.clip else Curve(ends, target)


@dataclass(frozen=True)
class Unchanged:
    """No normalisation."""

    foreground: Foreground = field(default="all", init=False)
    percentile_count = 0

    def function(self, foreground: Single) -> Callable[[Single], Single]:
        """See `SingleScheme.function`."""
        return lambda values: values

    def curve(self, distribution: Distribution) -> Curve:
        """See `Scheme.curve`."""
        return Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def _clipped(ends: NDArray[np.float64], target: NDArray[np.float64]) -> Curve:
    """Curve through two knots that is constant beyond them."""
    beyond = ends[1] - ends[0]
    return Curve(
        np.array([ends[0] - beyond, *ends, ends[1] + beyond]),
        np.array([target[0], *target, target[1]]),
    )


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
            VolumeError: The foreground is empty, or has a single value that the scheme refuses.
        """
        values = self.values
        varied = refuses_constant(scheme)
        histogram = Histogram.of_counts(values, self.counts, scheme.foreground, varied)
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


def _normalise_single(
    channel: NDArray[Any],
    scheme: SingleScheme,
    out: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
) -> None:
    """Normalise one channel voxel by voxel in float32; see `normalise_channel`."""
    values = channel.astype(np.float32)
    if scheme.foreground == "nonzero":
        mask = values != 0
    foreground = values if mask is None else values[mask]
    if not foreground.size:
        raise only_zeros()
    function = scheme.function(foreground)
    if mask is None:
        out[:] = function(values)
    else:
        out[:] = values
        out[mask] = function(foreground)


def normalise_channel(
    channel: NDArray[Any],
    scheme: Scheme,
    out: NDArray[np.float32],
    mask: NDArray[np.bool_] | None = None,
) -> None:
    """Normalise one channel.

    Integers are mapped through a lookup table, other types voxel by voxel. The results agree to
    float32 rounding.

    Args:
        channel: `(X, Y, Z)`, any real dtype, finite.
        scheme: Normalisation scheme.
        out: `(X, Y, Z)` float32 output array.
        mask: `(X, Y, Z)` foreground of the scheme, if it is `filled`.

    Raises:
        VolumeError: The foreground has fewer than two distinct values.
    """
    if isinstance(scheme, SingleScheme):
        _normalise_single(channel, scheme, out, mask)
        return
    if mask is not None:
        distinct = np.unique(channel[mask], return_counts=True)
        curve = scheme.curve(Histogram.of_counts(*distinct, scheme.foreground))
        out[:] = channel
        out[mask] = curve(channel[mask])
        return
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
    filled = any(scheme.foreground == "filled" for scheme in schemes)
    mask = filled_foreground(channels) if filled else None

    def one(index: int) -> None:
        own = mask if schemes[index].foreground == "filled" else None
        with naming_channel(index):
            normalise_channel(channels[index], schemes[index], out[index], own)

    in_threads(one, range(len(channels)), threads)
    return out
