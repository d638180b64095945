"""Replay of the fuzzer's corpus, for which Atheris is not needed."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import CORPUS, TARGETS, Fault, Target


@pytest.mark.parametrize("name", TARGETS)
def test_every_file_of_the_corpus_is_refused_or_read_as_what_it_is(name: str) -> None:
    target = TARGETS[name]()
    files = sorted((CORPUS / name).iterdir())
    outcomes = [target(file.read_bytes()) for file in files]
    target.close()
    assert {"accepted", "refused"} == set(outcomes)


def test_the_corpus_is_small() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 64 << 10


def test_a_broken_promise_is_a_fault() -> None:
    class Broken(Target):
        def complete(self, file: object) -> None:
            self.input = self.folder / "gone"  # the reader takes it for a file that it must have

    target = Broken(TARGETS["manifest"]().reader.__class__, "manifest.json")
    with pytest.raises(Fault, match=r"(?s)exception: .*FileNotFoundError"):
        target(b"{}")
    target.close()
