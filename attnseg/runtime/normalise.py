"""Intensity normalisation: brain box, z-score and histogram matching.

Source: the paper's section 3.3 (zero mean and unit variance per volume and modality over
brain voxels, then histogram matching to the training set). Matching is the piecewise linear
landmark method of Nyul, Udupa and Zhang, "New variants of a method of MRI scale
standardization" (2000), on z-scores, with the landmarks stored in the bundle.

Integer images are normalised through one look-up table made from their histogram; all other
images voxel by voxel. Both give the same values to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.volume import Channels

Foreground = Literal["nonzero", "all"]
Box = tuple[slice, slice, slice]

DECILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
_TABLE_LIMIT = 1 << 17  # integer range up to which a table is smaller than the work it saves
_SLAB = 16  # voxels; 16 float32 are one cache line


@dataclass(frozen=True)
class Landmarks:
    """Percentiles of the training set's z-scores, the target of histogram matching.

    Attributes:
        percentiles: ascending, in percent.
        values: one row per channel, `values[c][p]` the mean z-score at `percentiles[p]`.
    """

    percentiles: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.percentiles) for row in self.values):
            raise ConfigError("landmarks need one value per percentile in every channel")
        if any(not 0 <= p <= 100 for p in self.percentiles):
            raise ConfigError(f"percentiles must be within 0 and 100, got {self.percentiles}")
        for row in (self.percentiles, *self.values):
            if len(row) < 2 or np.any(np.diff(row) <= 0):
                raise ConfigError(f"landmarks must be at least two, and ascending, got {row}")


@dataclass(frozen=True)
class Normalisation:
    """How a model's inputs are normalised.

    Attributes:
        foreground: voxels that statistics are taken over: `nonzero` (skull-stripped MRI) or
            `all`. With `nonzero`, the other voxels become 0.
        landmarks: target of histogram matching, or None for the z-score alone.
    """

    foreground: Foreground = "nonzero"
    landmarks: Landmarks | None = None


@dataclass(frozen=True)
class Curve:
    """Piecewise linear map of intensities, extended beyond its ends by the end slopes.

    Attributes:
        source: intensities, ascending.
        target: their values.
    """

    source: NDArray[np.float64]
    target: NDArray[np.float64]

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """The values of intensities of any shape."""
        slopes = np.diff(self.target) / np.diff(self.source)
        mapped = np.interp(values, self.source, self.target)
        mapped += slopes[0] * np.minimum(values - self.source[0], 0)
        mapped += slopes[-1] * np.maximum(values - self.source[-1], 0)
        return np.asarray(mapped, np.float32)


class Histogram:
    """Exact distribution of the foreground of one channel: mean, deviation, percentiles."""

    def __init__(self, values: NDArray[Any], counts: NDArray[np.int64]) -> None:
        """`values` ascending, and how often each occurs."""
        self.values = values.astype(np.float64)
        self.counts = counts
        self.total = int(counts.sum())
        self.mean = float(self.values @ counts) / self.total
        self.std = float(np.sqrt((self.values - self.mean) ** 2 @ counts / self.total))

    @classmethod
    def of(cls, channel: NDArray[Any], foreground: Foreground) -> Self:
        """Histogram of `(X, Y, Z)`. Raises `VolumeError` without two values of foreground."""
        if _has_table(channel):
            values, counts = _count_integers(channel)
        else:
            values, counts = np.unique(channel, return_counts=True)
        return cls.of_counts(values, counts, foreground)

    @classmethod
    def of_counts(
        cls, values: NDArray[Any], counts: NDArray[np.int64], foreground: Foreground
    ) -> Self:
        """Histogram of ascending values that occur so often, as `of`."""
        keep = counts > 0
        if foreground == "nonzero":
            keep &= values != 0
        if not keep.any():
            raise VolumeError("holds only zeros; check that the right file was given")
        if np.count_nonzero(keep) == 1:
            raise VolumeError(
                f"holds no value but {values[keep][0]}; check that the right file was given"
            )
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


def _has_table(channel: NDArray[Any]) -> bool:
    if channel.dtype.kind not in "iu":
        return False
    return channel.dtype.itemsize <= 2 or int(channel.max()) - int(channel.min()) < _TABLE_LIMIT


def _slabs(channel: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Slabs along Z: whole cache lines of a C-ordered result, small enough to stay in cache."""
    for z in range(0, channel.shape[2], _SLAB):
        where = slice(z, min(z + _SLAB, channel.shape[2]))
        yield where, channel[:, :, where]


