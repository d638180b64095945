"""A device with memory of its own and one stream: CUDA by cuda-core, or the host in its place.

Everything that is given to a device runs in the order in which it was given. `HostDevice` has the
same interface on numpy memory, so that what is written for a device runs where there is none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.kernels import cached_kernels
from attnseg.runtime.errors import EngineError
from attnseg.runtime.gpu import Gpu, find_gpu

_THREADS = 256  # of a block
_P = ParamSpec("_P")
_R = TypeVar("_R")


class DeviceBuffer(Protocol):
    """Memory of a device; it is the caller's, and freed with the last reference to it."""

    @property
    def pointer(self) -> int:
        """Address on the device."""

    @property
    def size_bytes(self) -> int:
        """Its size."""


class Device(Protocol):
    """Where an engine runs."""

    @property
    def name(self) -> str:
        """Of the hardware."""

    @property
    def stream(self) -> int:
        """Handle of the stream, for libraries that enqueue work themselves."""

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        """Memory, with any content.

        Raises:
            EngineError: there is not enough.
        """

    def clear(self, buffer: DeviceBuffer) -> None:
        """Set every byte to 0."""

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """Run a kernel of `attnseg.runtime.cuda.kernels` on indices 0 to `count` - 1."""

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """Copy a C-contiguous array to the start of a buffer; it may be changed afterwards."""

    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """Wait for all work, then copy the start of a buffer to a C-contiguous array."""


def _array(pointer: int, size_bytes: int) -> NDArray[np.uint8]:
    """The bytes at an address of this process."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(pointer))


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    assert array.flags.c_contiguous, "the copy is of memory as it lies"
    return array.reshape(-1).view(np.uint8)


class HostBuffer:
    """Memory of this process."""

    def __init__(self, size_bytes: int) -> None:
        self.bytes = np.empty(size_bytes, np.uint8)
        self.size_bytes = size_bytes
        self.pointer = int(self.bytes.ctypes.data)


Launcher = Callable[[str, int, ctypes.Structure], None]
"""Runs a kernel by name on so many indices."""


class HostDevice:
    """The host in a device's place."""

    name = "host"
    stream = 0

    def __init__(self, launcher: Launcher | None = None) -> None:
        """With `launcher` it runs kernels, which were compiled for the host."""
        self._launcher = launcher

    def clear(self, buffer: DeviceBuffer) -> None:
        """See `Device.clear`."""
        _array(buffer.pointer, buffer.size_bytes)[:] = 0

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """See `Device.launch`."""
        if self._launcher is None:
            raise EngineError("this host device was opened without kernels")
        self._launcher(name, count, args)

    def allocate(self, size_bytes: int) -> HostBuffer:
        """See `Device.allocate`."""
        return HostBuffer(size_bytes)

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """See `Device.upload`."""
        content = _as_bytes(source)
        _array(target.pointer, target.size_bytes)[: content.size] = content

    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """See `Device.download`."""
        content = _as_bytes(target)
        content[:] = _array(source.pointer, source.size_bytes)[: content.size]


def _in(step: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """CUDA's errors in this step as `EngineError` with their name, their meaning and the step."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except EngineError:
                raise
            except Exception as error:  # cuda-core's errors share no base but Exception
                text = " ".join(str(error).split())
                advice = "; free memory on the GPU" if "OUT_OF_MEMORY" in text else ""
                raise EngineError(f"the GPU failed in {step}: {text}{advice}") from error

        return guarded

    return decorate


class CudaBuffer:
    """Memory of a CUDA device, or pinned memory of the host."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.pointer = int(buffer.handle)
        self.size_bytes = int(buffer.size)


class CudaDevice:
    """The first CUDA device, with a stream of its own and pinned memory to copy through."""

    def __init__(self) -> None:
        """Raises `EngineError` without cuda-core, driver or device."""
        self.gpu: Gpu = find_gpu()
        self.name = self.gpu.name
        self._open()

    @_in("opening it")
    def _open(self) -> None:
        from cuda.core import Device as Core
        from cuda.core import LegacyPinnedMemoryResource

        self._device = Core(0)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self.stream = int(self._stream.handle)
        self._pinned_memory = LegacyPinnedMemoryResource()
        self._pinned: CudaBuffer | None = None
        self._module: Any = None
        self._functions: dict[str, Any] = {}

    @_in("allocating memory")
    def allocate(self, size_bytes: int) -> CudaBuffer:
        """See `Device.allocate`."""
        return CudaBuffer(self._device.allocate(size_bytes, stream=self._stream))

    def _staging(self, size_bytes: int) -> CudaBuffer:
        """Pinned memory that no copy uses any more."""
        self._stream.sync()
        if self._pinned is None or self._pinned.size_bytes < size_bytes:
            self._pinned = CudaBuffer(self._pinned_memory.allocate(size_bytes))
        return self._pinned

    def _call(self, step: str, name: str, *args: Any) -> list[Any]:
        """A function of the driver, its error as `EngineError` with name and meaning."""
        from cuda.bindings import driver

        status, *results = getattr(driver, name)(*args)
        if status != driver.CUresult.CUDA_SUCCESS:
            _, error = driver.cuGetErrorName(status)
            _, meaning = driver.cuGetErrorString(status)
            raise EngineError(f"the GPU failed in {step}: {error.decode()}: {meaning.decode()}")
        return list(results)

    def _copy(self, source: int, target: int, size_bytes: int) -> None:
        self._call("a copy", "cuMemcpyAsync", target, source, size_bytes, self.stream)

    def clear(self, buffer: DeviceBuffer) -> None:
        """See `Device.clear`."""
        arguments = (buffer.pointer, 0, buffer.size_bytes, self.stream)
        self._call("clearing memory", "cuMemsetD8Async", *arguments)

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            if self._module is None:
                from platformdirs import user_cache_path

                cubin = cached_kernels(self.gpu.target, Path(user_cache_path("attnseg")))
                (self._module,) = self._call("loading the kernels", "cuModuleLoadData", cubin)
            step = f"finding kernel {name}"
            arguments = (self._module, name.encode())
            (self._functions[name],) = self._call(step, "cuModuleGetFunction", *arguments)
        return self._functions[name]

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """See `Device.launch`."""
        number = ctypes.c_longlong(count)
        # The driver copies what these point to before the call returns.
        pointers = (ctypes.c_void_p * 2)(ctypes.addressof(number), ctypes.addressof(args))
        blocks = (-(-count // _THREADS), 1, 1)
        where = (*blocks, _THREADS, 1, 1, 0, self.stream, ctypes.addressof(pointers), 0)
        self._call(f"kernel {name}", "cuLaunchKernel", self._function(name), *where)

    @_in("upload")
    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """See `Device.upload`."""
        content = _as_bytes(source)
        staging = self._staging(content.size)
        _array(staging.pointer, content.size)[:] = content
        self._copy(staging.pointer, target.pointer, content.size)

    @_in("download")
    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """See `Device.download`."""
        content = _as_bytes(target)
        staging = self._staging(content.size)
        self._copy(source.pointer, staging.pointer, content.size)
        self._stream.sync()
        content[:] = _array(staging.pointer, content.size)
