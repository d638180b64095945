"""Threads run calls in order, and whoever waits for them learns of every failure."""

from __future__ import annotations

import _thread
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from attnseg.runtime import threads as module
from attnseg.runtime.errors import ResourceError
from attnseg.runtime.threads import Threads, in_threads, mapping


def test_calls_of_one_thread_are_made_in_order_and_waited_for_at_the_end() -> None:
    made: list[int] = []
    with Threads() as threads:
        calls = [threads.submit(made.append, number) for number in range(100)]
    assert made == list(range(100))
    assert [call.result() for call in calls] == [None] * 100


def test_two_threads_run_at_the_same_time() -> None:
    first, second = Event(), Event()

    def meet(own: Event, other: Event) -> bool:
        own.set()
        return other.wait(60)

    with Threads(2) as threads:
        calls = [threads.submit(meet, first, second), threads.submit(meet, second, first)]
        assert [call.result() for call in calls] == [True, True]


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, SystemExit])
def test_an_exception_reaches_the_caller_and_the_thread_goes_on(error: type[Exception]) -> None:
    def fail() -> None:
        raise error("here")

    with Threads() as threads:
        failing, next_one = threads.submit(fail), threads.submit(abs, -2)
        with pytest.raises(error, match="here"):
            failing.result()
        assert next_one.result() == 2


def test_results_of_items_come_in_their_order_and_one_thread_is_the_callers_own() -> None:
    assert in_threads(lambda x: x * x, [3, 1, 2], 2) == [9, 1, 4]
    own = _thread.get_ident()
    assert in_threads(lambda _: _thread.get_ident(), [1, 2], 1) == [own, own]
    assert in_threads(lambda _: _thread.get_ident(), [1], 4) == [own]
    assert in_threads(abs, [], 4) == []


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_mapping_gives_what_map_gives_or_the_first_exception(threads: int) -> None:
    with mapping(threads) as each:
        assert list(each(pow, itertools.count(2), [1, 2, 3])) == [2, 9, 64]
        with pytest.raises(ZeroDivisionError):
            list(each(lambda x: 1 // x, [1, 0]))


def test_calls_are_traced_as_in_threads_of_the_standard_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[str] = []

    def trace(frame: Any, _: str, __: Any) -> None:
        traced.append(frame.f_code.co_name)

    def known() -> None:
        pass

    monkeypatch.setattr(threading, "gettrace", lambda: trace)
    with Threads() as threads:
        threads.submit(known)
    assert "known" in traced


def starting(count: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """`_thread.start_new_thread` that starts `count` threads and calls `then` afterwards."""
    start, left = _thread.start_new_thread, [None] * count

    def started(*arguments: Any) -> Any:
        if left:
            left.pop()
            return start(*arguments)
        return then(*arguments)

    return started


def refuse(*_: Any) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("started", [0, 1, 3])
def test_a_thread_that_is_refused_is_an_error_and_the_others_end(
    started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _thread._count()
    monkeypatch.setattr(_thread, "start_new_thread", starting(started, refuse))
    with pytest.raises(ResourceError, match="no further thread can be started; raise the limits"):
        Threads(4)
    for _ in range(1000):
        if _thread._count() == before:
            break
        Event().wait(0.01)  # a thread counts until a moment after its last instruction
    assert _thread._count() == before


def test_another_refusal_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def shut(*_: Any) -> None:
        raise RuntimeError("the interpreter shuts down")

    monkeypatch.setattr(_thread, "start_new_thread", shut)
    with pytest.raises(ResourceError, match=r"no thread can be started \(the interpreter shuts"):
        Threads()


def test_a_thread_that_does_not_begin_is_an_error_not_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in CPython issue 140746, where `Thread.start` waits forever."""
    monkeypatch.setattr(module, "_START_S", 0.01)
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: 1)
    with pytest.raises(ResourceError, match="did not begin"):
        Threads()


def test_a_call_ends_before_the_interpreter_does() -> None:
    code = """
import sys, time
from attnseg.runtime.threads import Threads
threads = Threads()
threads.submit(lambda: (time.sleep(0.5), print("written", flush=True)))
time.sleep(0.1)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "written\n"
