"""Verdicts of the parity gate: which engines and precisions drifted over the budget at export.

The gate runs every engine of the exporting machine and records the results in the bundle's file of
role `parity`. Files over the budget are never part of a bundle, but an engine may run a file in a
lower precision, such as bf16, whose drift depends on the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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
    """Verdicts recorded in a bundle; none if it has no readable parity report."""
    if not bundle.has("parity"):
        return ()
    try:
        report = json.loads(bundle.file("parity").read_text(encoding="utf-8"))
        return tuple(_verdict(entry, report["budget"]) for entry in report["measured"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def _verdict(entry: Any, budget: Any) -> Verdict:
    drifts = entry["drifts"]
    worst = max(
        drifts,
        key=lambda d: max(
            d["dice"] / budget["dice"], d["volume_percent"] / budget["volume_percent"]
        ),
        default=None,
    )
    drift = (
        ""
        if worst is None
        else (
            f"{worst['region']} of {worst['case']} drifts by {worst['dice']:.4f} Dice and "
            f"{worst['volume_percent']:.2f} % volume (budget {budget['dice']:g} and "
            f"{budget['volume_percent']:g} %)"
        )
    )
    name = str(entry["engine"]).rsplit(" ", 1)[0]
    return Verdict(name, str(entry["precision"]), bool(entry["within_budget"]), drift)


def over_budget(bundle: Bundle, engine: str, precision: str | None = None) -> Verdict | None:
    """Verdict against an engine in a precision, or in any; None if there is none."""
    for verdict in read_verdicts(bundle):
        fits = verdict.engine == engine and precision in (None, verdict.precision)
        if fits and not verdict.within_budget:
            return verdict
    return None
