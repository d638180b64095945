from __future__ import annotations

import logging

import pytest

from attnseg.trainer import progress
from attnseg.trainer.progress import shown_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, which the test sets."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_without_a_terminal_a_long_stage_has_a_line_every_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "attnseg")
    with shown_progress("preparing the cases", 8, done=2) as advance:
        for second, name in enumerate("abcdef"):
            clock[0] = 4.0 * second
            advance(name)
    assert caplog.messages == [
        "preparing the cases: 6 of 8 (d)",  # after 12 s
    ]


def test_a_short_stage_has_no_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "attnseg")
    with shown_progress("reading the labels", 2) as advance:
        advance("a")
        advance("b")
    assert caplog.messages == []


def test_only_the_first_process_shows_progress(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "attnseg")
    monkeypatch.setenv("RANK", "1")
    with shown_progress("reading the labels", 2) as advance:
        clock[0] = 60
        advance("a")
    assert caplog.messages == []
