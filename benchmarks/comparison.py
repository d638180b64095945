"""Comparison of training runs: learning curves and evaluation scores.

    python -m benchmarks.comparison RUN... -o docs/results

Each RUN is an output folder of `attnseg train` in which `attnseg evaluate -o RUN/evaluation` has
written its scores. Copies every log to OUTPUT/RUN.csv, draws OUTPUT/curves.png, or another name
that --picture gives, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attnseg.evaluation.scores import column, read_scores
from attnseg.evaluation.tables import markdown_table
from attnseg.trainer.checkpoint import checkpoint_config, load_checkpoint
from attnseg.trainer.networks import cost_of

REGIONS = ("WT", "TC", "ET")


def read_log(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's log, and add the mean Dice of the regions."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as stream:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    return [
        {**row, "validation_mean": sum(row[f"validation_{r}"] for r in REGIONS) / len(REGIONS)}
        for row in rows
    ]


def draw(runs: Sequence[Path], picture: Path) -> None:
    """Draw validation Dice and training loss by epoch, with one line per run.

    Training losses that are not weighted alike are left out, because they are not comparable.
    """
    names = [f"validation_{name}" for name in (*REGIONS, "mean")]
    configs = [checkpoint_config(load_checkpoint(run / "best.pt")) for run in runs]
    if len({config.cross_entropy_weight for config in configs}) == 1:
        names.append("train_loss")
    columns = (len(names) + 1) // 2
    figure = Figure(figsize=(6 * columns, 8), layout="constrained")
    for axes, name in zip(figure.subplots(2, columns).flat, names, strict=False):
        for run in runs:
            rows = read_log(run)
            axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], ".-", label=run.name)
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    for unused in figure.axes[len(names) :]:
        unused.set_axis_off()
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
    parser.add_argument("--picture", default="curves.png")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        shutil.copyfile(run / "log.csv", options.output / f"{run.name}.csv")
    draw(options.runs, options.output / options.picture)
    header = ("run", "M parameters", "GMAC", *(f"Dice {r}" for r in REGIONS), "mean")
    header += (*(f"HD95 {r}, mm" for r in REGIONS), "best epoch", "minutes")
    print(markdown_table(header, [table_row(run) for run in options.runs]), end="")


if __name__ == "__main__":
    main()
