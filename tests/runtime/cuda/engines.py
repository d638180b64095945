"""Engines on host arrays that stand in for engines on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.engines.onnxruntime_cuda import OnnxRuntimeDeviceEngine


class Through:
    """An engine on a device whose work the host does: its input comes down, its logits go up."""

    def __init__(
        self,
        device: Device,
        engine: Engine,
        batches: tuple[int, int] = (3, 1),
        half: bool = False,
        classes: int = 4,
    ) -> None:
        self.device, self.engine, self.batches, self.half = device, engine, batches, half
        self.memory_bytes, self.classes, self.recorded = 0, classes, "no: it runs on the host"
        self.info = EngineInfo(engine.info.name, "1", "fp16" if half else "fp32", device.name)
        self.shapes: list[tuple[int, ...]] = []
        self.failures: list[Exception] = []

    def infer(self, batch: np.ndarray) -> Any:
        return self.engine.infer(batch)

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        kind = np.float16 if self.half else np.float32
        batch = np.empty(tuple(shape), kind)
        assert images.size_bytes == batch.nbytes
        for region in (images, logits):  # TensorRT takes no other addresses
            assert (region.pointer - region.buffer.pointer) % 256 == 0
        self.device.download(images, batch)
        self.shapes.append(batch.shape)
        with np.errstate(all="ignore"):  # unused slots of a batch are uninitialised
            windows = batch.astype(np.float32)
            result = np.concatenate([self.engine.infer(window[None]) for window in windows])
            self.device.upload(np.ascontiguousarray(result.astype(kind)), logits)


class Halved:
    """An engine of host arrays that takes and gives what fp16 can hold."""

    def __init__(self, engine: Engine) -> None:
        self.info, self._engine = engine.info, engine

    def infer(self, batch: np.ndarray) -> Any:
        rounded = batch.astype(np.float16).astype(np.float32)
        return self._engine.infer(rounded).astype(np.float16).astype(np.float32)


class OnHost(OnnxRuntimeDeviceEngine):
    """ONNX Runtime's engine for a device, bound to memory of the host."""

    device_type = "cpu"
