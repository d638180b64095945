"""A CUDA device on the CUDA driver API (`cuda.bindings`, a dependency of cuda-core).

The device works in the context that is current when it is opened, or in the primary context of the
first GPU, on a stream of the caller or its own. Memory comes from a pool of its own, which retains
freed memory, so that the next volume is allocated without delay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.compiler import cached_kernels
from attnseg.runtime.cuda.device import DeviceArray, DeviceBuffer, as_bytes, bytes_at
from attnseg.runtime.cuda.driver import Context, Driver, check_gpu
from attnseg.runtime.cuda.gpu import Gpu, find_gpu
from attnseg.runtime.cuda.interop import export_array, view_array
from attnseg.runtime.cuda.kernels import MOST_INDICES
from attnseg.runtime.cuda.pinned import Event, Pinned, PinnedBlocks
from attnseg.runtime.errors import ConfigError, EngineError, OutOfMemoryError, Setting

_THREADS = 256  # per block
_DEFAULT, _PER_THREAD = 1, 2  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
_KEEP_ALL = (1 << 64) - 1


class CudaBuffer:
    """Memory of a CUDA device, freed in the order of the compute stream."""

    def __init__(self, device: CudaDevice, pointer: int, size_bytes: int) -> None:
        self._device, self.pointer, self.size_bytes = device, pointer, size_bytes
        self.busy: Event | None = None  # end of a copy on another stream; not freed before

    def __del__(self) -> None:
        with suppress(Exception):  # the device is lost, or Python shuts down
            self._device.free(self)


class _Recorded:
    """An instantiated CUDA graph, launched by a call and destroyed with this object."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def __call__(self) -> None:
        """Launch the graph."""
        call = self._device.driver
        call("a recorded step", "cuGraphLaunch", self._graph, self._device.stream)

    def __del__(self) -> None:
        with suppress(Exception), self._device.active():
            self._device.driver.names.cuGraphExecDestroy(self._graph)


class _CudaDownload:
    """See `attnseg.runtime.cuda.device.Download`."""

    def __init__(self, device: CudaDevice, source: DeviceBuffer) -> None:
        self._content: NDArray[np.uint8] | None = None
        self._done: Event | None = None
        self._device, self._source = device, source  # referenced until the copy ends
        self._pinned = device.pinned.take_for_download(source.size_bytes)
        self._done = device.copy_down(source, self._pinned)

    def wait(self) -> NDArray[np.uint8]:
        """See `attnseg.runtime.cuda.device.Download`."""
        if self._content is None and self._done is not None:
            with self._device.active():
                self._done.wait("download")
            self._content = bytes_at(self._pinned.pointer, self._source.size_bytes).copy()
            self._device.pinned.keep_for_download(self._pinned)
        assert self._content is not None, "the copy was started by the constructor"
        return self._content

    def __del__(self) -> None:
        if self._content is None and self._done:  # never waited for; the copy must end first
            with suppress(Exception), self._device.active():
                self._done.wait("download")


