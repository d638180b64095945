"""What the executor asks of a device, and the host in a device's place.

A device has memory of its own and runs what it is given in the order in which it was given. Two
copies may overlap that: the upload of the next volume and the download of the last labels.
`HostDevice` has the same interface on numpy memory, so that what is written for a device runs where
there is none.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import EngineError


class DeviceBuffer(Protocol):
    """Memory of a device; it is the caller's, and freed with the last reference to it."""

    @property
    def pointer(self) -> int:
        """Address on the device."""

    @property
    def size_bytes(self) -> int:
        """Its size."""


@dataclass(frozen=True)
class Region:
    """Part of a buffer."""

    pointer: int
    size_bytes: int
    buffer: DeviceBuffer

    @classmethod
    def of(cls, buffer: DeviceBuffer, offset: int, size_bytes: int) -> Region:
        """The bytes from `offset` on."""
        return cls(buffer.pointer + offset, size_bytes, buffer)


class Mark(Protocol):
    """A place in the order of a device's work."""

    def elapsed_ms(self, since: Any) -> float:
        """Milliseconds of the device from another mark to this; waits for this one."""


class Download(Protocol):
    """A copy to the host that is under way."""

    def wait(self) -> NDArray[np.uint8]:
        """Its bytes, as soon as they are here."""


class DeviceArray:
    """Voxels on a device, for PyCUDA, CuPy, torch, numba: `__cuda_array_interface__` and DLPack.

    The memory is freed with the last reference to this object. Work on another stream than the
    segmenter's must end before that.

    Attributes:
        pointer: address of element (0, 0, 0).
        shape: X, Y, Z.
        strides: steps along X, Y and Z, in bytes.
        dtype: of an element.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype[Any],
        owner: Any,
        device: Device,
    ) -> None:
        """A view of memory that `owner` keeps alive."""
        self.pointer, self.shape, self.strides, self.dtype = pointer, shape, strides, dtype
        self.owner = owner
        self._device = device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3, with the stream on which the voxels were computed."""
        if self._device.kind != "cuda":
            raise AttributeError("this memory is not of a CUDA device")
        return {
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": self._device.stream or 1,  # 0 is not allowed, 1 is the default stream
        }

    def __dlpack__(self, **arguments: Any) -> Any:
        """DLPack's capsule, as https://dmlc.github.io/dlpack describes it."""
        return self._device.exported(self).__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind and number of the device."""
        kind, number = self._device.exported(self).__dlpack_device__()
        return int(kind), int(number)


class Device(Protocol):
    """Where an engine runs.

    Every method may raise `EngineError`: `OutOfMemoryError` if there is not enough memory,
    `DeviceLostError` if the device does nothing more for this process. Methods are called within
    `active()`; `upload_ahead` and `Download.wait` may be called from other threads.
    """

    @property
    def kind(self) -> str:
        """`cuda`, or `cpu` for the host in a device's place."""

    @property
    def name(self) -> str:
        """Of the hardware."""

    @property
    def number(self) -> int:
        """By which CUDA counts it."""

    @property
    def primary(self) -> bool:
        """Whether it is used in its primary context, the only one that some libraries know."""

    @property
    def stream(self) -> int:
        """Handle of the stream, for libraries that enqueue work themselves."""

    def active(self) -> AbstractContextManager[None]:
        """Make the device current for this thread, and leave things as they were."""

    def free_bytes(self) -> int:
        """Memory that nobody uses."""

    def trim(self) -> None:
        """Give memory that nobody uses back to the device, for other libraries."""

    def check(self) -> None:
        """Raise `DeviceLostError` if the device is lost; waits for its work."""

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        """Memory, with any content."""

    def clear(self, buffer: DeviceBuffer) -> None:
        """Set every byte to 0."""

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """Run a kernel of `attnseg.runtime.cuda.kernels` on indices 0 to `count` - 1."""

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """Copy a C-contiguous array to the start of a buffer; it may be changed afterwards."""

    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """Wait for all work, then copy the start of a buffer to a C-contiguous array."""

    def upload_ahead(self, source: NDArray[Any]) -> tuple[DeviceBuffer, Mark]:
        """Copy a C-contiguous array to new memory while other work goes on.

        The memory may be used after the mark (see `after`). The array may be changed afterwards.
        """

    def download_behind(self, source: DeviceBuffer) -> Download:
        """Copy a buffer to the host after the work so far, while later work goes on."""

    def mark(self) -> Mark:
        """After the work so far."""

    def after(self, mark: Mark) -> None:
        """Let all later work wait for a mark."""

    def recorded(self, work: Callable[[int], None]) -> Callable[[], None] | None:
        """The work that a function gives a stream, to be repeated at once; None if it cannot.

        The function gets the stream's handle; its work is not run now.
        """

    def view(self, array: Any) -> DeviceArray | None:
        """Someone's array on this device, by `__cuda_array_interface__` or DLPack; else None.

        Later work waits for the stream that the array names.
        """

    def exported(self, array: DeviceArray) -> Any:
        """An object with DLPack's two methods for an array of this device."""


