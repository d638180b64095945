from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from attnseg import Bundle, Volume
from attnseg.export.documents.card import model_card, not_run_lines, parity_rows
from attnseg.export.gate.layers import LayerError, compare_layers, stands_out
from attnseg.export.gate.parity import Drift, Gate, Measured, NotRun, ParityReport
from attnseg.export.gate.samples import Sample
from attnseg.export.graphs.fp16 import convert_to_fp16, simulate_fp16
from attnseg.runtime.errors import EngineError
from attnseg.runtime.model.golden import Golden
from attnseg.runtime.model.manifest import Budget
from tests.conftest import LinearEngine
from tests.export.graphs.test_fp16 import UP_AND_DOWN, image

SHAPE = (64, 64, 64)
BUDGET = Budget()


def brain() -> NDArray[np.int16]:
    """Four channels of noise in a cube of 40 voxels, 0 outside."""
    rng = np.random.default_rng(0)
    channels = np.zeros((4, *SHAPE), np.int16)
    channels[:, 12:52, 12:52, 12:52] = rng.integers(100, 200, (4, 40, 40, 40))
    return channels


class PlacedEngine(LinearEngine):
    """Labels are those of a map, wherever it is asked: one window of 64 over the 40 voxels."""

    def __init__(self, labels: NDArray[np.uint8]) -> None:
        super().__init__(np.zeros((4, 4), np.float32))
        self._labels = labels

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.eye(4, dtype=np.float32)[self._labels]
        return np.moveaxis(logits, -1, 0)[None]


def placed(size: int, value: int = 2) -> NDArray[np.uint8]:
    """A window with a slab of `size` x 10 x 10 voxels of a class in the middle."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[22 : 22 + size, 22:32, 22:32] = value
    return labels


def drifts(reference: int, found: int, truth: int | None) -> dict[str, Drift]:
    """Drift of whole tumour between slabs of these sizes."""
    expected = None if truth is None else placed(truth)
    volume = Volume(brain(), np.diag([-1.0, -1, 1, 1]))
    sample = Sample("slab", volume, expected)
    golden = Golden(np.zeros((1, 4, *SHAPE), np.float32), np.ones((1, 4, *SHAPE), np.float32))
    bundle = Bundle.default()
    gate = Gate(bundle, PlacedEngine(placed(reference)), golden, [sample])
    measured = gate.measure(PlacedEngine(placed(found)), "fp16")
    return {drift.region: drift for drift in measured.drifts}


def test_drift_against_the_truth_by_hand() -> None:
    # Slabs of 2000 and 1900 voxels, the truth 2000: Dice 1 and 2 * 19 / 39.
    whole = drifts(reference=20, found=19, truth=20)["WT"]
    assert whole.dice == pytest.approx(1 - 38 / 39, abs=1e-6)
    assert whole.volume_percent == pytest.approx(5)
    assert whole.case == "slab"


def test_drift_without_truth_is_what_is_missing_to_the_reference() -> None:
    whole = drifts(reference=20, found=19, truth=None)["WT"]
    assert whole.dice == pytest.approx(1 - 38 / 39, abs=1e-6)


def test_a_change_to_the_better_is_a_drift_too() -> None:
    assert drifts(reference=19, found=20, truth=20)["WT"].dice == pytest.approx(1 / 39, abs=1e-6)


def test_small_volumes_are_compared_with_one_millilitre() -> None:
    # 500 voxels of 1 mm3 and 400: 0.1 ml of at least 1 ml.
    assert drifts(reference=5, found=4, truth=5)["WT"].volume_percent == pytest.approx(10)


def test_the_same_labels_do_not_drift_and_empty_regions_neither() -> None:
    same = drifts(reference=20, found=20, truth=15)
    assert {(d.dice, d.hd95_mm, d.volume_percent) for d in same.values()} == {(0, 0, 0)}


def test_logits_of_another_shape_are_refused() -> None:
    golden = Golden(np.zeros((1, 4, *SHAPE), np.float32), np.zeros((1, 5, *SHAPE), np.float32))
    gate = Gate(Bundle.default(), PlacedEngine(placed(1)), golden, [])
    with pytest.raises(EngineError, match="gives logits of shape"):
        gate.measure(PlacedEngine(placed(1)), "fp32")


def measured(
    precision: str = "fp16", gated: bool = True, logits: float = 0.01, **drift: float
) -> Measured:
    found = Drift("a case", "TC", **{"dice": 0.0, "hd95_mm": 0.0, "volume_percent": 0.0, **drift})
    return Measured(precision, "an engine 1", gated, logits=logits, labels=0.0, drifts=(found,))


def report(*results: Measured) -> ParityReport:
    return ParityReport("torch", BUDGET, results, (NotRun("fp16", "tensorrt-rtx", "no GPU"),))


def test_the_card_has_a_row_for_each_engine_and_says_what_was_not_run() -> None:
    found = report(measured(dice=0.001), measured("bf16", gated=False, dice=0.5))
    assert [row[-1] for row in parity_rows(found)] == [
        "within budget",
        "over budget (informational)",
    ]
    assert not_run_lines(found) == ["fp16 tensorrt-rtx: not run here, no GPU"]
    card = model_card(Bundle.default().manifest, found)
    assert (
        "| fp16 an engine 1 | 1.0e-02 | 0.0e+00 | 0.0010 | 0.00 % | 0.0 mm | within budget |"
        in card
    )
    assert "not for clinical use" in card


def test_the_report_is_plain_values() -> None:
    record = report(measured(dice=0.001)).to_dict()
    assert record["measured"][0]["within_budget"] is True
    assert record["measured"][0]["drifts"][0]["dice"] == 0.001
    assert record["not_run"] == [
        {"precision": "fp16", "engine": "tensorrt-rtx", "reason": "no GPU"}
    ]


def test_the_stands_out_is_found_by_its_tensor() -> None:
    window = image(1, 10, -20, 0)
    overflown = simulate_fp16(convert_to_fp16(UP_AND_DOWN))
    errors = compare_layers(UP_AND_DOWN, overflown, window, 1)
    assert [e.tensor for e in errors] == ["high", "low", "logits"]
    wrong = stands_out(errors)
    assert wrong is not None
    assert (wrong.tensor, wrong.operator) == ("high", "Conv")
    small = compare_layers(UP_AND_DOWN, overflown, image(1), 1)
    assert stands_out(small) is None
    same = compare_layers(UP_AND_DOWN, UP_AND_DOWN.model, window, 1)
    assert {e.difference for e in same} == {0}


def test_errors_that_grow_slowly_have_no_stands_out() -> None:
    slow = [LayerError(str(i), "Conv", 1e-3 * 3**i) for i in range(8)]
    assert stands_out(slow) is None
    assert stands_out([*slow, LayerError("x", "Conv", float("inf"))]) is not None