class CudaDevice:
    """A CUDA device with a compute stream, separate copy streams and a memory pool."""

    def __init__(self, stream: int | None = None, cache: Path | None = None) -> None:
        """Open the device.

        Args:
            stream: Handle of the caller's stream (`CUstream`), on which all work is enqueued; None
                to create one.
            cache: Folder for compiled kernels; None for the user's cache folder.

        Raises:
            UnavailableError: cuda-core, an NVIDIA driver or a supported device is missing.
            ConfigError: `stream` is the per-thread default stream.
            EngineError: The device cannot be opened.
        """
        self.gpu: Gpu = find_gpu()
        check_gpu(self.gpu)
        self.name, self.ordinal = self.gpu.name, self.gpu.ordinal
        self._cache = cache
        self.driver = Driver()
        self.context = Context(self.driver, self.ordinal)
        self.primary = self.context.primary
        self._own_streams: list[int] = []
        self._kept: list[NDArray[np.uint8]] = []  # host sources of uploads in progress
        self.pinned = PinnedBlocks(self.context)
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        if stream == _PER_THREAD:
            raise ConfigError(
                "stream: the per-thread default stream differs in each thread",
                "create a stream, or leave it out",
            )
        with self.active():
            # Some libraries read 0 as "no stream"; 1 is another handle of the default stream.
            self.stream = self._new_stream() if stream is None else stream or _DEFAULT
            self._up, self._down, self._record = (self._new_stream() for _ in range(3))
            self._pool = self._new_pool()

    def __del__(self) -> None:
        with suppress(Exception), self.active():  # not fully opened, or lost
            names = self.driver.names
            names.cuStreamSynchronize(self.stream)
            names.cuMemPoolDestroy(self._pool)
            for stream in self._own_streams:
                names.cuStreamDestroy(stream)
            if self._module is not None:
                names.cuModuleUnload(self._module)

    def _new_stream(self) -> int:
        flag = self.driver.names.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = int(self.driver("creating a stream", "cuStreamCreate", int(flag)))
        self._own_streams.append(stream)
        return stream

    def _new_pool(self) -> Any:
        names = self.driver.names
        properties = names.CUmemPoolProps()
        properties.allocType = names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.ordinal
        pool = self.driver("creating a pool", "cuMemPoolCreate", properties)
        attribute = names.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        keep = names.cuuint64_t(_KEEP_ALL)
        self.driver("creating a pool", "cuMemPoolSetAttribute", pool, attribute, keep)
        return pool

    def active(self) -> AbstractContextManager[None]:
        """See `attnseg.runtime.cuda.device.Device.active`."""
        return self.context.active()

    def free_bytes(self) -> int:
        """See `Device.free_bytes`; unused memory of the pool counts as free."""
        free, _ = self.driver("querying memory", "cuMemGetInfo")
        attributes = self.driver.names.CUmemPool_attribute
        held, used = (
            int(self.driver("querying memory", "cuMemPoolGetAttribute", self._pool, attribute))
            for attribute in (
                attributes.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
                attributes.CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            )
        )
        return int(free) + held - used

    def trim(self) -> None:
        """See `Device.trim`."""
        self.check()  # a free takes effect only when the stream reaches it
        self.driver("releasing memory", "cuMemPoolTrimTo", self._pool, 0)

    def check(self) -> None:
        """See `Device.check`."""
        self.driver("computing", "cuStreamSynchronize", self.stream)

    def _allocate(self, size_bytes: int, stream: int) -> CudaBuffer:
        arguments = (max(size_bytes, 1), self._pool, stream)
        try:
            pointer = self.driver("allocating memory", "cuMemAllocFromPoolAsync", *arguments)
        except OutOfMemoryError:  # frees may be pending, or the pool fragmented
            self.trim()
            pointer = self.driver("allocating memory", "cuMemAllocFromPoolAsync", *arguments)
        return CudaBuffer(self, int(pointer), size_bytes)

    def allocate(self, size_bytes: int) -> CudaBuffer:
        """See `Device.allocate`."""
        return self._allocate(size_bytes, self.stream)

    def free(self, buffer: CudaBuffer) -> None:
        """Free memory after the work enqueued so far."""
        with self.active():
            if buffer.busy:
                self.after(buffer.busy)
            self.driver("freeing memory", "cuMemFreeAsync", buffer.pointer, self.stream)

    def clear(self, buffer: DeviceBuffer) -> None:
        """See `Device.clear`."""
        arguments = (buffer.pointer, 0, buffer.size_bytes, self.stream)
        self.driver("clearing memory", "cuMemsetD8Async", *arguments)

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            if self._module is None:
                self._module = self.driver("loading kernels", "cuModuleLoadData", self._cubin())
            step = f"finding kernel {name}"
            found = self.driver(step, "cuModuleGetFunction", self._module, name.encode())
            self._functions[name] = found
        return self._functions[name]

    def _cubin(self) -> bytes:
        from platformdirs import user_cache_path

        return cached_kernels(self.gpu.target, self._cache or Path(user_cache_path("attnseg")))

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """See `Device.launch`."""
        if count > MOST_INDICES:
            raise EngineError(
                f"kernel {name}: the volume is too large for a GPU",
                "use {}",
                Setting("device", "cpu"),
            )
        number = ctypes.c_uint(count)
        # The driver copies the arguments before the call returns.
        pointers = (ctypes.c_void_p * 2)(ctypes.addressof(number), ctypes.addressof(args))
        blocks = (-(-count // _THREADS), 1, 1)
        where = (*blocks, _THREADS, 1, 1, 0, self.stream, ctypes.addressof(pointers), 0)
        self.driver(f"kernel {name}", "cuLaunchKernel", self._function(name), *where)

    def _copy(self, step: str, source: int, target: int, size_bytes: int, stream: int) -> None:
        where = (target, source, size_bytes, stream)
        self.driver(step, "cuMemcpyAsync", *where)

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """See `Device.upload`; for small arrays, as the host memory is not pinned."""
        content = as_bytes(source).copy()
        self._kept.append(content)
        pointer = int(content.ctypes.data)
        self._copy("upload", pointer, target.pointer, content.size, self.stream)

    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """See `Device.download`."""
        content = as_bytes(target)
        pointer = int(content.ctypes.data)
        self._copy("download", source.pointer, pointer, content.size, self.stream)
        self.driver("download", "cuStreamSynchronize", self.stream)
        self._kept.clear()

    def upload_ahead(self, source: NDArray[Any]) -> tuple[CudaBuffer, Event]:
        """See `Device.upload_ahead`."""
        content = as_bytes(source)
        pinned = self.pinned.take_for_upload(content.size)
        bytes_at(pinned.pointer, content.size)[:] = content
        with self.pinned.upload_lock:
            buffer = self._allocate(content.size, self._up)
            self._copy("upload", pinned.pointer, buffer.pointer, content.size, self._up)
            buffer.busy = pinned.busy = self._event(self._up)
            self.pinned.keep_for_upload(pinned)
            return buffer, pinned.busy

    def copy_down(self, source: DeviceBuffer, pinned: Pinned) -> Event:
        """Copy to pinned memory on the download stream; return the event at the end."""
        ready = self._event(self.stream)
        self.driver("download", "cuStreamWaitEvent", self._down, ready.handle, 0)
        self._copy("download", source.pointer, pinned.pointer, source.size_bytes, self._down)
        return self._event(self._down)

    def download_behind(self, source: DeviceBuffer) -> _CudaDownload:
        """See `Device.download_behind`."""
        return _CudaDownload(self, source)

    def _event(self, stream: int) -> Event:
        return Event(self.context, stream)

    def mark(self) -> Event:
        """See `Device.mark`."""
        return self._event(self.stream)

    def after(self, mark: Any) -> None:
        """See `Device.after`."""
        self.driver("waiting for an upload", "cuStreamWaitEvent", self.stream, mark.handle, 0)

    def recorded(self, work: Callable[[int], None]) -> Callable[[], None]:
        """See `Device.recorded`; captures a CUDA graph on a stream of its own."""
        mode = self.driver.names.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.driver("recording", "cuStreamBeginCapture", self._record, mode)
        try:
            work(self._record)
        except BaseException:
            with suppress(EngineError):  # the error of the work is the one to report
                graph = self.driver("recording", "cuStreamEndCapture", self._record)
                self.driver("recording", "cuGraphDestroy", graph)
            raise
        graph = self.driver("recording", "cuStreamEndCapture", self._record)
        try:
            ready = self.driver("recording", "cuGraphInstantiate", graph, 0)
        finally:
            self.driver("recording", "cuGraphDestroy", graph)
        return _Recorded(self, ready)

    def view(self, array: Any) -> DeviceArray | None:
        """See `Device.view`."""
        return view_array(array, self)

    def exported(self, array: DeviceArray) -> Any:
        """See `Device.exported`."""
        return export_array(array)
