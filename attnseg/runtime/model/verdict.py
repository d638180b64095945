"""Verdicts of the parity gate: which engines and precisions drifted over the budget at export.

The gate runs every engine of the exporting machine and records the results in the bundle's file of
role `parity`. Files over the budget are never part of a bundle, but an engine may run a file in a
lower precision, such as bf16, whose drift depends on the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnseg.runtime.errors import BundleError
from attnseg.runtime.model.bundle import Bundle


@dataclass(frozen=True)
class Verdict:
    """Result of the parity gate for one engine and precision.

    Attributes:
        engine: Name of the engine.
        precision: Precision of the network.
        within_budget: Whether every case and region was within the budget.
        drift: Largest drift as text, empty if no case was compared.
    """

    engine: str
    precision: str
    within_budget: bool
    drift: str

    def __str__(self) -> str:
        state = "within" if self.within_budget else "over"
        drift = f": {self.drift}" if self.drift else ""
        return f"{self.precision} on {self.engine} is {state} the parity budget{drift}"


def read_verdicts(bundle: Bundle) -> tuple[Verdict, ...]:
    """Verdicts recorded in a bundle; none if it has no parity report.

    Raises:
        BundleError: The parity report cannot be read.
    """
    if not bundle.has("parity"):
        return ()
    file = bundle.file("parity")
    content = file.read_bytes()
    try:
        report = json.loads(content)
        return tuple(
            Verdict(
                engine=str(entry["engine"]).rsplit(" ", 1)[0],
                precision=str(entry["precision"]),
                within_budget=entry["within_budget"] is True,
                drift=_largest_drift(entry, report),
            )
            for entry in report["measured"]
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{file}: is not a parity report", "export the model again") from error


def _largest_drift(entry: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Largest drift of an entry as text; empty if its numbers are missing, as those not finite."""
    try:
        budget = report["budget"]
        dice, volume = budget["dice"], budget["volume_percent"]
        worst = max(
            entry["drifts"], key=lambda d: max(d["dice"] / dice, d["volume_percent"] / volume)
        )
        return (
            f"{worst['region']} of {worst['case']} drifts by {worst['dice']:.4f} Dice and "
            f"{worst['volume_percent']:.2f} % volume (budget {dice:g} and {volume:g} %)"
        )
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return ""


def over_budget(bundle: Bundle, engine: str, precision: str | None = None) -> Verdict | None:
    """Verdict against an engine in a precision, or in any; None if there is none."""
    for verdict in read_verdicts(bundle):
        fits = verdict.engine == engine and precision in (None, verdict.precision)
        if fits and not verdict.within_budget:
            return verdict
    return None
