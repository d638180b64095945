from __future__ import annotations

from dataclasses import replace

import pytest

from attnseg.export.gate.budget import check_budget, left_out
from attnseg.export.gate.parity import Measured, ParityReport
from attnseg.runtime.errors import ExportError, Setting
from tests.export.gate.test_parity import measured, report

FP32, FP16 = "model.onnx", "model-fp16.onnx"


def of_file(file: str, result: Measured) -> Measured:
    return replace(result, file=file)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (
            measured("fp32", logits=0, dice=0.0021),
            r"TC of a case drifts by 0\.0021 Dice .*budget 0\.002.*no bundle was written; "
            r"allow it with budget_dice=0\.0021$",
        ),
        (
            measured("fp32", logits=0, volume_percent=0.51),
            "drifts by 0.0000 Dice and 0.51 % volume.*allow it with budget_volume=0.51$",
        ),
        (measured("fp32", logits=0.002), r"fp32 logits differ by 2\.0e-03.*no bundle was written$"),
        (measured("fp32", logits=float("nan")), "fp32 logits differ by nan.*was written$"),
    ],
    ids=["dice", "volume", "logits", "nan"],
)
def test_an_fp32_graph_over_the_budget_is_refused_with_the_reason(
    result: Measured, reason: str
) -> None:
    with pytest.raises(ExportError, match=rf"fp32 \(an engine 1\) is over the budget: .*{reason}"):
        check_budget(report(measured(), of_file(FP32, result)), FP32)


@pytest.mark.parametrize(
    "result",
    [
        measured("fp32", logits=0.0, dice=0.002, volume_percent=0.5),
        measured("bf16", gated=False, dice=0.5),
        measured("fp32", logits=0.0009),
        measured("fp32", logits=0.0, hd95_mm=40),
    ],
    ids=["at the budget", "not gated", "fp32", "distance"],
)
def test_what_is_within_the_budget_passes(result: Measured) -> None:
    check_budget(report(of_file(FP32, result)), FP32)


def test_other_files_over_the_budget_do_not_stop_the_export() -> None:
    check_budget(report(of_file(FP16, measured(dice=0.1))), FP32)


def left(result: Measured) -> ExportError:
    return left_out(of_file(FP16, result), report())


def test_the_mend_is_the_smallest_budget_that_keeps_the_file() -> None:
    # Rounded up to two digits: 0.00981 is within 0.0099, and 0.521 within 0.53.
    error = left(measured(dice=0.00981, volume_percent=0.521))
    assert error.settings == (
        Setting("budget_dice", 0.0099),
        Setting("budget_volume", 0.53),
        Setting("fp16"),
    )
    assert str(error).startswith(
        "model-fp16.onnx is left out of the bundle: fp16 (an engine 1) is over the budget: TC of a "
        "case drifts by 0.0098 Dice"
    )
    assert str(error).endswith(
        "; keep it with budget_dice=0.0099 and budget_volume=0.53, or leave fp16 out"
    )


def test_a_value_of_two_digits_is_its_own_budget() -> None:
    assert left(measured(dice=0.3)).settings[0] == Setting("budget_dice", 0.3)
    assert left(measured(dice=1.0)).settings[0] == Setting("budget_dice", 1.0)


@pytest.mark.parametrize(
    "result",
    [measured(dice=1.0, logits=float("inf")), measured(volume_percent=250.0)],
    ids=["overflow", "beyond any budget"],
)
def test_no_budget_is_named_that_does_not_help(result: Measured) -> None:
    error = left(result)
    assert (error.mend, error.settings) == ("leave {} out", (Setting("fp16"),))


def test_a_report_says_what_was_left_out_and_changed() -> None:
    found = ParityReport("torch", report().budget, (), (), ("a is left out",), ("b was changed",))
    assert found.to_dict()["left_out"] == ["a is left out"]
    assert found.to_dict()["notes"] == ["b was changed"]


def test_logits_that_overflow_are_over_the_budget_without_a_case() -> None:
    result = replace(measured(logits=float("nan")), drifts=())
    assert not result.within(report().budget)
    assert "its logits on the golden window are not finite" in left(result).cause
