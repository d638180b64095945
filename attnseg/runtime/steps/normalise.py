"""Intensity normalisation of a volume: the scheme of each channel, applied to its voxels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Channels
from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.steps.foreground import Foreground, filled_foreground
from attnseg.runtime.steps.histogram import Histogram, count_values, only_zeros, slabs, table_index
from attnseg.runtime.steps.schemes import Scheme, SingleScheme
from attnseg.runtime.threads import in_threads

DECILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)


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
    counted = count_values(channel)
    if counted is not None:
        table = counted.table(scheme)
        for where, slab in slabs(channel):
            out[:, :, where] = np.take(table, table_index(slab.T, counted.low)).T
        return
    distinct = np.unique(channel, return_counts=True)
    curve = scheme.curve(Histogram.of_counts(*distinct, scheme.foreground))
    for where, slab in slabs(channel):
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
