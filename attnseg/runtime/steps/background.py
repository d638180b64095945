"""Background of scans whose voxels outside the object, such as the brain, are 0 in every channel.

A model that was trained on such scans takes every voxel other than 0 for tissue. Three things occur
in practice: dust far below the signal in all channels, as interpolation and denoisers leave it,
which is cut to 0; noise or skull, which are refused; and channels whose foregrounds disagree.

The limits lie between what 42 BraTS cases show (dust in 0.8 % of the foreground, 2 % of a channel
outside the others, 34 % of a channel missing) and the same cases with a background added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import VolumeError
from attnseg.runtime.threads import Each

_DUST = 0.01  # largest dust, as a share of the channel's 99th percentile
_DUST_OF_FEW = 1e-3  # the same for models of one or two channels, where tissue may be that dark
_FEW = 0.02  # share of the foreground below which dust is left
_EDGE_VOXELS = 0.3  # share of voxels other than 0 along the edges of a volume with a background
_EDGE_LEFT = 0.05  # the same when dust has been cut
_APART_WARN, _APART_REFUSE = 0.1, 0.5  # share of a channel's foreground outside the others'
_MISSING_WARN, _MISSING_REFUSE = 0.25, 0.6  # share of the others' foreground where a channel is 0
_SHELL = 0.2  # share of the foreground of a plane that is enclosed by a separate shell
_LARGER_WARN, _LARGER_REFUSE = 1.25, 2.0  # times the largest foreground of the training cases
_STRIP = (
    "give the whole scan with the voxels outside the object set to 0, as a skull-stripping tool "
    "does for a brain"
)
_REGISTER = "check that every channel is skull-stripped and registered"


@dataclass(frozen=True)
class Cleaned:
    """Channels without dust.

    Attributes:
        channels: C arrays `(X, Y, Z)`; the given arrays if there is no dust.
        warnings: Warnings for readers of the result.
    """

    channels: list[NDArray[Any]]
    warnings: tuple[str, ...]


def clean_background(
    channels: Sequence[NDArray[Any]],
    names: Sequence[str],
    voxel_ml: float,
    largest_ml: float,
    each: Each = map,
) -> Cleaned:
    """Check the background of all channels, and cut dust far below the signal to 0.

    Args:
        channels: C arrays `(X, Y, Z)`.
        names: Name of each channel, for messages.
        voxel_ml: Volume of a voxel.
        largest_ml: Largest foreground of the training cases.
        each: Function that calls another with each channel.

    Raises:
        VolumeError: The background of a channel is not 0, the foregrounds of the channels
            contradict each other, or the foreground is more than the object.
    """
    coarse = list(each(_coarse, channels))
    cleaned, dust = _without_dust(channels, coarse, names, each)
    deque(each(_check_edges, names, channels, cleaned), maxlen=0)
    if dust:
        coarse = list(each(_coarse, cleaned))
    masks = np.stack([values != 0 for values in coarse])
    apart = _compare_foregrounds(masks, names)
    foreground_ml = _share_of(np.asarray(masks.any(axis=0))) * cleaned[0].size * voxel_ml
    larger = _check_size(foreground_ml, largest_ml)
    _check_shell(cleaned, each)
    return Cleaned(cleaned, (*dust, *apart, *larger))


def _coarse(channel: NDArray[Any]) -> NDArray[Any]:
    """Every third voxel along each axis, enough for shares of the volume."""
    return channel[::3, ::3, ::3].copy(order="K")


def _share_of(mask: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(mask)) / mask.size


def _dust_limit(coarse: NDArray[Any], share: float) -> float:
    """Largest dust of a channel, from the 99th percentile of the magnitudes other than 0."""
    values = coarse[coarse != 0]
    if not values.size:
        return 0.0
    return share * float(np.percentile(np.abs(values.astype(np.float32)), 99))


def _dust_in(channels: Sequence[NDArray[Any]], limits: Sequence[float]) -> NDArray[np.bool_]:
    """Voxels that are dust: at most the limit in all channels, and not 0 in all."""
    low = np.ones_like(channels[0], np.bool_)  # of the same memory order, which is much faster
    nonzero = np.zeros_like(channels[0], np.bool_)
    for channel, limit in zip(channels, limits, strict=True):
        low &= (channel >= -limit) & (channel <= limit)
        nonzero |= channel != 0
    return low & nonzero


def _without_dust(
    channels: Sequence[NDArray[Any]],
    coarse: Sequence[NDArray[Any]],
    names: Sequence[str],
    each: Each,
) -> tuple[list[NDArray[Any]], tuple[str, ...]]:
    """Channels without dust, and a warning if there was any."""
    share = _DUST if len(channels) > 2 else _DUST_OF_FEW
    limits = list(each(_dust_limit, coarse, repeat(share)))
    foreground = np.logical_or.reduce([c != 0 for c in coarse])
    if np.count_nonzero(_dust_in(coarse, limits)) <= _FEW * np.count_nonzero(foreground):
        return list(channels), ()
    dust = _dust_in(channels, limits)
    largest = [float(np.abs(channel[dust]).max()) for channel in channels]
    dusty = ", ".join(name for name, value in zip(names, largest, strict=True) if value)
    warning = (
        f"{dusty}: the background is not 0; {_share_of(dust):.1%} of the voxels, with values up to "
        f"{max(largest):.3g}, were set to 0"
    )
    return [np.where(dust, channel.dtype.type(0), channel) for channel in channels], (warning,)


def _edges(channel: NDArray[Any]) -> NDArray[Any]:
    """Voxels along the twelve edges of the volume, three deep where the volume is large."""
    deep = [min(3, max(1, size // 16)) for size in channel.shape]
    ends = [np.r_[0:d, size - d : size] for d, size in zip(deep, channel.shape, strict=True)]
    whole = [np.arange(size) for size in channel.shape]
    beams = [
        channel[np.ix_(*(ends[k] if k in pair else whole[k] for k in range(3)))].ravel()
        for pair in combinations(range(3), 2)
    ]
    return np.concatenate(beams)


def _check_edges(name: str, given: NDArray[Any], cleaned: NDArray[Any]) -> None:
    """Raise `VolumeError` unless the edges of the volume, which lie outside the object, are 0.

    An object that the volume cuts off may touch some of them.
    """
    before, after = _edges(given), _edges(cleaned)
    share = _share_of(before != 0)
    if share < _EDGE_VOXELS or _share_of(after != 0) < _EDGE_LEFT:
        return
    largest = np.abs(after.astype(np.float64)).max()
    many = f"{share:.0%} of the voxels along the edges are not, up to {largest:.4g}"
    constant = np.all(after == after[0])
    what = f"is {float(after[0]):g}, not 0" if constant else f"must be 0: {many}"
    raise VolumeError(f"{name}: its background {what}", _STRIP)


def _compare_foregrounds(masks: NDArray[np.bool_], names: Sequence[str]) -> list[str]:
    """Warnings of channels whose foregrounds disagree.

    Raises:
        VolumeError: A channel's foreground contradicts that of the others.
    """
    common = masks.sum(axis=0) * 2 >= len(masks)
    warnings = []
    for name, mask in zip(names, masks, strict=True):
        apart = _share_of(mask & ~common) / max(_share_of(mask), 1e-9)
        missing = _share_of(common & ~mask) / max(_share_of(common), 1e-9)
        if apart > _APART_WARN:
            said = f"{name}: {apart:.0%} of its foreground is 0 in most channels"
            warnings.append(_doubt(said, apart > _APART_REFUSE))
        if missing > _MISSING_WARN:
            said = f"{name}: is 0 in {missing:.0%} of the foreground of most channels"
            warnings.append(_doubt(said, missing > _MISSING_REFUSE))
    return warnings


def _doubt(said: str, refuse: bool) -> str:
    """Return a warning, or raise it as a `VolumeError`."""
    if refuse:
        raise VolumeError(said, _REGISTER)
    return f"{said}; {_REGISTER}"


def _check_size(foreground_ml: float, largest_ml: float) -> list[str]:
    """Warning of a foreground that is larger than any of the training cases.

    Raises:
        VolumeError: It is much larger.
    """
    said = (
        f"the foreground is {foreground_ml:.0f} ml, in the training cases at most "
        f"{largest_ml:.0f} ml"
    )
    if foreground_ml > _LARGER_REFUSE * largest_ml:
        raise VolumeError(f"{said}: it holds more than the object, such as the skull", _STRIP)
    if foreground_ml > _LARGER_WARN * largest_ml:
        return [f"{said}: something else than the object, such as skull or noise, may be left"]
    return []


def _check_shell(channels: list[NDArray[Any]], each: Each) -> None:
    """Raise `VolumeError` if a shell, such as the skull, encloses the object across a gap."""
    where = [(axis, share) for axis in range(3) for share in (0.4, 0.5, 0.6)]

    def enclosed(at: tuple[int, float]) -> float | None:
        axis, share = at
        index = int(share * channels[0].shape[axis])
        plane = np.logical_or.reduce([_plane(channel, axis, index) != 0 for channel in channels])
        return _enclosed(plane) if plane.any() else None

    found = list(each(enclosed, where))
    for first in (0, 3, 6):  # a shell that the volume cuts off is closed along one axis only
        shares = [share for share in found[first : first + 3] if share is not None]
        if shares and float(np.median(shares)) > _SHELL:
            raise VolumeError("a shell encloses the object, as the skull does", _STRIP)


def _plane(channel: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    plane: NDArray[Any] = np.moveaxis(channel, axis, 0)[index]  # numpy.take copies the channel
    return plane


def _enclosed(plane: NDArray[np.bool_]) -> float:
    """Share of a plane's foreground in parts that do not touch the outside."""
    from scipy import ndimage

    padded = np.pad(plane, 1)
    parts = ndimage.label(padded)[0]
    sizes = np.bincount(parts[padded])
    if sizes.max() >= 0.98 * sizes.sum():
        return 0.0  # a single part has no shell
    outside = ndimage.label(~padded)[0]
    touching = np.unique(parts[ndimage.binary_dilation(outside == outside[0, 0])])
    return float(1 - sizes[touching[touching > 0]].sum() / sizes.sum())
