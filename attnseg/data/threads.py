"""Reading of many files in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from attnseg.runtime.threads import Threads

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
        ResourceError: No thread can be started.
        KeyboardInterrupt: The main thread was stopped; calls that had not begun are dropped.
    """
    results = {}
    with Threads(min(_MOST_THREADS, os.cpu_count() or 1, len(items))) as threads:
        calls = {name: threads.submit(function, item) for name, item in items.items()}
        for name, call in calls.items():
            results[name] = call.result()
            if progress:
                progress(name)
    return results
