from __future__ import annotations

import time

import pytest

from attnseg.data.threads import in_threads


def test_results_come_in_the_order_of_the_items() -> None:
    seen: list[str] = []
    items = {f"item{i}": i for i in range(20)}
    found = in_threads(lambda i: time.sleep(0.001 * (20 - i)) or i * i, items, seen.append)
    assert list(found.items()) == [(f"item{i}", i * i) for i in range(20)]
    assert seen == list(items)


def test_calls_that_have_not_begun_are_dropped_when_the_caller_stops() -> None:
    begun: list[int] = []

    def work(index: int) -> None:
        begun.append(index)
        time.sleep(0.01)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_threads(work, {str(i): i for i in range(1000)}, stop)
    assert len(begun) < 100


def test_an_exception_of_a_call_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, {"a": 1, "b": 0})
