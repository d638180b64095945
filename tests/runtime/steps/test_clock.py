"""Times of stages by a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from attnseg.runtime.steps import clock as module
from attnseg.runtime.steps.clock import StageClock, Step


class Hands:
    """A clock that stands still until it is moved."""

    now_s = 100.0

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    own = Hands()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: own.now_s))
    return own


def test_a_stage_adds_up_over_its_uses(hands: Hands) -> None:
    clock = StageClock()
    for seconds in (1, 2):
        with clock.stage(Step.NETWORK):
            hands.pass_(seconds)
        hands.pass_(5)  # between stages, for none of them
    assert clock.elapsed_ms == {"network": 3000}


def test_the_time_of_an_inner_stage_is_its_own(hands: Hands) -> None:
    clock = StageClock()
    with clock.stage("outer"):
        hands.pass_(1)
        with clock.stage("inner"):
            hands.pass_(2)
            with clock.stage("innermost"):
                hands.pass_(4)
            hands.pass_(8)
        hands.pass_(16)
        with clock.stage("inner"):
            hands.pass_(32)
    assert clock.elapsed_ms == {"outer": 17_000, "inner": 42_000, "innermost": 4000}
    assert list(clock.elapsed_ms) == ["outer", "inner", "innermost"]  # by first use


def test_a_stage_within_itself_counts_once(hands: Hands) -> None:
    clock = StageClock()
    with clock.stage("blend"):
        hands.pass_(1)
        with clock.stage("blend"):
            hands.pass_(2)
    assert clock.elapsed_ms == {"blend": 3000}


def test_a_stage_that_fails_is_timed_and_leaves_the_outer_one_right(hands: Hands) -> None:
    clock = StageClock()

    def fail() -> None:
        with clock.stage("inner"):
            hands.pass_(2)
            raise ZeroDivisionError

    with clock.stage("outer"):
        with pytest.raises(ZeroDivisionError):
            fail()
        hands.pass_(1)
    with clock.stage("outer"):
        hands.pass_(4)
    assert clock.elapsed_ms == {"outer": 5000, "inner": 2000}


def test_items_are_timed_while_they_are_made_and_not_while_they_are_used(hands: Hands) -> None:
    clock = StageClock()

    def items() -> Iterator[int | None]:
        for item in (7, None, 9):
            hands.pass_(1)
            with clock.stage("network"):
                hands.pass_(10)
            yield item
        hands.pass_(2)  # to find that there are no more

    seen = []
    for item in clock.iterate("blend", items()):
        with clock.stage("fuse"):
            hands.pass_(100)
        hands.pass_(1000)
        seen.append(item)
    assert seen == [7, None, 9]
    assert clock.elapsed_ms == {"blend": 5000, "network": 30_000, "fuse": 300_000}


def test_items_that_nobody_asks_for_are_not_made(hands: Hands) -> None:
    clock, made = StageClock(), []

    def items() -> Iterator[int]:
        for item in range(3):
            hands.pass_(1)
            made.append(item)
            yield item

    iterator = clock.iterate("blend", items())
    assert made == [] and clock.elapsed_ms == {}
    assert next(iterator) == 0
    assert made == [0] and clock.elapsed_ms == {"blend": 1000}


def test_a_failure_of_an_item_is_passed_on_and_timed(hands: Hands) -> None:
    clock = StageClock()

    def items() -> Iterator[int]:
        hands.pass_(3)
        raise ZeroDivisionError
        yield 0

    with clock.stage("outer"):
        with pytest.raises(ZeroDivisionError):
            list(clock.iterate("blend", items()))
        hands.pass_(1)
    assert clock.elapsed_ms == {"outer": 1000, "blend": 3000}


def test_no_items_are_no_items(hands: Hands) -> None:
    clock = StageClock()
    assert list(clock.iterate("blend", [])) == []
    assert clock.elapsed_ms == {"blend": 0}
