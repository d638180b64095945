from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnseg.trainer.interrupt import noted_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with noted_interrupts() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(number)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_first_signal_is_answered_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "attnseg")
    with noted_interrupts():
        signal.raise_signal(signal.SIGINT)
        (line,) = caplog.messages
    assert line.startswith("stopping after this step")


def test_signals_stop_as_before_once_the_work_is_done() -> None:
    with noted_interrupts():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_another_thread_leaves_signals_alone() -> None:
    def look() -> tuple[object, bool]:
        with noted_interrupts() as interrupt:
            return signal.getsignal(signal.SIGINT), interrupt.asked

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() == (before, False)
