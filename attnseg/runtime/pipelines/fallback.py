"""Fallback to the CPU: the pipeline that takes over when a GPU is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import DeviceLostError
from attnseg.runtime.pipelines.base import Pending, Pipeline, Progress, Staged
from attnseg.runtime.pipelines.cuda import CudaPipeline, CudaStaged, LostBeforeError


class FallbackPipeline:
    """Segments on a GPU until it is lost, and on the CPU afterwards.

    The volume that is processed on the GPU while it is lost fails; later volumes are segmented on
    the CPU, as is a volume that was processed on the host, whose network alone ran on the GPU. The
    loss may be found by several threads; the second pipeline is opened once.
    """

    def __init__(self, first: Pipeline, open_second: Callable[[], Pipeline]) -> None:
        """Use `first` until its GPU is lost, and then the result of `open_second`."""
        self._current: Pipeline = first
        self._open_second, self._lock = open_second, threading.Lock()

    def _after(self, lost: Pipeline) -> Pipeline:
        """The pipeline after one that is lost, which is released."""
        with self._lock:
            if self._current is lost:
                self._current = self._open_second()
            return self._current

    @property
    def engine(self) -> EngineInfo:
        """See `Pipeline.engine`."""
        return self._current.engine

    def stage(self, volume: Volume) -> Staged:
        """See `Pipeline.stage`."""
        current = self._current
        try:
            return current.stage(volume)
        except DeviceLostError:
            pass
        return self._after(current).stage(volume)

    def submit(
        self, staged: Staged, progress: Progress | None = None, on_device: bool = False
    ) -> Pending:
        """See `Pipeline.submit`."""
        current = self._current
        try:
            return _submit(current, staged, progress, on_device)
        except DeviceLostError as error:
            if isinstance(current, CudaPipeline) and not isinstance(error, LostBeforeError):
                raise
        return _submit(self._after(current), staged, progress, on_device)


def _submit(
    pipeline: Pipeline, staged: Staged, progress: Progress | None, on_device: bool
) -> Pending:
    """Submit a volume that may have been staged on the lost device."""
    if isinstance(staged, CudaStaged) and not isinstance(pipeline, CudaPipeline):
        staged = pipeline.stage(staged.volume)
    return pipeline.submit(staged, progress, on_device)
