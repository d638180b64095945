"""Window plan and importance map of sliding-window inference.

Positions and weights are those of MONAI's `sliding_window_inference` (modes `gaussian`, with sigma
0.125 of the window, and `constant`) or of nnU-Net 2's predictor, so that the runtime returns the
logits of either for the same network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError, Setting, VolumeError
from attnseg.runtime.geometry import Box, Shape, Slices, along_axes, format_size, shape_of

LARGEST_WINDOW = 1 << 24
"""Largest number of voxels of a window: 256 along each axis."""
MOST_WINDOWS = 100_000
_LARGEST_PADDING = 32  # of the number of voxels of a large image

Placement = Literal["stride", "even"]
"""Positions of windows: a fixed stride, the last window moved back to the end of the image, as in
MONAI; or the fewest windows with at least the overlap, evenly spread, as in nnU-Net."""
Weights = Literal["gaussian", "gaussian-nnunet", "constant"]
"""Weights of a window's voxels; see `importance_map`."""
Accumulate = Literal["single", "half"]
"""Type of the weighted sums of logits: float32, or float16 as in nnU-Net."""
EmptyWindows = Literal["skip", "run"]
"""Whether windows without a non-zero voxel are background, or are run through the network."""


@dataclass(frozen=True)
class Blending:
    """Combination of the logits of overlapping windows.

    Attributes:
        weights: Weights of a window's voxels.
        mirror_axes: Axes of the image along which windows are mirrored; the logits of all
            combinations are averaged.
        accumulate: Type of the weighted sums.
        empty_windows: Treatment of windows without a non-zero voxel.
    """

    weights: Weights = "gaussian"
    mirror_axes: tuple[int, ...] = ()
    accumulate: Accumulate = "single"
    empty_windows: EmptyWindows = "skip"

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Axes that are reversed in each run of a window, the window itself first."""
        axes = self.mirror_axes
        return tuple(own for count in range(len(axes) + 1) for own in combinations(axes, count))


@dataclass(frozen=True)
class WindowPlan:
    """Positions of the windows in one image.

    Attributes:
        shape: Number of voxels of the image along X, Y and Z.
        padded_shape: Shape after padding, at least the window along each axis.
        pad_before: Padding in front along X, Y and Z, in voxels; the padding behind is equal or one
            voxel larger.
        window: Number of voxels of a window along X, Y and Z.
        starts: First voxels of the windows in the padded image along X, Y and Z, ascending.
        blending: Combination of their logits.
    """

    shape: Shape
    padded_shape: Shape
    pad_before: Shape
    window: Shape
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    blending: Blending = Blending()

    @cached_property
    def windows(self) -> tuple[Box, ...]:
        """Boxes of the windows in the padded image, X slowest, Z fastest."""
        x, y, z = self.window
        return tuple(Box((i, j, k), (i + x, j + y, k + z)) for i, j, k in product(*self.starts))

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
        window_multiple: Number of voxels that the network's input sizes must be a multiple of;
            one number, or three along X, Y and Z.
        placement: Positions of the windows.
        blending: Combination of their logits.
    """

    window: Shape | None
    overlap: float = 0.25
    window_multiple: int | Shape = 16
    placement: Placement = "stride"
    blending: Blending = Blending()

    def plan(self, shape: Sequence[int]) -> WindowPlan:
        """Window plan for an image of `shape` (X, Y, Z).

        Raises:
            VolumeError: The windows would be much larger than the image.
            ConfigError: There would be too many windows.
        """
        multiples = zip(shape, along_axes(self.window_multiple), strict=True)
        window = self.window or shape_of([-(-s // m) * m for s, m in multiples])
        padded = math.prod(max(s, w) for s, w in zip(shape, window, strict=True))
        if padded > LARGEST_WINDOW and padded > _LARGEST_PADDING * math.prod(shape):
            raise VolumeError(
                f"{format_size(shape)} voxels would be padded to {padded} for windows of "
                f"{format_size(window)}, more than {_LARGEST_PADDING} times as many",
                "give the whole scan",
            )
        return plan_windows(shape, window, self.overlap, self.placement, self.blending)


def _starts(size: int, window: int, overlap: float) -> list[int]:
    stride = max(1, int(window * (1 - overlap)))
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


def _even_starts(size: int, window: int, overlap: float) -> list[int]:
    """Starts of nnU-Net's `compute_steps_for_sliding_window`."""
    last = size - window
    gaps = math.ceil(last / (window * (1 - overlap)))
    return [round(last / gaps * i) if gaps else 0 for i in range(gaps + 1)]


_STARTS = {"stride": _starts, "even": _even_starts}


def plan_windows(
    shape: Sequence[int],
    window: Sequence[int],
    overlap: float = 0.25,
    placement: Placement = "stride",
    blending: Blending | None = None,
) -> WindowPlan:
    """Plan the windows that cover a volume.

    Args:
        shape: Number of voxels of the volume along X, Y and Z.
        window: Number of voxels of a window along X, Y and Z.
        overlap: Overlap of neighbouring windows as a fraction of the window, 0 <= overlap < 1.
        placement: Positions of the windows.
        blending: Combination of their logits; None for the default.

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
    x, y, z = (_STARTS[placement](p, w, overlap) for p, w in zip(padded, window, strict=True))
    count = len(x) * len(y) * len(z)
    if count > MOST_WINDOWS:
        raise ConfigError(
            f"overlap {overlap:g} needs {count} windows, more than {MOST_WINDOWS}",
            "use a smaller {}",
            Setting("overlap"),
        )
    return WindowPlan(
        shape=shape_of(shape),
        padded_shape=shape_of(padded),
        pad_before=shape_of(before),
        window=shape_of(window),
        starts=(tuple(x), tuple(y), tuple(z)),
        blending=blending or Blending(),
    )


_SIGMA = 0.125  # standard deviation of the Gaussian weights, as a fraction of the window


def importance_map(window: Sequence[int], weights: Weights = "gaussian") -> NDArray[np.float32]:
    """Weight of each voxel of a window.

    Args:
        window: Number of voxels of the window along X, Y and Z.
        weights: `gaussian` for MONAI's map, at most 1 and highest at the centre; `gaussian-nnunet`
            for nnU-Net's, which is centred on voxel n // 2, scaled to 10 and rounded to float16;
            `constant` for 1 everywhere.

    Returns:
        `(X, Y, Z)` float32, positive, so that the sum of weights is positive in every voxel.
    """
    if weights == "constant":
        return np.ones(tuple(window), np.float32)
    return _nnunet_map(shape_of(window)) if weights == "gaussian-nnunet" else _monai_map(window)


@lru_cache(maxsize=2)  # a full window has another size in every case
def _nnunet_map(window: Shape) -> NDArray[np.float32]:
    """nnU-Net's `compute_gaussian`: a filtered point; zeros are raised to the least weight."""
    from scipy import ndimage

    point = np.zeros(window)
    point[tuple(size // 2 for size in window)] = 1
    sigma = [size * _SIGMA for size in window]
    smooth = ndimage.gaussian_filter(point, sigma, 0, mode="constant", cval=0)
    single = (smooth / (smooth.max() / 10)).astype(np.float32)
    rounded = single.astype(np.float16)  # twice, as PyTorch converts float64 to float16
    rounded[rounded == 0] = rounded[rounded > 0].min()
    found: NDArray[np.float32] = rounded.astype(np.float32)
    found.flags.writeable = False  # it is kept
    return found


def _monai_map(window: Sequence[int]) -> NDArray[np.float32]:
    weights = np.ones((1, 1, 1), np.float32)
    for axis, size in enumerate(window):
        position = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
        gauss = np.exp(position**2 / np.float32(-2 * (_SIGMA * size) ** 2))
        weights = weights * gauss.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.maximum(weights, np.float32(1e-3))


def pad_image(image: NDArray[np.float32], plan: WindowPlan) -> NDArray[np.float32]:
    """Zero-pad an image `(C, X, Y, Z)` to the padded shape of a plan."""
    if image.shape[1:] == plan.padded_shape:
        return image
    padded = np.zeros((image.shape[0], *plan.padded_shape), np.float32)
    padded[(slice(None), *plan.inner)] = image
    return padded
