"""Foreground voxels of a scan, and their bounding box."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Channels
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.geometry import Box, shape_of

Crop = Literal["nonzero", "all"]
"""Box that volumes are cropped to: that of the voxels that are not 0 in every channel, or none."""
Foreground = Literal["nonzero", "filled", "all"]
"""Voxels that a normalisation takes its statistics from: those of the channel that are not 0, as in
skull-stripped MRI; those that are not 0 in any channel, with the holes between them filled, as in
nnU-Net; or all."""


def no_foreground() -> VolumeError:
    """Error for a volume without non-zero voxels."""
    return VolumeError(
        "all voxels of all channels are zero", "check that the right files were given"
    )


def background_value(channel: NDArray[Any]) -> float:
    """Common value of the eight corner voxels of a channel; 0 if they differ."""
    corners = channel[
        :: channel.shape[0] - 1 or 1, :: channel.shape[1] - 1 or 1, :: channel.shape[2] - 1 or 1
    ]
    first = corners.flat[0]
    return float(first) if np.all(corners == first) else 0.0


def _extents(channel: NDArray[Any]) -> list[tuple[int, int]]:
    """Index range `(start, stop)` of the non-zero voxels along X, Y and Z."""
    plane = np.asarray(channel.any(axis=2))
    hits = (plane.any(axis=1), plane.any(axis=0), channel.any(axis=1).any(axis=0))
    where = [np.flatnonzero(h) for h in hits]
    return [(int(w[0]), int(w[-1]) + 1) if len(w) else (np.iinfo(int).max, 0) for w in where]


def filled_foreground(channels: Channels) -> NDArray[np.bool_]:
    """Voxels that are not 0 in any channel, with holes filled; nnU-Net's `create_nonzero_mask`.

    Args:
        channels: C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`.
    """
    from scipy import ndimage  # slow import that most models do not need

    union = np.asarray(channels[0] != 0)
    for channel in channels[1:]:
        union |= channel != 0
    return np.asarray(ndimage.binary_fill_holes(union))


def foreground_box(channels: Channels, crop: Crop = "nonzero") -> Box:
    """Smallest box that contains the foreground of all channels.

    Args:
        channels: C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`.
        crop: Definition of the box; with `all` it is the whole volume.

    Raises:
        VolumeError: Every voxel of every channel is zero.
    """
    if crop == "all":
        return Box.whole(channels[0].shape)
    extents = [_extents(channel) for channel in channels]
    starts = [min(start for start, _ in along) for along in zip(*extents, strict=True)]
    stops = [max(stop for _, stop in along) for along in zip(*extents, strict=True)]
    if min(stops) == 0:
        raise no_foreground()
    return Box(shape_of(starts), shape_of(stops))
