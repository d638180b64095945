"""Normalisation schemes: how the intensities of one channel are mapped.

A scheme computes a `Curve`, a piecewise linear map of intensities, from the distribution of a
channel's intensities. Tables, threads and CUDA kernels work on curves. The schemes of other
frameworks also have a `function`, which the host uses instead: it computes voxel by voxel in
float32, in the order of operations of the framework.

Sources: the paper's section 3.3 (zero mean and unit variance per volume and modality over brain
voxels, then histogram matching to the training set). Matching is the piecewise linear landmark
method of Nyul, Udupa and Zhang, "New variants of a method of MRI scale standardization" (2000),
on z-scores, with the landmarks stored in the bundle. The schemes of other trainers are nnU-Net's
`ZScoreNormalization` and `CTNormalization`, and MONAI's `NormalizeIntensity` and
`ScaleIntensityRange`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.foreground import Foreground


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

    If both percentiles are the same intensity, this intensity is mapped to the lower end of
    `target`, and the others are shifted by the same amount, neither scaled nor clipped.

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
        shifted = self.source is None and np.float32(low) == np.float32(high)
        low, span = np.float32(low), max(np.float32(high - low), np.float32(_LEAST_STD))

        def scale(values: Single) -> Single:
            if shifted:
                return values - low + first
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
        target = np.array(self.target)
        if low == high:
            step = max(1.0, float(np.spacing(abs(low))))
            return Curve(np.array([low, low + step]), np.array([target[0], target[0] + step]))
        ends = _apart(low, high)
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
