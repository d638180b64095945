"""The window plan and the importance map of sliding-window inference.

Positions and weights are those of MONAI `sliding_window_inference` (Gaussian mode, sigma
0.125 of the window), so that both give the same logits for the same network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """A box of voxels: `start` inclusive, `stop` exclusive, along X, Y and Z."""

    start: Shape
    stop: Shape

    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the window in an `(X, Y, Z)` array."""
        x, y, z = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return x, y, z


@dataclass(frozen=True)
class WindowPlan:
    """Where the windows lie.

    Attributes:
        padded_shape: X, Y, Z of the volume after padding, at least the window everywhere.
        pad_before: voxels added in front along X, Y and Z; as many or one more follow behind.
        window: X, Y, Z of each window.
        windows: in the order X slowest, Z fastest, in padded coordinates.
    """

    padded_shape: Shape
    pad_before: Shape
    window: Shape
    windows: tuple[Window, ...]

    def inner(self, shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """Index of the unpadded volume of `shape` in the padded one."""
        x, y, z = (slice(p, p + s) for p, s in zip(self.pad_before, shape, strict=True))
        return x, y, z


def _starts(size: int, window: int, stride: int) -> list[int]:
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


def plan_windows(shape: Sequence[int], window: Sequence[int], overlap: float = 0.25) -> WindowPlan:
    """Plan windows that cover a volume.

    Args:
        shape: X, Y, Z of the volume, in voxels.
        window: X, Y, Z of the window, in voxels.
        overlap: share of a window that it has in common with the next, 0 <= overlap < 1.

    Returns:
        The plan. The last window along each axis ends at the volume's end; a volume smaller
        than the window is padded on both sides.

    Raises:
        ConfigError: the overlap is out of range, or the window is not positive.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap must be at least 0 and below 1, got {overlap}")
    if min(window) < 1:
        raise ConfigError(f"window must be at least 1 voxel along each axis, got {tuple(window)}")
    padded = [max(s, w) for s, w in zip(shape, window, strict=True)]
    before = [(p - s) // 2 for p, s in zip(padded, shape, strict=True)]
    starts = [
        _starts(p, w, max(1, int(w * (1 - overlap)))) for p, w in zip(padded, window, strict=True)
    ]
    windows = tuple(
        Window((x, y, z), (x + window[0], y + window[1], z + window[2]))
        for x, y, z in product(*starts)
    )
    return WindowPlan(
        (padded[0], padded[1], padded[2]),
        (before[0], before[1], before[2]),
        (window[0], window[1], window[2]),
        windows,
    )


def importance_map(window: Sequence[int], sigma_scale: float = 0.125) -> NDArray[np.float32]:
    """Gaussian weight of each voxel of a window, 1 near its centre.

    Args:
        window: X, Y, Z in voxels.
        sigma_scale: standard deviation as a share of the window.

    Returns:
        `(X, Y, Z)` float32, at least 1e-3 everywhere, so that no covered voxel loses its weight.
    """
    weights = np.ones((1, 1, 1), np.float32)
    for axis, size in enumerate(window):
        position = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
        gauss = np.exp(position**2 / np.float32(-2 * (sigma_scale * size) ** 2))
        weights = weights * gauss.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.maximum(weights, np.float32(1e-3))
