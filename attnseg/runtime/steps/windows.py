"""Window plan and importance map of sliding-window inference.

Positions and weights match MONAI `sliding_window_inference` (Gaussian mode, sigma 0.125 of the
window), so that both return the same logits for the same network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError, Setting, VolumeError
from attnseg.runtime.geometry import Box, Shape, Slices, format_size, shape_of

LARGEST_WINDOW = 1 << 24
"""Largest number of voxels of a window: 256 along each axis."""
MOST_WINDOWS = 100_000
_LARGEST_PADDING = 32  # of the number of voxels of a large image


@dataclass(frozen=True)
class WindowPlan:
    """Positions of the windows in one image.

    Attributes:
        shape: Number of voxels of the image along X, Y and Z.
        padded_shape: Shape after padding, at least the window along each axis.
        pad_before: Padding in front along X, Y and Z, in voxels; the padding behind is equal or one
            voxel larger.
        window: Number of voxels of a window along X, Y and Z.
        windows: Boxes of the windows in the padded image, X slowest, Z fastest.
    """

    shape: Shape
    padded_shape: Shape
    pad_before: Shape
    window: Shape
    windows: tuple[Box, ...]

    @property
    def inner(self) -> Slices:
        """Index of the image in the padded image."""
        x, y, z = (slice(p, p + s) for p, s in zip(self.pad_before, self.shape, strict=True))
        return x, y, z


@dataclass(frozen=True)
class WindowOptions:
    """Options of sliding-window inference.

    Attributes:
        window: Number of voxels of a window along X, Y and Z; None for one window over the whole
            image.
        overlap: Overlap of neighbouring windows as a fraction of the window, 0 <= overlap < 1.
        window_multiple: Number of voxels that the network's input sizes must be a multiple of.
    """

    window: Shape | None
    overlap: float = 0.25
    window_multiple: int = 16

    def plan(self, shape: Sequence[int]) -> WindowPlan:
        """Window plan for an image of `shape` (X, Y, Z).

        Raises:
            VolumeError: The windows would be much larger than the image.
            ConfigError: There would be too many windows.
        """
        multiple = self.window_multiple
        window = self.window or shape_of([-(-s // multiple) * multiple for s in shape])
        padded = math.prod(max(s, w) for s, w in zip(shape, window, strict=True))
        if padded > LARGEST_WINDOW and padded > _LARGEST_PADDING * math.prod(shape):
            raise VolumeError(
                f"{format_size(shape)} voxels would be padded to {padded} for windows of "
                f"{format_size(window)}, more than {_LARGEST_PADDING} times as many",
                "give the whole scan",
            )
        return plan_windows(shape, window, self.overlap)


def _starts(size: int, window: int, stride: int) -> list[int]:
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


def plan_windows(shape: Sequence[int], window: Sequence[int], overlap: float = 0.25) -> WindowPlan:
    """Plan the windows that cover a volume.

    Args:
        shape: Number of voxels of the volume along X, Y and Z.
        window: Number of voxels of a window along X, Y and Z.
        overlap: Overlap of neighbouring windows as a fraction of the window, 0 <= overlap < 1.

    Returns:
        Window plan. The last window along each axis ends at the volume's last voxel; a volume
        smaller than the window is padded on both sides.

    Raises:
        ConfigError: The overlap is out of range, the window is not positive, or there would be more
            than `MOST_WINDOWS` windows.
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
    count = math.prod(len(along) for along in starts)
    if count > MOST_WINDOWS:
        raise ConfigError(
            f"overlap {overlap:g} needs {count} windows, more than {MOST_WINDOWS}",
            "use a smaller {}",
            Setting("overlap"),
        )
    windows = tuple(
        Box((x, y, z), (x + window[0], y + window[1], z + window[2]))
        for x, y, z in product(*starts)
    )
    return WindowPlan(
        shape_of(shape), shape_of(padded), shape_of(before), shape_of(window), windows
    )


def importance_map(window: Sequence[int], sigma_scale: float = 0.125) -> NDArray[np.float32]:
    """Gaussian weight of each voxel of a window, highest (at most 1) at the centre.

    Args:
        window: Number of voxels of the window along X, Y and Z.
        sigma_scale: Standard deviation as a fraction of the window.

    Returns:
        `(X, Y, Z)` float32, at least 1e-3, so that the sum of weights is positive in every voxel.
    """
    weights = np.ones((1, 1, 1), np.float32)
    for axis, size in enumerate(window):
        position = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
        gauss = np.exp(position**2 / np.float32(-2 * (sigma_scale * size) ** 2))
        weights = weights * gauss.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.maximum(weights, np.float32(1e-3))


def pad_image(image: NDArray[np.float32], plan: WindowPlan) -> NDArray[np.float32]:
    """Zero-pad an image `(C, X, Y, Z)` to the padded shape of a plan."""
    if image.shape[1:] == plan.padded_shape:
        return image
    padded = np.zeros((image.shape[0], *plan.padded_shape), np.float32)
    padded[(slice(None), *plan.inner)] = image
    return padded
