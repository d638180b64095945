"""Comparison of training runs: learning curves and evaluation scores.

    python -m benchmarks.comparison RUN... -o docs/results

Each RUN is an output folder of `attnseg train` in which `attnseg evaluate -o RUN/evaluation` has
written its scores. Copies every log to OUTPUT/RUN.csv, draws OUTPUT/curves.png, and prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from attnseg.evaluation.scores import column, read_scores
from attnseg.evaluation.tables import markdown_table
from attnseg.trainer.checkpoint import checkpoint_config, load_checkpoint
from attnseg.trainer.networks import cost_of

REGIONS = ("WT", "TC", "ET")


def read_log(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's log."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def draw(runs: Sequence[Path], picture: Path) -> None:
    """Draw training loss and validation Dice by epoch, with one line per run."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    names = ("train_loss", *(f"validation_{region}" for region in REGIONS))
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        for run in runs:
            rows = read_log(run)
            axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], ".-", label=run.name)
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=100)


def table_row(run: Path) -> list[str]:
    """Table row of a run: cost, mean scores, best epoch and training time in minutes."""
    state = load_checkpoint(run / "best.pt")
    cost = cost_of(checkpoint_config(state).network)
    scores = read_scores(run / "evaluation")
    dice = [column(scores, region, "dice").mean() for region in REGIONS]
    hd95 = [column(scores, region, "hd95_mm").mean() for region in REGIONS]
    minutes = load_checkpoint(run / "last.pt")["seconds"] / 60
    return [
        run.name,
        f"{cost.parameters_m:.2f}",
        f"{cost.gmac:.1f}",
        *(f"{value:.3f}" for value in dice),
        f"{sum(dice) / len(dice):.3f}",
        *(f"{value:.1f}" for value in hd95),
        str(state["epoch"]),
        f"{minutes:.0f}",
    ]


def main() -> None:
    """Copy, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        shutil.copyfile(run / "log.csv", options.output / f"{run.name}.csv")
    draw(options.runs, options.output / "curves.png")
    header = ("run", "M parameters", "GMAC", *(f"Dice {r}" for r in REGIONS), "mean")
    header += (*(f"HD95 {r}, mm" for r in REGIONS), "best epoch", "minutes")
    print(markdown_table(header, [table_row(run) for run in options.runs]), end="")


if __name__ == "__main__":
    main()
