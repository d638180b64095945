"""Where the time goes: milliseconds per stage of one case."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Adds up wall-clock milliseconds per stage, in the order the stages first ran."""

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - began) * 1000
            self.elapsed_ms[name] = self.elapsed_ms.get(name, 0.0) + elapsed_ms
