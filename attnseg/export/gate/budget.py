"""The budget of the parity gate: what exceeds it, and what the user can do about it."""

from __future__ import annotations

import math

from attnseg.export.gate.parity import LOGIT_TOLERANCE, Measured, ParityReport
from attnseg.runtime.errors import ExportError, Setting
from attnseg.runtime.model.manifest import Budget


def make_budget(
    dice: float | None, volume_percent: float | None, default: Budget | None = None
) -> Budget:
    """Make a budget in which omitted values take their defaults.

    Args:
        dice: Largest drift of Dice; None for the default.
        volume_percent: Largest drift of a volume, in percent; None for the default.
        default: Budget that the defaults come from; None for the project's.

    Raises:
        ConfigError: A value is not positive, or Dice exceeds 1 or the volume 100.
    """
    default = default or Budget()
    return Budget(
        default.dice if dice is None else dice,
        default.volume_percent if volume_percent is None else volume_percent,
    )


def describe_failure(measured: Measured, budget: Budget) -> str:
    """One line on the largest drift over the budget."""
    over = [drift for drift in measured.drifts if not drift.within(budget)]
    if measured.failure:
        return measured.failure
    if not over and measured.precision != "fp32":
        return "its logits on the golden window are not finite"
    if not over:
        return (
            f"its fp32 logits differ by {measured.logits:.1e} of the largest, more than "
            f"{LOGIT_TOLERANCE:.0e}"
        )
    worst = max(
        over,
        key=lambda d: max(d.dice / budget.dice, d.volume_percent / budget.volume_percent),
    )
    return (
        f"{worst.region} of {worst.case} drifts by {worst.dice:.4f} Dice and "
        f"{worst.volume_percent:.2f} % volume (budget {budget.dice:g} and "
        f"{budget.volume_percent:g} %)"
    )


def _round_up(value: float) -> float:
    """The smallest number of two significant digits that is not below a positive number."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 9)


def _settings_that_allow(measured: Measured, budget: Budget) -> list[Setting]:
    """Settings of the smallest budget that a result keeps; empty if no budget helps."""
    if measured.failure or not math.isfinite(measured.logits):
        return []
    if measured.precision == "fp32" and not measured.logits <= LOGIT_TOLERANCE:
        return []
    dice = max((drift.dice for drift in measured.drifts), default=0.0)
    volume = max((drift.volume_percent for drift in measured.drifts), default=0.0)
    limits = (
        ("budget_dice", dice, budget.dice, 1),
        ("budget_volume", volume, budget.volume_percent, 100),
    )
    over = [(name, _round_up(v), most) for name, v, limit, most in limits if v > limit]
    if any(value > most for _, value, most in over):
        return []
    return [Setting(name, value) for name, value, _ in over]


def _failure(measured: Measured, budget: Budget, detail: str) -> str:
    return (
        f"{measured.precision} ({measured.engine}) is over the budget: "
        f"{describe_failure(measured, budget)}{detail}"
    )


def check_budget(report: ParityReport, file: str) -> None:
    """Raise an error if a result of the fp32 graph exceeds the budget.

    Args:
        report: Report of the gate.
        file: File name of the fp32 graph.

    Raises:
        ExportError: A result of the graph exceeds the budget.
    """
    for failed in report.failures():
        if failed.file == file:
            settings = _settings_that_allow(failed, report.budget)
            allow = f"; allow it with {' and '.join('{}' for _ in settings)}" if settings else ""
            raise ExportError(
                _failure(failed, report.budget, ""), f"no bundle was written{allow}", *settings
            )


def left_out(failed: Measured, report: ParityReport, detail: str = "") -> ExportError:
    """Error for a file that the bundle is written without, because it exceeds the budget.

    Args:
        failed: Result that exceeds the budget.
        report: Report of the gate.
        detail: Further text of the cause, such as the first wrong layer.
    """
    cause = f"{failed.file} is left out of the bundle: {_failure(failed, report.budget, detail)}"
    settings = _settings_that_allow(failed, report.budget)
    keep = f"keep it with {' and '.join('{}' for _ in settings)}" if settings else ""
    without = [Setting(failed.precision)] if failed.precision in ("fp16", "int8") else []
    leave = "leave {} out" if without else ""
    return ExportError(cause, ", or ".join(filter(None, (keep, leave))), *settings, *without)
