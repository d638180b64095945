"""A CUDA device, by the driver's interface (`cuda.bindings`, which cuda-core brings).

It works in the context that is current where it is opened, or in the primary context of the first
device, and on a stream of the caller or its own. Memory comes from a pool of its own, which keeps
what was freed, so that the next volume finds it at once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.device import DeviceArray, DeviceBuffer, as_bytes, bytes_at
from attnseg.runtime.cuda.kernels import MOST_INDICES, cached_kernels, compiler_version
from attnseg.runtime.errors import (
    ConfigError,
    DeviceLostError,
    EngineError,
    NotHereError,
    OutOfMemoryError,
)
from attnseg.runtime.gpu import Gpu, find_gpu

_THREADS = 256  # of a block
_LEAST_TARGET = 75
_DEFAULT, _PER_THREAD = 1, 2  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
_KEEP_ALL = (1 << 64) - 1
_MOST_DOWNLOADS = 4  # blocks of pinned memory that are kept: labels and numbers of two volumes
_PINNED = 2  # blocks of pinned memory for uploads: one is filled while the other is copied

# After these the context is of no more use: every later call gives the same error.
_LOST = {
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    "CUDA_ERROR_UNKNOWN",
}


def _raise(step: str, name: str, meaning: str) -> None:
    text = f"the GPU failed in {step}: {name} ({meaning})"
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise OutOfMemoryError(f"{text}; free memory on the GPU, see nvidia-smi")
    if name in _LOST:
        raise DeviceLostError(f"{text}; the GPU is of no more use to this process")
    if name in ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"):
        raise NotHereError(f"{text}; update the NVIDIA driver, or use --device cpu")
    raise EngineError(text)


def check_gpu(gpu: Gpu) -> None:
    """Refuse a GPU or a driver that the kernels do not run on. Raises `NotHereError`."""
    if int(gpu.target[2:]) < _LEAST_TARGET:
        raise NotHereError(
            f"{gpu.name} has compute capability {gpu.capability}, the kernels need 7.5 (Turing) or "
            "newer; use --device cpu"
        )
    compiler = compiler_version()
    if int(gpu.driver.split(".")[0]) < compiler[0]:
        raise NotHereError(
            f"the NVIDIA driver is for CUDA {gpu.driver}, the kernels are compiled for "
            f"{compiler[0]}.{compiler[1]}; update the driver, or use --device cpu"
        )


class _Driver:
    """The driver's functions, which raise `EngineError` with the error's name and meaning."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.names = driver

    def __call__(self, step: str, name: str, *args: Any) -> Any:
        """The function's result, None if it has none, or a tuple of several."""
        status, *results = getattr(self.names, name)(*args)
        if int(status):
            _, error = self.names.cuGetErrorName(status)
            _, meaning = self.names.cuGetErrorString(status)
            _raise(step, error.decode(), meaning.decode())
        return results[0] if len(results) == 1 else tuple(results) or None


class CudaBuffer:
    """Memory of a CUDA device; freed in the order of the compute stream."""

    def __init__(self, device: CudaDevice, pointer: int, size_bytes: int) -> None:
        self._device, self.pointer, self.size_bytes = device, pointer, size_bytes
        self.busy: _Event | None = None  # a copy on another stream, before whose end it stays

    def __del__(self) -> None:
        with suppress(Exception):  # of a device that is lost, or when Python ends
            self._device.free(self)


class _Event:
    """A mark in a stream."""

    def __init__(self, device: CudaDevice, stream: int) -> None:
        self._device = device
        self._call = device.driver
        self.handle = self._call("making an event", "cuEventCreate", 0)
        self._call("marking", "cuEventRecord", self.handle, stream)

    def wait(self, step: str) -> None:
        """Until the stream has come here."""
        self._call(step, "cuEventSynchronize", self.handle)

    def elapsed_ms(self, since: _Event) -> float:
        """See `attnseg.runtime.cuda.device.Mark`."""
        with self._device.active():
            self.wait("computing")
            return float(self._call("timing", "cuEventElapsedTime", since.handle, self.handle))

    def __del__(self) -> None:
        with suppress(Exception):
            self._device.driver.names.cuEventDestroy(self.handle)


