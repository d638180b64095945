"""Interface of a device: memory, kernels, copies and marks, as the CUDA pipeline uses them.

A device has its own memory and runs work in the order in which it is enqueued. Two copies may
overlap that work: the upload of the next volume and the download of the previous labels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.geometry import Layout, shape_of


class DeviceBuffer(Protocol):
    """Device memory, owned by the caller and freed with the last reference to it."""

    @property
    def pointer(self) -> int:
        """Address on the device."""

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""


@dataclass(frozen=True)
class Region:
    """Part of a buffer.

    Attributes:
        pointer: Address on the device.
        size_bytes: Size in bytes.
        buffer: Buffer that owns the memory.
    """

    pointer: int
    size_bytes: int
    buffer: DeviceBuffer

    @classmethod
    def of(cls, buffer: DeviceBuffer, offset: int, size_bytes: int) -> Region:
        """Region of `size_bytes` bytes that starts at byte `offset` of a buffer."""
        return cls(buffer.pointer + offset, size_bytes, buffer)


class Mark(Protocol):
    """A point in the order of a device's work."""

    def elapsed_ms(self, since: Any) -> float:
        """Device time from another mark to this one in milliseconds; waits for this one."""


class Download(Protocol):
    """A copy to the host in progress."""

    def wait(self) -> NDArray[np.uint8]:
        """Wait for the copy, and return its bytes as a 1-D uint8 array."""


class DeviceArray:
    """Voxels on a device, shared by `__cuda_array_interface__` and DLPack.

    PyCUDA, CuPy, PyTorch and Numba read them without a copy. The memory is freed with the last
    reference to this object; work on any stream but the segmenter's must end before that.

    Attributes:
        pointer: Address of element (0, 0, 0).
        shape: Voxels along X, Y and Z.
        strides: Strides along X, Y and Z in bytes.
        dtype: Data type of an element.
        owner: Object that keeps the memory alive.
    """

    def __init__(
        self,
        *,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype[Any],
        owner: Any,
        device: Device,
    ) -> None:
        self.pointer, self.shape, self.strides, self.dtype = pointer, shape, strides, dtype
        self.owner = owner
        self._device = device

    @property
    def layout(self) -> Layout:
        """Layout of the voxels, in elements."""
        steps = [stride // self.dtype.itemsize for stride in self.strides]
        return Layout(shape_of(self.shape), shape_of(steps))

    def viewed(self, layout: Layout) -> DeviceArray:
        """View of the same voxels with another layout, relative to this array's pointer."""
        itemsize = self.dtype.itemsize
        return DeviceArray(
            pointer=self.pointer + layout.offset * itemsize,
            shape=layout.shape,
            strides=tuple(stride * itemsize for stride in layout.strides),
            dtype=self.dtype,
            owner=self.owner,
            device=self._device,
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface, version 3, with the stream on which the voxels are computed."""
        return {
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": self._device.stream or 1,  # 0 is not allowed, 1 is the default stream
        }

    def __dlpack__(self, **arguments: Any) -> Any:
        """DLPack capsule, see https://dmlc.github.io/dlpack."""
        return self._device.exported(self).__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack device type, and device ordinal."""
        kind, ordinal = self._device.exported(self).__dlpack_device__()
        return int(kind), int(ordinal)


class Device(Protocol):
    """Device that an engine runs on.

    Every method may raise `EngineError`: `OutOfMemoryError` if there is not enough memory,
    `DeviceLostError` if this process can no longer use the device. Methods are called within
    `active()`; `upload_ahead` and `Download.wait` may be called from other threads.
    """

    @property
    def name(self) -> str:
        """Name of the hardware."""

    @property
    def ordinal(self) -> int:
        """CUDA device ordinal."""

    @property
    def primary(self) -> bool:
        """Whether it uses its primary context, the only one that some libraries support."""

    @property
    def stream(self) -> int:
        """Handle of the stream, for libraries that enqueue work themselves."""

    def active(self) -> AbstractContextManager[None]:
        """Make the device current in the calling thread within a `with` block."""

    def free_bytes(self) -> int:
        """Free device memory."""

    def trim(self) -> None:
        """Release unused memory to the device, for other libraries."""

    def check(self) -> None:
        """Wait for all work; raise `DeviceLostError` if the device is lost."""

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        """Allocate uninitialised memory."""

    def clear(self, buffer: DeviceBuffer) -> None:
        """Set every byte of a buffer to 0."""

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """Run a kernel of `attnseg.runtime.cuda.kernels` on indices 0 to `count` - 1."""

    def upload(self, source: NDArray[Any], target: DeviceBuffer) -> None:
        """Copy a C-contiguous array, which may change afterwards, to the start of a buffer."""

    def download(self, source: DeviceBuffer, target: NDArray[Any]) -> None:
        """Wait for all work, then copy the start of a buffer to a C-contiguous array."""

    def upload_ahead(self, source: NDArray[Any]) -> tuple[DeviceBuffer, Mark]:
        """Copy a C-contiguous array to newly allocated memory, overlapping other work.

        The memory may be used after the mark (see `after`). The array may change on return.
        """

    def download_behind(self, source: DeviceBuffer) -> Download:
        """Copy a buffer to the host after the work enqueued so far, overlapping later work."""

    def mark(self) -> Mark:
        """Return a mark after the work enqueued so far."""

    def after(self, mark: Mark) -> None:
        """Make all later work wait for a mark."""

    def recorded(self, work: Callable[[int], None]) -> Callable[[], None]:
        """Record the work that a function enqueues, and return a function that replays it.

        The function receives the handle of a stream; the work is recorded without being run.

        Raises:
            EngineError: The work cannot be recorded; the device is unaffected.
        """

    def view(self, array: Any) -> DeviceArray | None:
        """View of another library's array on this device; None if it is not on a device.

        The array is read by `__cuda_array_interface__` or DLPack. Later work waits for the stream
        that the array names.
        """

    def exported(self, array: DeviceArray) -> Any:
        """Object with the two DLPack methods for an array on this device."""


def bytes_at(pointer: int, size_bytes: int) -> NDArray[np.uint8]:
    """View of host memory at an address, `(size_bytes,)` uint8."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(pointer))


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """View of the bytes of a C-contiguous array, `(N,)` uint8."""
    assert array.flags.c_contiguous, "a byte copy needs a C-contiguous array"
    return array.reshape(-1).view(np.uint8)
