"""Names of the processing steps, and a clock that times them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

Item = TypeVar("Item")


class Step(StrEnum):
    """Processing steps of one volume in order, with their names in reports.

    The host pipeline has no `upload`, `windows` (part of `blend`) or `download`; the CUDA pipeline
    resamples outputs and fuses passes as part of `blend`.
    """

    STRIP = "skull-strip"
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
    """Accumulated wall-clock time per stage in milliseconds, in order of first use.

    The time of a stage within another counts for the inner one only.
    """

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}
        self._within_ms = [0.0]  # time of the stages within each open stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the `with` block to the stage `name`."""
        began = time.perf_counter()
        self.elapsed_ms.setdefault(str(name), 0.0)
        self._within_ms.append(0.0)
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - began) * 1000
            self.elapsed_ms[str(name)] += elapsed_ms - self._within_ms.pop()
            self._within_ms[-1] += elapsed_ms

    def precede(self, earlier: StageClock) -> None:
        """Put the stages of another clock before those of this one."""
        own = self.elapsed_ms
        self.elapsed_ms = dict(earlier.elapsed_ms)
        for name, elapsed_ms in own.items():
            self.elapsed_ms[name] = self.elapsed_ms.get(name, 0.0) + elapsed_ms

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Items of an iterable; the time to compute each counts for the stage `name`."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                found = next(iterator, self)
            if isinstance(found, StageClock):
                return
            yield found
