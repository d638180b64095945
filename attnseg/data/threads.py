"""Reading of many files in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_MOST_THREADS = 8  # each holds a volume or two

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result],
    items: Mapping[str, Item],
    progress: Callable[[str], None] | None = None,
) -> dict[str, Result]:
    """Call `function` with each item.

    Args:
        function: Function of an item; its first exception is raised.
        items: Items by name.
        progress: Function called with the name of each finished item.

    Returns:
        Results by name, in the order of the items.

    Raises:
        KeyboardInterrupt: The main thread was stopped; calls that had not begun are dropped.
    """
    pool, results = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)), {}
    try:
        for name, result in zip(items, pool.map(function, items.values()), strict=True):
            results[name] = result
            if progress:
                progress(name)
    finally:
        pool.shutdown(cancel_futures=True)
    return results
