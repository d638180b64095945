"""The sliding window on numpy: the reference for every other implementation, and the CPU path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import Engine, not_finite
from attnseg.runtime.geometry import Box
from attnseg.runtime.pipelines.base import Progress, check_channels
from attnseg.runtime.steps.clock import StageClock, Step
from attnseg.runtime.steps.windows import WindowPlan, importance_map, pad_image

_SUM_TYPE = {"single": np.float32, "half": np.float16}


class _Sums:
    """Weighted sums of the logits, and of the weights, of the planes that windows still reach.

    Only the planes from `first` on along X that a window may cover are held.
    """

    def __init__(self, background: NDArray[np.float32], plan: WindowPlan) -> None:
        kind, (_, y, z) = _SUM_TYPE[plan.blending.accumulate], plan.padded_shape
        self._plan, self._weights = plan, importance_map(plan.window, plan.blending.weights)
        channels, self._background = len(background), background
        self._logits = np.zeros((channels, plan.window[0], y, z), kind)
        self._total = np.zeros((plan.window[0], y, z), kind)
        self._weighted = np.empty((channels, *plan.window), np.float32)
        self.first = 0

    def add(self, logits: NDArray[np.float32], window: Box) -> None:
        """Add the logits `(K, X, Y, Z)` of a window that begins at plane `first`."""
        _, y, z = window.slices()
        weighted, sums = self._weighted, self._logits[:, :, y, z]
        np.multiply(logits, self._weights, out=weighted)
        if sums.dtype == np.float32:
            sums += weighted
            self._total[:, y, z] += self._weights
            return
        weighted += sums  # in float32, and rounded once, as PyTorch adds float32 to float16
        sums[:] = weighted
        self._total[:, y, z] = self._total[:, y, z].astype(np.float32) + self._weights

    def take(self, until: int) -> NDArray[np.float32]:
        """Mean logits of the image's part of the planes `first` to `until`, which are dropped.

        Voxels without a window have the logits of background.
        """
        count = until - self.first
        before, (_, y, z) = self._plan.pad_before[0], self._plan.inner
        skipped = max(0, before - self.first)
        size = min(until, before + self._plan.shape[0]) - self.first
        logits: NDArray[np.float32] = self._logits[:, skipped:size, y, z].astype(np.float32)
        total = self._total[skipped:size, y, z].astype(np.float32)
        uncovered = total == 0
        np.maximum(total, np.finfo(np.float32).tiny, out=total)
        np.divide(logits, total, out=logits)
        if uncovered.any():
            logits[:, uncovered] = self._background[:, None]
        if self._logits.dtype == np.float16:
            logits = np.asarray(logits.astype(np.float16), np.float32)
        self._drop(count)
        self.first = until
        return logits

    def _drop(self, count: int) -> None:
        """Move the planes behind the first `count` ones to the front."""
        for sums in (self._logits, self._total[None]):
            for planes in sums:
                planes[: len(planes) - count] = planes[count:]
                planes[len(planes) - count :] = 0


def _infer(engine: Engine, batch: NDArray[np.float32], plan: WindowPlan) -> NDArray[np.float32]:
    """Logits `(K, X, Y, Z)` of a window `(1, C, X, Y, Z)`, averaged over its mirror images."""
    mirrors = plan.blending.mirrors
    if len(mirrors) == 1:
        single: NDArray[np.float32] = engine.infer(batch)[0]
        return single
    total: NDArray[np.float32] | None = None
    for axes in mirrors:
        own = tuple(2 + axis for axis in axes)
        logits = np.flip(engine.infer(np.ascontiguousarray(np.flip(batch, own))), own)[0]
        total = logits.copy() if total is None else np.add(total, logits, out=total)
    assert total is not None
    total /= np.float32(len(mirrors))
    return total


def sweep(
    image: NDArray[np.float32],
    engine: Engine,
    plan: WindowPlan,
    background: NDArray[np.float32],
    progress: Progress | None = None,
    clock: StageClock | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Logits of an image, blended from overlapping windows, plane by plane along X.

    Each voxel is the mean of the windows that cover it, weighted by the importance map and divided
    by the true sum of the weights. Planes are returned as soon as no further window covers them.

    Args:
        image: `(C, X, Y, Z)` float32, normalised.
        engine: Engine that runs the network.
        plan: Windows for an image of this shape.
        background: `(K,)` logits of a voxel in none of the windows that are run.
        progress: Callback for the completed fraction of the windows.
        clock: Clock that times the steps `network` and `blend`.

    Yields:
        Consecutive parts `(K, x, Y, Z)` of the logits `(K, X, Y, Z)`, float32.

    Raises:
        BundleError: The network returns another number of channels.
        EngineError: The engine failed, or returned logits that are not finite.
    """
    clock = clock or StageClock()
    with clock.stage(Step.BLEND):
        padded, sums = pad_image(image, plan), _Sums(background, plan)
        batch = np.empty((1, image.shape[0], *plan.window), np.float32)
    for done, window in enumerate(plan.windows, start=1):
        if window.start[0] > sums.first:
            with clock.stage(Step.BLEND):
                finished = sums.take(window.start[0])
            if finished.shape[1]:
                yield finished
        content = padded[(slice(None), *window.slices())]
        if plan.blending.empty_windows == "run" or content.any():
            with clock.stage(Step.BLEND):
                batch[0] = content
            with clock.stage(Step.NETWORK):
                logits = _infer(engine, batch, plan)
            with clock.stage(Step.BLEND):
                check_channels(len(logits), len(background))
                if not np.isfinite(logits).all():
                    raise not_finite(engine.info)
                sums.add(logits, window)
        if progress:
            progress(done / len(plan.windows))
    with clock.stage(Step.BLEND):
        finished = sums.take(plan.padded_shape[0])
    yield finished


def sliding_window(
    image: NDArray[np.float32],
    engine: Engine,
    plan: WindowPlan,
    background: NDArray[np.float32],
    progress: Progress | None = None,
    clock: StageClock | None = None,
) -> NDArray[np.float32]:
    """Logits `(K, X, Y, Z)` of an image; see `sweep`."""
    parts = sweep(image, engine, plan, background, progress, clock)
    return collected(parts, len(background), image.shape[1:])


def collected(
    parts: Iterator[NDArray[np.float32]], channels: int, shape: Sequence[int]
) -> NDArray[np.float32]:
    """Array `(K, *shape)` of its consecutive parts `(K, x, Y, Z)`."""
    whole, start = np.empty((channels, *shape), np.float32), 0
    for part in parts:
        whole[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return whole
