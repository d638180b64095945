"""Single voxels far beyond all others, as broken pixels and calculations leave them.

One voxel of 2e9 changes the features of a whole window. Values farther from the 1st and 99th
percentile than ten times their distance are limited; in 42 BraTS cases none is farther than three
times, so that those results do not depend on this step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FARTHEST = 10.0  # distance from the percentiles, as a multiple of their distance


def limit_extremes(name: str, channel: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Limit values far beyond all others, and return a warning if there are any.

    Args:
        name: Name of the channel, for the warning.
        channel: `(X, Y, Z)`, any real dtype, finite.
    """
    low, high = _limits(channel)
    least, largest = channel.min(), channel.max()
    if low <= least and largest <= high:
        return channel, ()
    count = int(np.count_nonzero((channel < low) | (channel > high)))
    farthest = largest if largest > high else least
    voxels = "1 voxel lies" if count == 1 else f"{count} voxels lie"
    warning = (
        f"{name}: {voxels} far beyond all others, up to {float(farthest):.3g}; limited to "
        f"{low:.3g} to {high:.3g}"
    )
    return np.clip(channel, channel.dtype.type(low), channel.dtype.type(high)), (warning,)


def _limits(channel: NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest value that is kept, as whole numbers for an integer type."""
    values = channel[::4, ::4, ::4]
    values = values[values != 0]
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 0.0)
    if low == high:
        return -np.inf, np.inf
    reach = _FARTHEST * (high - low)
    low, high = float(low - reach), float(high + reach)
    if channel.dtype.kind in "iu":
        bounds = np.iinfo(channel.dtype)
        low, high = max(float(bounds.min), np.floor(low)), min(float(bounds.max), np.ceil(high))
    return low, high
