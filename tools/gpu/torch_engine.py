"""The shipped network in torch, on the device's stream and memory: an engine for checks only.

With it, a machine that has torch but neither TensorRT nor ONNX Runtime for CUDA can run the CUDA
pipeline with its kernels, streams, events, graphs and memory. It implements
`attnseg.runtime.engines.device.DeviceEngine`. See docs/gpu.md for the engines that run a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnseg import Bundle
from attnseg.export.source.checkpoint import load_trained
from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.device import Device, Region, bytes_at
from attnseg.runtime.engines.base import EngineInfo


class _Memory:
    """Memory of a CUDA device, which torch reads by `__cuda_array_interface__` without a copy."""

    def __init__(self, pointer: int, shape: Sequence[int], half: bool, stream: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "typestr": "<f2" if half else "<f4",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
            "stream": stream or 1,
        }


class TorchEngine:
    """Runs the weights of a bundle in torch, with channels-last memory."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        batch: int = 12,
        half: bool = True,
        graphs: bool = False,
    ) -> None:
        """Load the weights on a device.

        Args:
            bundle: Bundle of the model.
            device: Device that runs the engine; torch runs on the processor unless it is a
                `CudaDevice`.
            batch: Largest number of windows per call.
            half: Whether to run in fp16 rather than fp32.
            graphs: Whether the second run for a pair of addresses is recorded as a CUDA graph and
                replayed from then on, as in the TensorRT adapter.
        """
        self.device, self.half, self.batches = device, half, (batch, 1)
        self.memory_bytes, self.classes = 0, len(bundle.manifest.task.labels)
        self.recorded = "yes" if graphs else "no: it was not requested"
        self._cuda = isinstance(device, CudaDevice)
        self._graphs = graphs and self._cuda
        self._recorded: dict[tuple[int, int, int], Any] = {}
        self._pool: Any = None
        precision = "fp16" if half else "fp32"
        self.info = EngineInfo("torch", torch.__version__, precision, device.name)
        network = load_trained(bundle.file("weights")).network.eval().requires_grad_(False)
        with device.active():
            if self._cuda:
                torch.backends.cudnn.benchmark = True
                torch.backends.cudnn.deterministic = True
                torch.backends.cuda.matmul.allow_tf32 = False
                torch.backends.cudnn.allow_tf32 = False
                network = network.to(f"cuda:{device.ordinal}")
                torch.cuda.synchronize()
            network = network.half() if half else network
            self._network = network.to(memory_format=torch.channels_last_3d)
            if self._cuda:
                torch.cuda.synchronize()  # the device's stream does not wait for the upload

    def _stream(self) -> AbstractContextManager[Any]:
        if not self._cuda:
            return nullcontext()
        handle = self.device.stream
        if handle == 1:  # another handle of the default stream
            return torch.cuda.stream(torch.cuda.default_stream(self.device.ordinal))
        external = torch.cuda.ExternalStream(handle, device=f"cuda:{self.device.ordinal}")
        return torch.cuda.stream(external)

    def _tensor(self, region: Region, shape: Sequence[int]) -> torch.Tensor:
        if self._cuda:
            memory = _Memory(region.pointer, shape, self.half, self.device.stream)
            return torch.as_tensor(memory, device=f"cuda:{self.device.ordinal}")
        kind = np.float16 if self.half else np.float32
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return torch.from_numpy(bytes_at(region.pointer, size).view(kind).reshape(tuple(shape)))

    def _run(self, images: torch.Tensor, logits: torch.Tensor) -> None:
        given = images.contiguous(memory_format=torch.channels_last_3d)
        logits.copy_(self._network(given))

    def _record(self, work: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device=f"cuda:{self.device.ordinal}")
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
            work()
        return graph

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """See `attnseg.runtime.engines.device.DeviceEngine.enqueue`."""
        shape = tuple(shape)
        given = self._tensor(images, shape)
        made = self._tensor(logits, (shape[0], self.classes, *shape[2:]))
        key = images.pointer, logits.pointer, shape[0]
        with torch.inference_mode(), self._stream():
            if not self._graphs or key not in self._recorded:
                self._recorded[key] = None
                self._run(given, made)
                return
            if self._recorded[key] is None:
                self._recorded[key] = self._record(lambda: self._run(given, made))
            self._recorded[key].replay()

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        kind = np.float16 if self.half else np.float32
        content = np.ascontiguousarray(batch, kind)
        logits = np.empty((len(batch), self.classes, *batch.shape[2:]), kind)
        with self.device.active():
            taken, given = (
                Region.of(self.device.allocate(array.nbytes), 0, array.nbytes)
                for array in (content, logits)
            )
            self.device.upload(content, taken)
            self.enqueue(taken, given, batch.shape)
            self.device.download(given, logits)
        return logits.astype(np.float32)
