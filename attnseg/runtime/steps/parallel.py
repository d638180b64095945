"""The same function on each channel of a volume, in threads; NumPy releases Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

Each = Callable[..., Iterable[Any]]
"""`map`, or that of a thread pool: results in the order of the items, or the first exception."""


@contextmanager
def mapping(threads: int) -> Iterator[Each]:
    """Provide `map` in a number of threads within a `with` block."""
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads) as pool:
        yield pool.map
