"""Threads that run calls, and never make their caller wait for a thread that did not begin.

`Thread.start`, and with it `concurrent.futures`, waits forever for a thread that runs out of memory
in its first instructions (CPython issue 140746). A result is stored here without an allocation, so
that it arrives even if memory is short.
"""

from __future__ import annotations

import _thread
import atexit
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from weakref import WeakSet

from attnseg.runtime.errors import ResourceError
from attnseg.runtime.limits import limit_reached

_START_S = 30.0

Item = TypeVar("Item")
Result = TypeVar("Result")

Each = Callable[..., Iterable[Any]]
"""`map`, or the same in threads: results in the order of the items, or the first exception."""


class Call(Generic[Result]):
    """A call that another thread makes."""

    def __init__(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self._done = _taken_lock()

    def wait(self) -> None:
        """Wait for the end of the call."""
        with self._done:
            pass

    def result(self) -> Result:
        """Wait for the result; an exception of the call is raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        result: Result = self._result
        return result


class Threads:
    """Context manager for a number of threads, all of which have begun.

    On exit the calls are waited for. If the block raises, calls that have not begun are dropped.

    Raises:
        ResourceError: A thread cannot be started; none remains.
    """

    def __init__(self, count: int = 1) -> None:
        self._calls: SimpleQueue[Call[Any] | None] = SimpleQueue()
        self._ends: list[_thread.LockType] = []
        try:
            for _ in range(count):
                self._ends.append(_start(self._calls))
        except BaseException:
            self.close()
            raise
        _OPEN.add(self)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Call[Result]:
        """Call a function in the next free thread."""
        call = Call(function, arguments)
        self._calls.put(call)
        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close(drop=kind is not None)

    def close(self, drop: bool = False) -> None:
        """End the threads; with `drop`, calls that have not begun are not made."""
        while drop:
            try:
                self._calls.get_nowait()
            except Empty:
                break
        for _ in self._ends:
            self._calls.put(None)
        while self._ends:
            self._ends.pop().acquire()


def _taken_lock() -> _thread.LockType:
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


def _start(calls: SimpleQueue[Call[Any] | None]) -> _thread.LockType:
    """Start a thread, and return a lock that it releases at its end."""
    begun, ended = _taken_lock(), _taken_lock()
    try:
        _thread.start_new_thread(_traced, (calls, begun, ended))
    except (RuntimeError, MemoryError) as error:
        cause = f"no thread can be started ({error})"
        raise limit_reached(error) or ResourceError(cause) from error
    if not begun.acquire(timeout=_START_S):
        raise ResourceError(
            "a thread was started but did not begin",
            "close other programs, or raise the limit on memory (ulimit -v)",
        )
    return ended


def _traced(*arguments: Any) -> None:
    """`_work` under the debugger or measurement of coverage that `threading.settrace` has set."""
    sys.settrace(threading.gettrace())
    _work(*arguments)


def _work(
    calls: SimpleQueue[Call[Any] | None], begun: _thread.LockType, ended: _thread.LockType
) -> None:
    begun.release()
    try:
        while call := calls.get():
            try:
                call._result = call._function(*call._arguments)
            except BaseException as error:
                call._error = error
            call._arguments = ()  # which hold volumes
            call._done.release()
            del call
    finally:
        ended.release()


_OPEN: WeakSet[Threads] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Let threads end their work before the interpreter does."""
    for threads in list(_OPEN):
        threads.close(drop=True)


@contextmanager
def mapping(threads: int) -> Iterator[Each]:
    """Provide `map` in a number of threads within a `with` block; with one, no thread is started.

    Raises:
        ResourceError: A thread cannot be started.
    """
    if threads <= 1:
        yield map
        return
    with Threads(threads) as pool:

        def each(function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
            calls = [pool.submit(function, *taken) for taken in zip(*items, strict=False)]
            return [call.result() for call in calls]

        yield each


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> list[Result]:
    """Call `function` with each item, and return the results in order.

    Args:
        function: Function of an item; its first exception is raised.
        items: The items.
        threads: Largest number of threads; with one, no thread is started.

    Raises:
        ResourceError: A thread cannot be started.
    """
    items = list(items)
    with mapping(min(threads, len(items))) as each:
        return list(each(function, items))
