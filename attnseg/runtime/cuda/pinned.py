"""Stream events, and the pinned host memory for copies."""

from __future__ import annotations

import threading
from contextlib import suppress

from attnseg.runtime.cuda.driver import Context
from attnseg.runtime.errors import EngineError, OutOfMemoryError

_UPLOADS = 8  # blocks for uploads: those of one volume are filled while others are copied
_MOST_DOWNLOADS = 4  # free blocks held for downloads: labels and counts of two volumes


class Event:
    """A point in a stream, recorded after the work enqueued so far."""

    def __init__(self, context: Context, stream: int) -> None:
        self._context = context
        self.handle = context.driver("creating an event", "cuEventCreate", 0)
        context.driver("recording an event", "cuEventRecord", self.handle, stream)

    def wait(self, step: str) -> None:
        """Block until the stream has passed this point."""
        self._context.driver(step, "cuEventSynchronize", self.handle)

    def elapsed_ms(self, since: Event) -> float:
        """See `attnseg.runtime.cuda.device.Mark`."""
        with self._context.active():
            self.wait("computing")
            return float(
                self._context.driver("timing", "cuEventElapsedTime", since.handle, self.handle)
            )

    def __del__(self) -> None:
        with suppress(Exception), self._context.active():  # lost, or Python shuts down
            self._context.driver.names.cuEventDestroy(self.handle)


class Pinned:
    """A block of page-locked host memory, for asynchronous copies."""

    def __init__(self, context: Context, size_bytes: int) -> None:
        self._context, self.size_bytes = context, size_bytes
        try:
            pointer = context.driver("allocating pinned memory", "cuMemHostAlloc", size_bytes, 0)
        except OutOfMemoryError as error:
            raise EngineError(
                f"the host has no {-(-size_bytes // 10**6)} MB of pinned memory for a copy",
                "close other programs",
            ) from error
        self.pointer = int(pointer)
        self.busy: Event | None = None

    def __del__(self) -> None:
        with suppress(Exception), self._context.active():
            self._context.driver.names.cuMemFreeHost(self.pointer)


class PinnedBlocks:
    """The pinned blocks of a device: a ring for uploads, and free blocks for downloads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.upload_lock, self._download_lock = threading.Lock(), threading.Lock()
        self._uploads: list[Pinned] = []
        self._downloads: list[Pinned] = []

    def _new(self, size_bytes: int) -> Pinned:
        return Pinned(self._context, size_bytes)

    def take_for_upload(self, size_bytes: int) -> Pinned:
        """Return a block that no copy uses."""
        with self.upload_lock:
            pinned = self._uploads.pop(0) if self._uploads[_UPLOADS - 1 :] else None
        if pinned and pinned.busy:
            pinned.busy.wait("upload")  # also before it is freed
        return pinned if pinned and pinned.size_bytes >= size_bytes else self._new(size_bytes)

    def keep_for_upload(self, pinned: Pinned) -> None:
        """Put back a block whose copy is enqueued; the caller holds `upload_lock`."""
        self._uploads.append(pinned)

    def take_for_download(self, size_bytes: int) -> Pinned:
        """Return the smallest free block that fits, or a new one."""
        with self._download_lock:
            fitting = [p for p in self._downloads if p.size_bytes >= size_bytes]
            if fitting:
                pinned = min(fitting, key=lambda p: p.size_bytes)
                self._downloads.remove(pinned)
                return pinned
        return self._new(size_bytes)

    def keep_for_download(self, pinned: Pinned) -> None:
        """Put back a block whose content has been read; only the largest few are retained."""
        with self._download_lock:
            self._downloads.append(pinned)
            self._downloads.sort(key=lambda p: p.size_bytes)
            del self._downloads[:-_MOST_DOWNLOADS]
