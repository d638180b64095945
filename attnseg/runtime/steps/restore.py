"""Restoration: from the network's outputs on the model's grid to those on the scan's own grid.

Outputs are resampled linearly and plane by plane along X, so that the memory does not grow with the
number of planes of the scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.geometry import AxisTransform, Box, Shape
from attnseg.runtime.steps.preprocess import Preprocessed
from attnseg.runtime.steps.resample import Sampling

Planes = Iterable[NDArray[np.float32]]
"""Consecutive parts `(K, x, Y, Z)` of an array `(K, X, Y, Z)`."""


def restored(
    planes: Planes, scan: Preprocessed, background: NDArray[np.float32], half: bool = False
) -> Planes:
    """Restore the outputs of an image.

    Args:
        planes: Outputs of the image, float32.
        scan: Position of the image in the volume.
        background: `(K,)` outputs of a voxel outside the image.
        half: Whether resampled values are rounded to float16, as nnU-Net stores them.

    Returns:
        Outputs of the `result_box` of the volume, float32.
    """
    if scan.sampling is None:
        return planes
    if scan.box_on_grid:
        planes = _surrounded(planes, scan.box, scan.grid_shape, background)
    return _resampled(planes, scan.sampling.inverse(), half)


def _surrounded(planes: Planes, box: Box, shape: Shape, background: NDArray[np.float32]) -> Planes:
    """Outputs of a grid of `shape`; those of background outside the box."""

    def empty(count: int) -> NDArray[np.float32]:
        outputs = background[:, None, None, None]
        return np.broadcast_to(outputs, (len(background), count, *shape[1:]))

    _, y, z = box.slices()
    yield empty(box.start[0])
    for part in planes:
        whole = empty(part.shape[1]).copy()
        whole[:, :, y, z] = part
        yield whole
    yield empty(shape[0] - box.stop[0])


def _one_by_one(planes: Planes) -> Iterator[NDArray[np.float32]]:
    return (part[:, index] for part in planes for index in range(part.shape[1]))


def _resampled(planes: Planes, sampling: Sampling, half: bool) -> Planes:
    """Linear interpolation of `(K, X, Y, Z)` to another grid, one plane at a time."""
    first, second, weight = sampling.taps(0)
    source = _one_by_one(planes)
    held: dict[int, NDArray[np.float64]] = {}  # source planes, resampled along Y and Z
    read = 0
    for low, high, share in zip(first.tolist(), second.tolist(), weight.tolist(), strict=True):
        while read <= high:
            plane = next(source)
            if read >= low:
                held[read] = _in_plane(plane, sampling)
            read += 1
        for passed in [index for index in held if index < low]:
            del held[passed]
        mixed = held[low] if not share else held[low] * (1 - share) + held[high] * share
        rounded = mixed.astype(np.float16 if half else np.float32)
        yield rounded.astype(np.float32, copy=False)[:, None]


def _in_plane(plane: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Linear interpolation of a plane `(K, Y, Z)`."""
    values = plane.astype(np.float64)
    for axis in (1, 2):
        first, second, weight = sampling.taps(axis)
        if sampling.source[axis] == sampling.target[axis] and not weight.any():
            continue
        share = weight[:, None] if axis == 1 else weight
        low, high = np.take(values, first, axis), np.take(values, second, axis)
        high -= low
        high *= share
        high += low
        values = high
    return values


def placed(
    probabilities: NDArray[np.float32], box: Box, shape: Shape, turn: AxisTransform
) -> NDArray[np.float32]:
    """Probabilities `(R, X, Y, Z)` of a box of a turned volume, in the volume's own grid.

    Args:
        probabilities: Probabilities of the regions in the box.
        box: Box of the turned volume that the results cover; elsewhere they are 0.
        shape: Number of voxels of the turned volume along X, Y and Z.
        turn: Transform from the volume to the turned one.
    """
    whole = np.zeros((len(probabilities), *shape), np.float32)
    whole[(slice(None), *box.slices())] = probabilities
    return turn.invert(whole)