def _offsets(slab: NDArray[Any], low: int) -> NDArray[Any]:
    """Index of each voxel in a table that starts at `low`."""
    return slab if low == 0 else slab.astype(np.int64) - low


def _count_integers(channel: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    low, high = int(channel.min()), int(channel.max())
    counts = np.zeros(high - low + 1, np.int64)
    for _, slab in _slabs(channel):
        offsets = _offsets(slab.ravel(order="K"), low)
        counts += np.bincount(offsets, minlength=len(counts))
    return np.arange(low, high + 1), counts


class Distribution(Protocol):
    """What a curve is made from: statistics of the foreground of one channel."""

    mean: float
    std: float

    def percentiles(self, percent: Sequence[float]) -> NDArray[np.float64]:
        """Percentiles, as `numpy.percentile`."""


def curve_of(histogram: Distribution, landmarks: Landmarks | None, channel: int) -> Curve:
    """The map that normalises a channel of this distribution.

    Args:
        histogram: of the channel's foreground.
        landmarks: target of histogram matching, or None for the z-score alone.
        channel: its position, which picks its landmarks.
    """
    mean, std = histogram.mean, histogram.std
    if landmarks is None:
        return Curve(np.array([mean, mean + std]), np.array([0.0, 1.0]))
    source = histogram.percentiles(landmarks.percentiles)
    target = np.array(landmarks.values[channel])
    # Coarsely quantised images have equal percentiles; such a run maps to its mean target.
    knots, run = np.unique(source, return_inverse=True)
    if len(knots) < 2:
        return Curve(np.array([mean, mean + std]), np.array([0.0, 1.0]))
    return Curve(knots, np.bincount(run, target) / np.bincount(run))


def z_score_percentiles(
    channel: NDArray[Any], foreground: Foreground, percent: Sequence[float] = DECILES
) -> NDArray[np.float64]:
    """Percentiles of the z-scores of one channel: what the trainer averages into landmarks."""
    histogram = Histogram.of(channel, foreground)
    return (histogram.percentiles(percent) - histogram.mean) / histogram.std


def _look_up(
    channel: NDArray[Any], curve: Curve, foreground: Foreground, out: NDArray[np.float32]
) -> None:
    low, high = int(channel.min()), int(channel.max())
    table = curve(np.arange(low, high + 1))
    if foreground == "nonzero" and low <= 0 <= high:
        table[-low] = 0
    for where, slab in _slabs(channel):
        out[:, :, where] = np.take(table, _offsets(slab.T, low)).T


def table_of_counts(
    counts: NDArray[np.int64], low: int, normalisation: Normalisation, index: int
) -> NDArray[np.float32]:
    """Look-up table of a channel whose voxels were counted elsewhere.

    Args:
        counts: how often the values `low`, `low + 1`, ... occur in the channel.
        low: first value.
        normalisation: what to do.
        index: position of the channel, which picks its landmarks.

    Returns:
        Normalised value of each of these values, as `normalise_channel` gives it.

    Raises:
        VolumeError: the channel has no foreground, or one value only.
    """
    values = np.arange(low, low + len(counts))
    histogram = Histogram.of_counts(values, counts, normalisation.foreground)
    table = curve_of(histogram, normalisation.landmarks, index)(values)
    if normalisation.foreground == "nonzero" and 0 <= -low < len(table):
        table[-low] = 0
    return table


def normalise_channel(
    channel: NDArray[Any], normalisation: Normalisation, index: int, out: NDArray[np.float32]
) -> None:
    """Normalise one channel.

    Args:
        channel: `(X, Y, Z)`, any real dtype, finite.
        normalisation: what to do.
        index: position of the channel, which picks its landmarks.
        out: `(X, Y, Z)` float32, filled with the result.

    Raises:
        VolumeError: the channel has no foreground, or one value only.
    """
    foreground = normalisation.foreground
    try:
        histogram = Histogram.of(channel, foreground)
    except VolumeError as error:
        raise VolumeError(f"channel {index + 1} {error}") from error
    curve = curve_of(histogram, normalisation.landmarks, index)
    if _has_table(channel):
        _look_up(channel, curve, foreground, out)
        return
    for where, slab in _slabs(channel):
        out[:, :, where] = curve(slab)
        if foreground == "nonzero":
            out[:, :, where][slab == 0] = 0


def normalise(
    channels: Channels, normalisation: Normalisation, threads: int = 1
) -> NDArray[np.float32]:
    """Normalise all channels of a volume or of its crop to the brain box.

    Args:
        channels: C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`.
        normalisation: what to do.
        threads: channels normalised at the same time.

    Returns:
        `(C, X, Y, Z)` float32, C-contiguous, as engines take it.

    Raises:
        VolumeError: a channel has no foreground, or one value only.
        ConfigError: the landmarks are for another number of channels.
    """
    landmarks = normalisation.landmarks
    if landmarks is not None and len(landmarks.values) != len(channels):
        raise ConfigError(
            f"landmarks are for {len(landmarks.values)} channels, got {len(channels)}"
        )
    out = np.empty((len(channels), *channels[0].shape), np.float32)
    with ThreadPoolExecutor(threads) as pool:
        tasks = [
            pool.submit(normalise_channel, channel, normalisation, index, out[index])
            for index, channel in enumerate(channels)
        ]
        for task in tasks:
            task.result()
    return out


def background_value(channel: NDArray[Any]) -> float:
    """The value that a channel's eight corners share, 0 if they differ."""
    corners = channel[
        :: channel.shape[0] - 1 or 1, :: channel.shape[1] - 1 or 1, :: channel.shape[2] - 1 or 1
    ]
    first = corners.flat[0]
    return float(first) if np.all(corners == first) else 0.0


def _extents(channel: NDArray[Any]) -> list[tuple[int, int]]:
    """First and one past the last index with a non-zero voxel, along X, Y and Z."""
    plane = np.asarray(channel.any(axis=2))
    hits = (plane.any(axis=1), plane.any(axis=0), channel.any(axis=1).any(axis=0))
    where = [np.flatnonzero(h) for h in hits]
    return [(int(w[0]), int(w[-1]) + 1) if len(w) else (np.iinfo(int).max, 0) for w in where]


def brain_box(channels: Channels, foreground: Foreground = "nonzero") -> Box:
    """Smallest box that holds the foreground of every channel.

    Args:
        channels: C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`.
        foreground: with `all`, the box is the whole volume.

    Raises:
        VolumeError: every voxel of every channel is zero.
    """
    if foreground == "all":
        x, y, z = (slice(0, size) for size in channels[0].shape)
        return (x, y, z)
    extents = [_extents(channel) for channel in channels]
    starts = [min(start for start, _ in along) for along in zip(*extents, strict=True)]
    stops = [max(stop for _, stop in along) for along in zip(*extents, strict=True)]
    if min(stops) == 0:
        raise VolumeError(
            "all voxels of all channels are zero; check that the right files were given"
        )
    x, y, z = (slice(start, stop) for start, stop in zip(starts, stops, strict=True))
    return (x, y, z)