def bytes_at(pointer: int, size_bytes: int) -> NDArray[np.uint8]:
    """The bytes at an address of this process, without a copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(pointer))


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of a C-contiguous array, without a copy."""
    assert array.flags.c_contiguous, "the copy is of memory as it lies"
    return array.reshape(-1).view(np.uint8)


class HostBuffer:
    """Memory of this process."""

    def __init__(self, size_bytes: int) -> None:
        self.bytes = np.empty(size_bytes, np.uint8)
        self.size_bytes = size_bytes
        self.pointer = int(self.bytes.ctypes.data)


@dataclass(frozen=True)
class _HostMark:
    at_s: float

    def elapsed_ms(self, since: _HostMark) -> float:
        return (self.at_s - since.at_s) * 1000


@dataclass(frozen=True)
class _HostDownload:
    content: NDArray[np.uint8]

    def wait(self) -> NDArray[np.uint8]:
        return self.content


Launcher = Callable[[str, int, ctypes.Structure], None]
"""Runs a kernel by name on so many indices."""


class HostDevice:
    """The host in a device's place."""

    kind = "cpu"
    name = "host"
    number = 0
    primary = True
    stream = 0

    def __init__(self, launcher: Launcher | None = None) -> None:
        """With `launcher` it runs kernels, which were compiled for the host."""
        self._launcher = launcher

    def active(self) -> AbstractContextManager[None]:
        """See `Device.active`."""
        return nullcontext()

    def free_bytes(self) -> int:
        """See `Device.free_bytes`; the host is not asked."""
        return 1 << 62

    def trim(self) -> None:
        """See `Device.trim`; the host keeps nothing."""

    def check(self) -> None:
        """See `Device.check`; the host is never lost."""

    def allocate(self, size_bytes: int) -> HostBuffer:
        """See `Device.allocate`."""
        return HostBuffer(size_bytes)

    def clear(self, buffer: DeviceBuffer) -> None:
        """See `Device.clear`."""
        bytes_at(buffer.pointer, buffer.size_bytes)[:] = 0

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """See `Device.launch`."""
        if self._launcher is None:
            raise EngineError("this host device was opened without kernels")
        self._launcher(name, count, args)

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """See `Device.upload`."""
        content = as_bytes(source)
        bytes_at(target.pointer, target.size_bytes)[: content.size] = content

    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """See `Device.download`."""
        content = as_bytes(target)
        content[:] = bytes_at(source.pointer, source.size_bytes)[: content.size]

    def upload_ahead(self, source: NDArray[Any]) -> tuple[HostBuffer, Mark]:
        """See `Device.upload_ahead`."""
        buffer = self.allocate(source.nbytes)
        self.upload(source, buffer)
        return buffer, self.mark()

    def download_behind(self, source: DeviceBuffer) -> Download:
        """See `Device.download_behind`."""
        return _HostDownload(bytes_at(source.pointer, source.size_bytes).copy())

    def mark(self) -> Mark:
        """See `Device.mark`."""
        return _HostMark(time.perf_counter())

    def after(self, mark: Mark) -> None:
        """See `Device.after`."""

    def recorded(self, work: Callable[[int], None]) -> Callable[[], None] | None:
        """See `Device.recorded`; the host runs things as they come."""
        return None

    def view(self, array: Any) -> DeviceArray | None:
        """See `Device.view`; arrays of the host are not on a device."""
        return array if isinstance(array, DeviceArray) else None

    def exported(self, array: DeviceArray) -> Any:
        """See `Device.exported`."""
        size = sum(s * (n - 1) for s, n in zip(array.strides, array.shape, strict=True))
        flat = bytes_at(array.pointer, size + array.dtype.itemsize).view(array.dtype)
        return np.lib.stride_tricks.as_strided(flat, array.shape, array.strides)
