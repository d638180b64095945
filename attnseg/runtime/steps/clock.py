"""Names of the processing steps, and a clock that times them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Step(StrEnum):
    """Processing steps of one volume in order, with their names in reports.

    The host pipeline has no `upload`, `windows` (part of `blend`) or `download`; the CUDA pipeline
    has no `resample`, and fuses passes as part of `blend`.
    """

    CHECK = "check"
    UPLOAD = "upload"
    PREPROCESS = "preprocess"
    WINDOWS = "windows"
    NETWORK = "network"
    BLEND = "blend"
    RESAMPLE = "resample"
    FUSE = "fuse"
    CLEAN_UP = "clean-up"
    RESTORE = "restore"
    DOWNLOAD = "download"


class StageClock:
    """Accumulated wall-clock time per stage in milliseconds, in order of first use."""

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the `with` block to the stage `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - began) * 1000
            self.elapsed_ms[str(name)] = self.elapsed_ms.get(str(name), 0.0) + elapsed_ms