class _Pinned:
    """Memory of the host from which a device can copy by itself."""

    def __init__(self, device: CudaDevice, size_bytes: int) -> None:
        self._device, self.size_bytes = device, size_bytes
        try:
            found = device.driver("allocating pinned memory", "cuMemHostAlloc", size_bytes, 0)
        except OutOfMemoryError as error:
            raise EngineError(
                f"the host has no {-(-size_bytes // 10**6)} MB of pinned memory for a copy; close "
                "other programs"
            ) from error
        self.pointer = int(found)
        self.busy: _Event | None = None

    def __del__(self) -> None:
        with suppress(Exception), self._device.active():
            self._device.driver.names.cuMemFreeHost(self.pointer)


class _Recorded:
    """A CUDA graph; it is launched by a call, and lives as long as this."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def __call__(self) -> None:
        """Launch it."""
        call = self._device.driver
        call("a recorded step", "cuGraphLaunch", self._graph, self._device.stream)

    def __del__(self) -> None:
        with suppress(Exception), self._device.active():
            self._device.driver.names.cuGraphExecDestroy(self._graph)


class _CudaDownload:
    """See `attnseg.runtime.cuda.device.Download`."""

    def __init__(self, device: CudaDevice, source: DeviceBuffer) -> None:
        self._content: NDArray[np.uint8] | None = None
        self._done: _Event | None = None
        self._device, self._source = device, source  # kept until the copy is done
        self._pinned = device.pinned_for_download(source.size_bytes)
        self._done = device.copy_down(source, self._pinned)

    def wait(self) -> NDArray[np.uint8]:
        """See `attnseg.runtime.cuda.device.Download`."""
        if self._content is None and self._done is not None:
            with self._device.active():
                self._done.wait("download")
            self._content = bytes_at(self._pinned.pointer, self._source.size_bytes).copy()
            self._device.give_back(self._pinned)
        assert self._content is not None, "the copy was started when this was made"
        return self._content

    def __del__(self) -> None:
        if self._content is None and self._done:  # nobody waited; the memory outlives the copy
            with suppress(Exception), self._device.active():
                self._done.wait("download")


class CudaDevice:
    """A CUDA device with a stream, streams for copies beside it, and a pool of memory."""

    kind = "cuda"

    def __init__(self, stream: int | None = None, cache: Path | None = None) -> None:
        """Open the device.

        Args:
            stream: handle of the caller's stream, a `CUstream`, on which all work is ordered; None
                for a stream of its own.
            cache: folder for compiled kernels; None for the user's cache folder.

        Raises:
            NotHereError: there is no cuda-core, driver or device.
            EngineError: it cannot be opened.
        """
        self.gpu: Gpu = find_gpu()
        check_gpu(self.gpu)
        self.name, self.number = self.gpu.name, self.gpu.number
        self._cache = cache
        self.driver = _Driver()
        self._context = self._find_context()
        self._upload_lock, self._download_lock = threading.Lock(), threading.Lock()
        self._own_streams: list[int] = []
        self._kept: list[NDArray[np.uint8]] = []  # sources of uploads that may be under way
        self._uploads: list[_Pinned] = []
        self._downloads: list[_Pinned] = []
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        if stream == _PER_THREAD:
            raise ConfigError(
                "stream: the per-thread default stream is another one in each thread; make a "
                "stream, or leave it out"
            )
        with self.active():
            # 0 stands for no stream in some libraries; the default stream has the name 1 too.
            self.stream = self._new_stream() if stream is None else stream or _DEFAULT
            self._up, self._down, self._record = (self._new_stream() for _ in range(3))
            self._pool = self._new_pool()

    def _find_context(self) -> Any:
        """The caller's, or else the primary one, which is then kept until the process ends."""
        device = self.driver("opening it", "cuDeviceGet", self.number)
        context = self.driver("opening it", "cuCtxGetCurrent")
        self.primary = not int(context)
        if self.primary:
            return self.driver("opening it", "cuDevicePrimaryCtxRetain", device)
        _, active = self.driver("opening it", "cuDevicePrimaryCtxGetState", device)
        if active:  # it may be the caller's
            primary = self.driver("opening it", "cuDevicePrimaryCtxRetain", device)
            self.primary = int(primary) == int(context)
            self.driver("opening it", "cuDevicePrimaryCtxRelease", device)
        return context

    def __del__(self) -> None:
        with suppress(Exception), self.active():  # of one that was not opened, or is lost
            names = self.driver.names
            names.cuStreamSynchronize(self.stream)
            names.cuMemPoolDestroy(self._pool)
            for stream in self._own_streams:
                names.cuStreamDestroy(stream)
            if self._module is not None:
                names.cuModuleUnload(self._module)

    def _new_stream(self) -> int:
        flag = self.driver.names.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = int(self.driver("making a stream", "cuStreamCreate", int(flag)))
        self._own_streams.append(stream)
        return stream

    def _new_pool(self) -> Any:
        names = self.driver.names
        properties = names.CUmemPoolProps()
        properties.allocType = names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.number
        pool = self.driver("making a pool", "cuMemPoolCreate", properties)
        attribute = names.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        keep = names.cuuint64_t(_KEEP_ALL)
        self.driver("making a pool", "cuMemPoolSetAttribute", pool, attribute, keep)
        return pool

    @contextmanager
    def active(self) -> Iterator[None]:
        """See `attnseg.runtime.cuda.device.Device.active`."""
        self.driver("making it current", "cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            with suppress(EngineError):  # the error inside is the one to tell
                self.driver("leaving it", "cuCtxPopCurrent")

    def free_bytes(self) -> int:
        """See `Device.free_bytes`: what the pool holds unused counts as free."""
        free, _ = self.driver("asking for memory", "cuMemGetInfo")
        attributes = self.driver.names.CUmemPool_attribute
        held, used = (
            int(self.driver("asking for memory", "cuMemPoolGetAttribute", self._pool, attribute))
            for attribute in (
                attributes.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
                attributes.CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            )
        )
        return int(free) + held - used

    def trim(self) -> None:
        """See `Device.trim`."""
        self.check()  # what is freed is free when the stream has come there
        self.driver("giving memory back", "cuMemPoolTrimTo", self._pool, 0)

    def check(self) -> None:
        """See `Device.check`."""
        self.driver("computing", "cuStreamSynchronize", self.stream)

    def _allocate(self, size_bytes: int, stream: int) -> CudaBuffer:
        arguments = (max(size_bytes, 1), self._pool, stream)
        try:
            pointer = self.driver("allocating memory", "cuMemAllocFromPoolAsync", *arguments)
        except OutOfMemoryError:  # some may be freed when the stream comes there, and in pieces
            self.trim()
            pointer = self.driver("allocating memory", "cuMemAllocFromPoolAsync", *arguments)
        return CudaBuffer(self, int(pointer), size_bytes)

    def allocate(self, size_bytes: int) -> CudaBuffer:
        """See `Device.allocate`."""
        return self._allocate(size_bytes, self.stream)

    def free(self, buffer: CudaBuffer) -> None:
        """Give memory back after the work so far."""
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
            raise EngineError(f"kernel {name}: the volume is too large for a GPU; use --device cpu")
        number = ctypes.c_uint(count)
        # The driver copies what these point to before the call returns.
        pointers = (ctypes.c_void_p * 2)(ctypes.addressof(number), ctypes.addressof(args))
        blocks = (-(-count // _THREADS), 1, 1)
        where = (*blocks, _THREADS, 1, 1, 0, self.stream, ctypes.addressof(pointers), 0)
        self.driver(f"kernel {name}", "cuLaunchKernel", self._function(name), *where)

    def _copy(self, step: str, source: int, target: int, size_bytes: int, stream: int) -> None:
        self.driver(step, "cuMemcpyAsync", target, source, size_bytes, stream)

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """See `Device.upload`, for little: the copy is from memory that is not pinned."""
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

    def _pinned_for_upload(self, size_bytes: int) -> _Pinned:
        """A block that no copy uses any more, the oldest first."""
        if len(self._uploads) < _PINNED:
            return _Pinned(self, size_bytes)
        pinned = self._uploads.pop(0)
        if pinned.busy:
            pinned.busy.wait("upload")
        return pinned if pinned.size_bytes >= size_bytes else _Pinned(self, size_bytes)

    def upload_ahead(self, source: NDArray[Any]) -> tuple[CudaBuffer, _Event]:
        """See `Device.upload_ahead`."""
        content = as_bytes(source)
        with self._upload_lock:
            pinned = self._pinned_for_upload(content.size)
            bytes_at(pinned.pointer, content.size)[:] = content
            buffer = self._allocate(content.size, self._up)
            self._copy("upload", pinned.pointer, buffer.pointer, content.size, self._up)
            buffer.busy = pinned.busy = _Event(self, self._up)
            self._uploads.append(pinned)
            return buffer, pinned.busy

    def pinned_for_download(self, size_bytes: int) -> _Pinned:
        """A block for one download, to be given back."""
        with self._download_lock:
            fitting = [p for p in self._downloads if p.size_bytes >= size_bytes]
            if fitting:
                pinned = min(fitting, key=lambda p: p.size_bytes)
                self._downloads.remove(pinned)
                return pinned
        return _Pinned(self, size_bytes)

    def give_back(self, pinned: _Pinned) -> None:
        """For the next download."""
        with self._download_lock:
            self._downloads.append(pinned)
            self._downloads.sort(key=lambda p: p.size_bytes)
            del self._downloads[:-_MOST_DOWNLOADS]  # the smallest

    def copy_down(self, source: DeviceBuffer, pinned: _Pinned) -> _Event:
        """Copy on the stream for downloads; the event marks its end."""
        ready = _Event(self, self.stream)
        self.driver("download", "cuStreamWaitEvent", self._down, ready.handle, 0)
        self._copy("download", source.pointer, pinned.pointer, source.size_bytes, self._down)
        return _Event(self, self._down)

    def download_behind(self, source: DeviceBuffer) -> _CudaDownload:
        """See `Device.download_behind`."""
        return _CudaDownload(self, source)

    def mark(self) -> _Event:
        """See `Device.mark`."""
        return _Event(self, self.stream)

    def after(self, mark: Any) -> None:
        """See `Device.after`."""
        self.driver("waiting for an upload", "cuStreamWaitEvent", self.stream, mark.handle, 0)

    def recorded(self, work: Callable[[int], None]) -> Callable[[], None] | None:
        """See `Device.recorded`: a CUDA graph, taken on a stream that nothing else uses."""
        mode = self.driver.names.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            self.driver("recording", "cuStreamBeginCapture", self._record, mode)
            try:
                work(self._record)
            finally:
                graph = self.driver("recording", "cuStreamEndCapture", self._record)
            try:
                ready = self.driver("recording", "cuGraphInstantiate", graph, 0)
            finally:
                self.driver("recording", "cuGraphDestroy", graph)
        except (OutOfMemoryError, DeviceLostError):
            raise
        except EngineError:  # work that cannot be recorded is no fault
            return None
        return _Recorded(self, ready)

    def view(self, array: Any) -> DeviceArray | None:
        """See `Device.view`."""
        if isinstance(array, np.ndarray):
            return None
        if not (hasattr(array, "__cuda_array_interface__") or hasattr(array, "__dlpack__")):
            return None
        from cuda.core.utils import StridedMemoryView

        try:
            found = StridedMemoryView.from_any_interface(array, stream_ptr=self.stream)
            dtype = np.dtype(found.dtype)
        except Exception as error:  # of the array's library or cuda-core, with no common base
            raise EngineError(f"the GPU failed in taking an array: {error}") from error
        if not found.is_device_accessible:
            return None
        if found.device_id != self.number:
            raise EngineError(
                f"an array is on GPU {found.device_id}, the model is on GPU {self.number}; copy it "
                "there"
            )
        strides = found.strides or _c_strides(found.shape)
        steps = tuple(s * dtype.itemsize for s in strides)
        return DeviceArray(int(found.ptr), tuple(found.shape), steps, dtype, found, self)

    def exported(self, array: DeviceArray) -> Any:
        """See `Device.exported`."""
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        size = array.owner.size_bytes
        buffer = Buffer.from_handle(array.pointer, size, owner=array)
        steps = tuple(s // array.dtype.itemsize for s in array.strides)
        return StridedMemoryView.from_buffer(buffer, array.shape, steps, dtype=array.dtype)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
