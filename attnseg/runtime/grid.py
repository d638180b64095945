"""Grid: the voxel grid that a model takes, where it is not the scan's own.

The paper trains on volumes resized to 192x192x128 (section 3.3). The bundle records such a
grid; the runtime resamples a scan to it, and the logits back, so that labels always lie on the
scan's own grid. Voxel faces stay where they are: the first and last voxel of either grid begin
and end at the same place. Interpolation is trilinear, of labels nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.normalise import Box
from attnseg.runtime.volume import Volume
from attnseg.runtime.windows import Shape

LARGEST_GRID = 1 << 30  # voxels, 4 GiB a channel: beyond it somebody mistook the unit


@dataclass(frozen=True)
class Grid:
    """A grid that every scan is brought to: one shape, or one spacing.

    Attributes:
        shape: voxels along X, Y and Z, whatever the scan's.
        spacing_mm: voxel size along X, Y and Z.
    """

    shape: Shape | None = None
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.spacing_mm is None):
            raise ConfigError("a grid needs either a shape or a spacing_mm")
        values = self.shape or self.spacing_mm or ()
        if len(values) != 3 or not all(0 < v < math.inf for v in values):
            raise ConfigError(f"a grid needs three positive numbers, got {values}")

    def shape_for(self, volume: Volume) -> Shape:
        """Voxels that `volume` has on this grid.

        Raises:
            ConfigError: they are more than any scan has.
        """
        if self.shape is not None:
            return self.shape
        assert self.spacing_mm is not None
        sizes = zip(volume.shape, volume.spacing_mm, self.spacing_mm, strict=True)
        x, y, z = (max(2, round(n * own / wanted)) for n, own, wanted in sizes)
        if x * y * z > LARGEST_GRID:
            raise ConfigError(
                f"spacing_mm {self.spacing_mm} makes {x} x {y} x {z} voxels of a scan, more than "
                f"{LARGEST_GRID}; give a larger spacing"
            )
        return x, y, z


def resample(array: NDArray[Any], shape: Sequence[int], nearest: bool = False) -> NDArray[Any]:
    """`(X, Y, Z)` on a grid of `shape` over the same space, dtype kept."""
    if array.shape == tuple(shape):
        return array
    factors = [wanted / own for wanted, own in zip(shape, array.shape, strict=True)]
    order = 0 if nearest else 1
    return np.asarray(ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True))


def resample_volume(volume: Volume, grid: Grid | None) -> Volume:
    """`volume` on `grid`; itself if that is None."""
    if grid is None:
        return volume
    shape = grid.shape_for(volume)
    factors = np.array(volume.shape) / shape
    step = np.diag([*factors, 1.0])
    step[:3, 3] = (factors - 1) / 2  # centre of the first voxel, whose face stays
    channels = [resample(channel, shape) for channel in volume.channels]
    return replace(volume, channels=channels, affine=volume.affine @ step)


def restore_logits(
    logits: NDArray[np.float32], box: Box, grid_shape: Sequence[int], shape: Sequence[int]
) -> NDArray[np.float32]:
    """Logits of a box of the grid, on the whole scan.

    Args:
        logits: `(K, X, Y, Z)` of the box.
        box: where it lies on the grid.
        grid_shape: of the grid.
        shape: of the scan.

    Returns:
        `(K, *shape)` float32; beyond the box 0 in all classes, which argmax reads as background.
    """
    restored = np.empty((len(logits), *shape), np.float32)
    for index, values in enumerate(logits):
        whole = np.zeros(grid_shape, np.float32)
        whole[box] = values
        restored[index] = resample(whole, shape)
    return restored
