"""The sliding window on numpy: the reference for every other executor, and the CPU path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.clock import StageClock
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.errors import EngineError
from attnseg.runtime.windows import Shape, WindowPlan, importance_map, plan_windows

Progress = Callable[[int, int], None]
"""Called with the number of windows done and the number of all."""


@dataclass(frozen=True)
class WindowOptions:
    """How the window slides.

    Attributes:
        window: X, Y, Z in voxels, or None for one window over the whole image.
        overlap: share of a window in common with the next.
        multiple: the network takes sizes that are multiples of this, in voxels.
    """

    window: Shape | None
    overlap: float = 0.25
    multiple: int = 16

    def plan(self, shape: Sequence[int]) -> WindowPlan:
        """The windows for an image of `shape` (X, Y, Z)."""
        window = self.window
        if window is None:
            x, y, z = (-(-s // self.multiple) * self.multiple for s in shape)
            window = (x, y, z)
        return plan_windows(shape, window, self.overlap)


def pad_image(image: NDArray[np.float32], plan: WindowPlan) -> NDArray[np.float32]:
    """`(C, X, Y, Z)` with zeros around it, so that every window of the plan lies inside."""
    if image.shape[1:] == plan.padded_shape:
        return image
    padded = np.zeros((image.shape[0], *plan.padded_shape), np.float32)
    padded[(slice(None), *plan.inner(image.shape[1:]))] = image
    return padded


def sliding_window(
    image: NDArray[np.float32],
    engine: Engine,
    options: WindowOptions,
    progress: Progress | None = None,
    clock: StageClock | None = None,
) -> NDArray[np.float32]:
    """Logits of a whole image, blended from overlapping windows.

    Each voxel is the mean of the windows that cover it, weighted by the Gaussian importance
    map and divided by the true sum of the weights, in float32. A window whose input is all
    zero holds no brain and is skipped.

    Args:
        image: `(C, X, Y, Z)` float32, normalised.
        engine: runs the network.
        options: window and overlap.
        progress: told after each window.
        clock: counts the stages `network` and `blend`.

    Returns:
        `(K, X, Y, Z)` float32. Voxels that no window covers are 0 in all classes, which
        argmax reads as background. The empty case: an all-zero image gives `(1, X, Y, Z)` zeros.

    Raises:
        EngineError: the engine failed, or gave logits that are not finite.
    """
    clock = clock or StageClock()
    plan = options.plan(image.shape[1:])
    with clock.stage("blend"):
        padded = pad_image(image, plan)
        weights = importance_map(plan.window)
        weight_sum = np.zeros(plan.padded_shape, np.float32)
        batch = np.empty((1, image.shape[0], *plan.window), np.float32)
        blended: NDArray[np.float32] | None = None
    for done, window in enumerate(plan.windows, start=1):
        where = window.slices()
        content = padded[(slice(None), *where)]
        if content.any():
            with clock.stage("blend"):
                batch[0] = content
            with clock.stage("network"):
                logits = engine.infer(batch)[0]
            with clock.stage("blend"):
                if not np.isfinite(logits).all():
                    raise EngineError(
                        f"engine {engine.info.name} gave logits that are not finite in "
                        f"{engine.info.precision}; try --precision fp32 or another engine"
                    )
                if blended is None:
                    blended = np.zeros((logits.shape[0], *plan.padded_shape), np.float32)
                    weighted = np.empty_like(logits)
                np.multiply(logits, weights, out=weighted)
                blended[(slice(None), *where)] += weighted
                weight_sum[where] += weights
        if progress:
            progress(done, len(plan.windows))
    if blended is None:
        return np.zeros((1, *image.shape[1:]), np.float32)
    with clock.stage("blend"):
        np.maximum(weight_sum, np.finfo(np.float32).tiny, out=weight_sum)
        blended /= weight_sum
    return blended[(slice(None), *plan.inner(image.shape[1:]))]
