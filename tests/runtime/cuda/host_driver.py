"""A stand-in on host memory for the part of the CUDA driver API that `CudaDevice` uses.

Streams are synchronous, kernels are those of `host_kernels`. Every call must match the signature of
the real function, and requires a current context where the real one does.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver as real

from attnseg.runtime.cuda.kernels import ARGUMENTS
from tests.runtime.cuda.host_kernels import HostKernels

CONTEXT, CALLERS_CONTEXT = 11, 12
_WITHOUT_CONTEXT = {
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuDeviceGet",
    "cuDevicePrimaryCtxGetState",
    "cuDevicePrimaryCtxRelease",
    "cuDevicePrimaryCtxRetain",
    "cuGetErrorName",
    "cuGetErrorString",
}


class HostDriver:
    """Stands in for the module `cuda.bindings.driver`."""

    def __init__(self, kernels: HostKernels, current: int = 0, memory: int = 1 << 40) -> None:
        self.contexts = [current] if current else []
        self.calls: list[str] = []
        self.primary_active = int(current == CONTEXT)
        self.fails: dict[str, Any] = {}  # errors of the next calls, by function
        self.live: dict[int, np.ndarray] = {}
        self._kernels, self._memory = kernels, memory
        self._kept: list[Any] = []
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or name == "cuuint64_t":
            return getattr(real, name)  # types and enumerations

        def call(*args: Any) -> tuple[Any, ...]:
            inspect.signature(getattr(real, name)).bind(*args)
            self.calls.append(name)
            if name not in _WITHOUT_CONTEXT and not self.contexts:
                return self._status("CUDA_ERROR_INVALID_CONTEXT"), None
            if self.fails.get(name):
                return self._status(self.fails[name].pop(0)), None
            result = getattr(self, f"_{name}")(*args)
            if isinstance(result, real.CUresult):
                return result, None
            results = () if result is None else result if isinstance(result, tuple) else (result,)
            return (self._status("CUDA_SUCCESS"), *results)

        return call

    @staticmethod
    def _status(name: str) -> Any:
        return getattr(real.CUresult, name)

    def used(self) -> int:
        return sum(array.size for array in self.live.values())

    def _new(self) -> int:
        self._kept.append(object())
        return 1000 + len(self._kept)

    def _do(self, stream: int, work: Callable[[], None]) -> None:
        if self._recording is not None and stream == self._record_stream:
            self._recording.append(work)
        else:
            work()

    def _cuGetErrorName(self, error: Any) -> bytes:  # noqa: N802
        return str(error.name).encode()

    def _cuGetErrorString(self, error: Any) -> bytes:  # noqa: N802
        return b"what it means"

    def _cuCtxGetCurrent(self) -> int:  # noqa: N802
        return self.contexts[-1] if self.contexts else 0

    def _cuCtxPushCurrent(self, context: int) -> None:  # noqa: N802
        self.contexts.append(context)

    def _cuCtxPopCurrent(self) -> int:  # noqa: N802
        return self.contexts.pop()

    def _cuDeviceGet(self, number: int) -> int:  # noqa: N802
        return number

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:  # noqa: N802
        return CONTEXT

    def _cuDevicePrimaryCtxGetState(self, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, self.primary_active

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:  # noqa: N802
        pass

    def _cuStreamCreate(self, flags: int) -> int:  # noqa: N802
        return self._new()

    def _cuStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        pass

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:  # noqa: N802
        pass

    def _cuMemPoolCreate(self, properties: Any) -> int:  # noqa: N802
        assert properties.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        return self._new()

    def _cuMemPoolSetAttribute(self, pool: int, attribute: Any, value: Any) -> None:  # noqa: N802
        assert isinstance(value, real.cuuint64_t)

    def _cuMemPoolGetAttribute(self, pool: int, attribute: Any) -> int:  # noqa: N802
        return self.used()

    def _cuMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self._memory - self.used(), self._memory

    def _cuMemAllocFromPoolAsync(self, size: int, pool: int, stream: int) -> Any:  # noqa: N802
        if self.used() + size > self._memory:
            return self._status("CUDA_ERROR_OUT_OF_MEMORY")
        array = np.full(size, 0xA5, np.uint8)  # any content
        self.live[int(array.ctypes.data)] = array
        return int(array.ctypes.data)

    def _cuMemFreeAsync(self, pointer: int, stream: int) -> None:  # noqa: N802
        del self.live[pointer]

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        array = np.full(size, 0xA5, np.uint8)
        self._kept.append(array)
        return int(array.ctypes.data)

    def _cuMemFreeHost(self, pointer: int) -> None:  # noqa: N802
        pass

    def _cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        self._do(stream, lambda: ctypes.memset(target, value, size) and None)

    def _cuMemcpyAsync(self, target: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self._do(stream, lambda: ctypes.memmove(target, source, size) and None)

    def _cuEventCreate(self, flags: int) -> int:  # noqa: N802
        return self._new()

    def _cuEventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        pass

    def _cuEventSynchronize(self, event: int) -> None:  # noqa: N802
        pass

    def _cuEventElapsedTime(self, start: int, end: int) -> float:  # noqa: N802
        return float(end - start)

    def _cuEventDestroy(self, event: int) -> None:  # noqa: N802
        pass

    def _cuModuleLoadData(self, cubin: bytes) -> int:  # noqa: N802
        assert cubin[:4] == b"\x7fELF"
        return self._new()

    def _cuModuleGetFunction(self, module: int, name: bytes) -> str:  # noqa: N802
        return name.decode()

    def _cuLaunchKernel(self, name: str, *rest: Any) -> None:  # noqa: N802
        blocks, threads, stream, parameters = rest[0], rest[3], rest[7], rest[8]
        pointers = (ctypes.c_void_p * 2).from_address(parameters)
        count = ctypes.c_uint.from_address(pointers[0] or 0).value
        assert blocks * threads >= count > (blocks - 1) * threads
        args = ARGUMENTS[name].from_buffer_copy(
            (ctypes.c_char * ctypes.sizeof(ARGUMENTS[name])).from_address(pointers[1] or 0)
        )
        self._do(stream, lambda: self._kernels.launch(name, count, args))

    def _cuStreamBeginCapture(self, stream: int, mode: Any) -> None:  # noqa: N802
        assert isinstance(mode, real.CUstreamCaptureMode)
        self._recording, self._record_stream = [], stream

    def _cuStreamEndCapture(self, stream: int) -> int:  # noqa: N802
        graph = self._new()
        self._graphs[graph], self._recording = self._recording or [], None
        return graph

    def _cuGraphInstantiate(self, graph: int, flags: int) -> int:  # noqa: N802
        return graph

    def _cuGraphExecDestroy(self, graph: int) -> None:  # noqa: N802
        del self._graphs[graph]

    def _cuMemPoolTrimTo(self, pool: int, kept: int) -> None:  # noqa: N802
        pass

    def _cuMemPoolDestroy(self, pool: int) -> None:  # noqa: N802
        assert not self.live

    def _cuStreamDestroy(self, stream: int) -> None:  # noqa: N802
        pass

    def _cuModuleUnload(self, module: int) -> None:  # noqa: N802
        pass

    def _cuGraphDestroy(self, graph: int) -> None:  # noqa: N802
        pass

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:  # noqa: N802
        for work in self._graphs[graph]:
            work()
