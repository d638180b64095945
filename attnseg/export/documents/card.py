"""The model card of a bundle, in Markdown."""

from __future__ import annotations

from attnseg.evaluation.tables import markdown_table
from attnseg.export.gate.parity import Measured, ParityReport
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.text import markdown

PARITY_HEADER = ("run by", "logits", "labels", "Dice", "volume", "HD95", "budget")


def parity_rows(report: ParityReport) -> list[tuple[str, ...]]:
    """Table rows under `PARITY_HEADER`: logit and label differences, and the largest drifts."""
    return [_row(measured, report) for measured in report.measured]


def _row(measured: Measured, report: ParityReport) -> tuple[str, ...]:
    drifts = measured.drifts
    worst = ("", "", "")
    if drifts:
        worst = (
            f"{max(d.dice for d in drifts):.4f}",
            f"{max(d.volume_percent for d in drifts):.2f} %",
            f"{max(d.hd95_mm for d in drifts):.1f} mm",
        )
    verdict = "within budget" if measured.within(report.budget) else "over budget"
    return (
        f"{measured.precision} {measured.engine}",
        f"{measured.logits:.1e}",
        f"{measured.labels:.1e}",
        *worst,
        verdict if measured.gated else f"{verdict} (informational)",
    )


def not_run_lines(report: ParityReport) -> list[str]:
    """A line for each file that no engine of the machine could run."""
    return [f"{n.precision} {n.engine}: not run here, {n.reason}" for n in report.not_run]


def _training(manifest: Manifest) -> str:
    training, validation = manifest.training, manifest.validation
    if training is None or validation is None:
        return "Nothing is known of its training.\n"
    dice = ", ".join(f"{region} {value:.3f}" for region, value in validation.dice.items())
    phantoms = f" and {training.synthetic_cases} phantoms" if training.synthetic_cases else ""
    return (
        f"Trained on {len(training.train_cases)} cases{phantoms} of {training.data}, for "
        f"{training.epochs} epochs on {training.device}. Dice on "
        f"{len(training.validation_cases)} other cases: {dice} ({validation.method}).\n"
    )


def model_card(manifest: Manifest, report: ParityReport) -> str:
    """The model card of a bundle.

    Args:
        manifest: Manifest of the bundle.
        report: Report of the parity gate.
    """
    channels = ", ".join(manifest.task.channel_names)
    labels = [(str(label.value), label.name) for label in manifest.task.labels]
    spacing = " x ".join(f"{s:g}" for s in manifest.spacing_mm or ()) or "any"
    budget = report.budget
    cases = sorted({drift.case for m in report.measured for drift in m.drifts})
    return "\n".join(
        (
            f"# {markdown(manifest.name)}",
            "",
            markdown(manifest.description),
            "",
            f"**Intended use:** {markdown(manifest.intended_use)}.",
            "",
            f"Takes {channels} at {spacing} mm and gives one label per voxel:",
            "",
            markdown_table(("value", "class"), labels),
            _training(manifest),
            *(f"{note}\n" for note in report.notes),
            "## Precision",
            "",
            f"Every precision against {report.reference}: logits (share of the largest) and "
            "labels on the golden window, and the worst change of Dice, volume and HD95 over the "
            f"regions of {', '.join(cases) or 'no case'}. The budget is {budget.dice:g} Dice and "
            f"{budget.volume_percent:g} % volume; `attnseg verify` measures it again.",
            "",
            markdown_table(PARITY_HEADER, parity_rows(report)),
            *(f"- {line}" for line in (*report.left_out, *not_run_lines(report))),
            "",
        )
    )
