"""The sliding window on numpy: the reference for every other implementation, and the CPU path."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import Engine, not_finite
from attnseg.runtime.pipelines.base import Progress
from attnseg.runtime.steps.clock import StageClock, Step
from attnseg.runtime.steps.windows import WindowPlan, importance_map, pad_image


def sliding_window(
    image: NDArray[np.float32],
    engine: Engine,
    plan: WindowPlan,
    progress: Progress | None = None,
    clock: StageClock | None = None,
) -> NDArray[np.float32]:
    """Logits of a whole image, blended from overlapping windows.

    Each voxel is the mean of the windows that cover it, weighted by the Gaussian importance
    map and divided by the true sum of the weights, in float32. A window whose input is all
    zero holds no brain and is skipped.

    Args:
        image: `(C, X, Y, Z)` float32, normalised.
        engine: Engine that runs the network.
        plan: Windows for an image of this shape.
        progress: Callback for the completed fraction of the windows.
        clock: Clock that times the steps `network` and `blend`.

    Returns:
        `(K, X, Y, Z)` float32. Voxels that no window covers are 0 in all classes, which
        argmax reads as background. For an all-zero image the result is `(1, X, Y, Z)` zeros.

    Raises:
        EngineError: The engine failed, or returned logits that are not finite.
    """
    clock = clock or StageClock()
    with clock.stage(Step.BLEND):
        padded = pad_image(image, plan)
        weights = importance_map(plan.window)
        weight_sum = np.zeros(plan.padded_shape, np.float32)
        batch = np.empty((1, image.shape[0], *plan.window), np.float32)
        blended: NDArray[np.float32] | None = None
    for done, window in enumerate(plan.windows, start=1):
        where = window.slices()
        content = padded[(slice(None), *where)]
        if content.any():
            with clock.stage(Step.BLEND):
                batch[0] = content
            with clock.stage(Step.NETWORK):
                logits = engine.infer(batch)[0]
            with clock.stage(Step.BLEND):
                if not np.isfinite(logits).all():
                    raise not_finite(engine.info)
                if blended is None:
                    blended = np.zeros((logits.shape[0], *plan.padded_shape), np.float32)
                    weighted = np.empty_like(logits)
                np.multiply(logits, weights, out=weighted)
                blended[(slice(None), *where)] += weighted
                weight_sum[where] += weights
        if progress:
            progress(done / len(plan.windows))
    if blended is None:
        return np.zeros((1, *image.shape[1:]), np.float32)
    with clock.stage(Step.BLEND):
        np.maximum(weight_sum, np.finfo(np.float32).tiny, out=weight_sum)
        blended /= weight_sum
    return blended[(slice(None), *plan.inner)]
