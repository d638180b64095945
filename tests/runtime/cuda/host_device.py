"""A stand-in for a CUDA device: the contract of `Device` on numpy memory.

All code written for a device runs on it, with the kernels compiled for the host.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.device import (
    DeviceArray,
    DeviceBuffer,
    Download,
    Mark,
    as_bytes,
    bytes_at,
)
from attnseg.runtime.errors import EngineError


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

    name = "host"
    ordinal = 0
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

    def recorded(self, work: Callable[[int], None]) -> Callable[[], None]:
        """See `Device.recorded`; the host runs things as they come."""
        raise EngineError("the host records nothing")

    def view(self, array: Any) -> DeviceArray | None:
        """See `Device.view`; arrays of the host are not on a device."""
        return array if isinstance(array, DeviceArray) else None

    def exported(self, array: DeviceArray) -> Any:
        """See `Device.exported`."""
        size = sum(s * (n - 1) for s, n in zip(array.strides, array.shape, strict=True))
        flat = bytes_at(array.pointer, size + array.dtype.itemsize).view(array.dtype)
        return np.lib.stride_tricks.as_strided(flat, array.shape, array.strides)
