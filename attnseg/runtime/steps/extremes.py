"""Single voxels far beyond all others, as broken pixels and calculations leave them.

One voxel of 2e9 changes the features of a whole window. Values farther from the 1st and 99th
percentile than ten times their distance are replaced by the nearer percentile, or by 0 where all
other channels are 0. In 42 BraTS cases no voxel is farther than three times, so that those results
do not depend on this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.threads import Each

_FARTHEST = 10.0  # distance from the percentiles, as a multiple of their distance


def replace_extremes(
    channels: Sequence[NDArray[Any]],
    names: Sequence[str],
    each: Each = map,
    replace: bool = True,
) -> tuple[list[NDArray[Any]], tuple[str, ...]]:
    """Replace values far beyond all others, or only warn of them.

    Args:
        channels: C arrays `(X, Y, Z)`, any real dtype, finite.
        names: Name of each channel, for warnings.
        each: Function that calls another with each channel.
        replace: Whether the values are replaced.

    Returns:
        The channels, those without extreme values as given, and warnings.
    """
    replaced, warnings = list(channels), []
    looked = zip(names, channels, each(_look, channels), strict=True)
    for index, (name, channel, ((low, high), limits, within)) in enumerate(looked):
        if within:
            continue
        extreme = (channel < limits[0]) | (channel > limits[1])
        said = f"{name}: {_describe(channel, extreme)}"
        if not replace:
            warnings.append(f"{said}; kept, since other frameworks do not replace them")
            continue
        warnings.append(f"{said}; replaced by {low:.3g} to {high:.3g}")
        others = [other for other in channels if other is not channel]
        tissue = np.logical_or.reduce([other != 0 for other in others]) if others else extreme
        kind = channel.dtype.type
        inside = np.where(tissue, np.clip(channel, kind(low), kind(high)), kind(0))
        replaced[index] = np.where(extreme, inside, channel)
    return replaced, tuple(warnings)


def _look(channel: NDArray[Any]) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """Percentiles and limits of a channel, and whether all its values are within the limits."""
    percentiles, limits = _limits(channel)
    return percentiles, limits, bool(limits[0] <= channel.min() and channel.max() <= limits[1])


def _describe(channel: NDArray[Any], extreme: NDArray[np.bool_]) -> str:
    """Number, largest value and first place of the extreme voxels, as text."""
    values = channel[extreme].astype(np.float64)
    farthest = float(values[np.argmax(np.abs(values))])
    first = tuple(np.argwhere(extreme)[0].tolist())
    many = f"{len(values)} voxels lie" if len(values) > 1 else "1 voxel lies"
    return f"{many} far beyond all others, up to {farthest:.3g}, the first at {first}"


def _limits(channel: NDArray[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The 1st and 99th percentile, and the smallest and largest value that is kept."""
    values = channel[::4, ::4, ::4]
    values = values[values != 0]
    if values.dtype == np.float16:  # its percentiles would be computed in float16
        values = values.astype(np.float32)
    low, high = np.percentile(values, (1, 99)).tolist() if values.size else (0.0, 0.0)
    if low == high:
        return (low, high), (-np.inf, np.inf)
    reach = _FARTHEST * (high - low)
    # As numpy scalars, which float16 voxels are compared with in double precision.
    return (low, high), (np.float64(low - reach), np.float64(high + reach))
