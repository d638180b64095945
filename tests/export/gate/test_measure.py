from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attnseg import Bundle
from attnseg.export.gate import measure
from attnseg.export.gate.budget import left_out
from attnseg.export.gate.parity import Gate, ParityReport
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.select import Candidate
from attnseg.runtime.errors import MismatchError
from attnseg.runtime.model.golden import Golden
from attnseg.runtime.model.manifest import Budget
from tests.export.gate.test_parity import SHAPE, PlacedEngine, placed


def test_an_engine_that_gives_other_logits_is_over_any_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_it() -> Engine:
        raise MismatchError("its logits on the golden window differ by 0.5", "export again")

    steps: list[str] = []
    candidate = Candidate("tensorrt", Path("a/model-fp16-sm86.tensorrt"), "fp16", open_it, True)
    monkeypatch.setattr(
        measure,
        "candidates",
        lambda _, request: (
            [candidate] if (request.engine, request.precision) == ("tensorrt", "fp16") else []
        ),
    )
    logits = np.ones((1, 4, *SHAPE), np.float32)
    golden = Golden(np.zeros((1, 4, *SHAPE), np.float32), logits)
    gate = Gate(Bundle.default(), PlacedEngine(placed(1)), golden, [], steps.append)
    report = ParityReport("torch", Budget(1, 100), (), ())
    report = measure.measure_engines(gate, Bundle.default(), report)
    (failed,) = report.failures()
    assert steps == ["tensorrt fp16: golden window"]
    error = left_out(failed, report)
    assert error.cause == (
        "model-fp16-sm86.tensorrt is left out of the bundle: fp16 (tensorrt "
        "(model-fp16-sm86.tensorrt)) is over the budget: its logits on the golden window differ "
        "by 0.5"
    )
