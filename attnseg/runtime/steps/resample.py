"""Resampling between the scan's grid and the voxel grid of the model.

The paper trains on volumes resized to 192x192x128 (section 3.3). The bundle stores such a grid;
the runtime resamples scans to it and logits back, so that labels are always on the scan's own
grid. The outer faces of both grids coincide (`grid_mode=True` of `scipy.ndimage.zoom`).
Interpolation is trilinear for images and logits, and nearest-neighbour for labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import Box, Shape

LARGEST_GRID = 1 << 28  # voxels, 1 GiB per channel; more indicates a wrong unit


@dataclass(frozen=True)
class Grid:
    """Target grid of resampling: either a fixed shape or a fixed spacing.

    Attributes:
        shape: Number of voxels along X, Y and Z; None if `spacing_mm` is given.
        spacing_mm: Voxel size along X, Y and Z; None if `shape` is given.

    Raises:
        ConfigError: Both or neither are given, or the values are not three positive numbers.
    """

    shape: Shape | None = None
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.spacing_mm is None):
            raise ConfigError("a grid needs either a shape or a spacing_mm")
        values = self.shape or self.spacing_mm or ()
        if len(values) != 3 or not all(0 < v < math.inf for v in values):
            raise ConfigError(f"a grid needs three positive numbers, got {values}")
        if self.shape is not None and math.prod(self.shape) > LARGEST_GRID:
            raise ConfigError(f"a grid has at most {LARGEST_GRID} voxels, got {self.shape}")

    def shape_for(self, volume: Volume) -> Shape:
        """Shape of `volume` after resampling to this grid.

        Raises:
            ConfigError: The shape has more than `LARGEST_GRID` voxels.
        """
        if self.shape is not None:
            return self.shape
        assert self.spacing_mm is not None
        sizes = zip(volume.shape, volume.spacing_mm, self.spacing_mm, strict=True)
        x, y, z = (max(2, round(n * own / wanted)) for n, own, wanted in sizes)
        if x * y * z > LARGEST_GRID:
            raise ConfigError(
                f"spacing_mm {self.spacing_mm} resamples a scan to {x} x {y} x {z} voxels, more "
                f"than {LARGEST_GRID}",
                "give a larger spacing",
            )
        return x, y, z


def resample(array: NDArray[Any], shape: Sequence[int], nearest: bool = False) -> NDArray[Any]:
    """Resample an array `(X, Y, Z)` to `shape` over the same extent; the dtype is preserved."""
    if array.shape == tuple(shape):
        return array
    from scipy import ndimage  # slow import that most models do not need

    factors = [wanted / own for wanted, own in zip(shape, array.shape, strict=True)]
    order = 0 if nearest else 1
    return np.asarray(ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True))


def resample_volume(volume: Volume, grid: Grid | None) -> Volume:
    """Resample `volume` to `grid`; returned unchanged if `grid` is None."""
    if grid is None:
        return volume
    shape = grid.shape_for(volume)
    factors = np.array(volume.shape) / shape
    step = np.diag([*factors, 1.0])
    step[:3, 3] = (factors - 1) / 2  # centre of the first voxel; its outer face is fixed
    channels = [resample(channel, shape) for channel in volume.channels]
    return replace(volume, channels=channels, affine=volume.affine @ step)


def restore_logits(
    logits: NDArray[np.float32], box: Box, grid_shape: Sequence[int], shape: Sequence[int]
) -> NDArray[np.float32]:
    """Resample logits of a box of the grid to the whole scan.

    Args:
        logits: `(K, X, Y, Z)` float32 logits of the box.
        box: Position of the block on the grid.
        grid_shape: Number of voxels of the grid along X, Y and Z.
        shape: Number of voxels of the scan along X, Y and Z.

    Returns:
        `(K, *shape)` float32. Outside the box all classes are 0, so that argmax returns background.
    """
    restored = np.empty((len(logits), *shape), np.float32)
    for index, values in enumerate(logits):
        whole = np.zeros(grid_shape, np.float32)
        whole[box.slices()] = values
        restored[index] = resample(whole, shape)
    return restored
